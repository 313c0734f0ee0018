"""Every setting of every job, as strict pydantic models: one file per job. A field's docstring is its documentation."""

from crate_ray.config.base import Fraction, Kind, PositiveInt, Record, RunName, Settings, check_name
from crate_ray.config.benchmark import (
    BenchmarkDataConfig,
    BenchmarkOrderConfig,
    BenchmarkOverheadConfig,
    BenchmarkRooflineConfig,
    BenchmarkScalingConfig,
    BenchmarkServeConfig,
    BenchmarkTrainConfig,
    Contestant,
)
from crate_ray.config.compare import CompareConfig
from crate_ray.config.data import DataConfig
from crate_ray.config.embed import EmbedConfig
from crate_ray.config.evaluate import EvaluateConfig, Feature, ProbeConfig
from crate_ray.config.export import ExportConfig
from crate_ray.config.finetune import FINETUNE_RECIPES, AugmentConfig, ClassifierConfig, FinetuneConfig, Pooling
from crate_ray.config.models import (
    CRATE_PRESETS,
    VIT_PRESETS,
    CrateMAEConfig,
    ImageModelConfig,
    ModelConfig,
    PresetName,
    ViTMAEConfig,
    fill_from_preset,
    whole_number,
)
from crate_ray.config.prepare import PrepareConfig
from crate_ray.config.pretrain import OnlineProbeConfig, PretrainConfig
from crate_ray.config.registry import (
    CardConfig,
    Criterion,
    ListConfig,
    PromoteConfig,
    PromotionProbe,
    RegisterConfig,
    RollbackConfig,
)
from crate_ray.config.search import SearchConfig
from crate_ray.config.serve import ServeConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.sweep import SearchSpace, SweepConfig
from crate_ray.config.training import (
    CheckpointConfig,
    OptimConfig,
    OptimizerName,
    ScalingConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "CRATE_PRESETS",
    "FINETUNE_RECIPES",
    "VIT_PRESETS",
    "AugmentConfig",
    "BenchmarkDataConfig",
    "BenchmarkOrderConfig",
    "BenchmarkOverheadConfig",
    "BenchmarkRooflineConfig",
    "BenchmarkScalingConfig",
    "BenchmarkServeConfig",
    "BenchmarkTrainConfig",
    "CardConfig",
    "CheckpointConfig",
    "ClassifierConfig",
    "CompareConfig",
    "Contestant",
    "CrateMAEConfig",
    "Criterion",
    "DataConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Feature",
    "FinetuneConfig",
    "Fraction",
    "ImageModelConfig",
    "Kind",
    "ListConfig",
    "ModelConfig",
    "OnlineProbeConfig",
    "OptimConfig",
    "OptimizerName",
    "Pooling",
    "PositiveInt",
    "PrepareConfig",
    "PresetName",
    "PretrainConfig",
    "ProbeConfig",
    "PromoteConfig",
    "PromotionProbe",
    "Record",
    "RegisterConfig",
    "RollbackConfig",
    "RunName",
    "S3Config",
    "ScalingConfig",
    "SearchConfig",
    "SearchSpace",
    "ServeConfig",
    "Settings",
    "SweepConfig",
    "TrackingConfig",
    "TrainingConfig",
    "ViTMAEConfig",
    "check_name",
    "fill_from_preset",
    "whole_number",
]
