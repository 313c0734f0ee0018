"""Settings of `crate-ray pretrain`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AliasChoices, Field, model_validator

from crate_ray.config.base import RunName, Settings
from crate_ray.config.data import DataConfig
from crate_ray.config.models import CrateMAEConfig, ModelConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.training import CheckpointConfig, OptimConfig, ScalingConfig, TrackingConfig, TrainingConfig


class PretrainConfig(Settings):
    """Pretrain CRATE-MAE or ViT-MAE on sharded images, on Ray."""

    name: RunName = "pretrain"
    """Name of the run. The same name and storage resume the run where its last checkpoint left it."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for checkpoints and results; with several nodes one that all reach."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, data order, augmentation and masks."""
    init_from: Annotated[str | None, Field(validation_alias=AliasChoices("init_from", "init-from"))] = None
    """Start from these weights (nothing else of theirs; the run begins at step 0): a run's folder, local or on S3, for
    its newest checkpoint, or with @step for that of a step; models:/<name>@<alias> or runs:/<id> in MLflow; the folder
    of an exported model; or a checkpoint file of the published code (.pth, .pt, .bin, .safetensors)."""
    model: ModelConfig = CrateMAEConfig()
    """The model."""
    data: DataConfig
    """The data."""
    training: TrainingConfig
    """The training run."""
    optim: OptimConfig = OptimConfig()
    """The optimiser and its schedule."""
    scaling: ScalingConfig = ScalingConfig()
    """The workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_keep_best(self) -> Self:
        if self.checkpoint.keep_best and not self.data.validation:
            raise ValueError("checkpoint.keep_best goes by the validation loss; set data.validation")
        return self
