"""Train the runs of a comparison on Ray, tracked in MLflow, as `crate-ray pretrain` and `crate-ray finetune` do."""

from __future__ import annotations

from typing import Any

from crate_ray.comparison.follower import Follower, follower_of
from crate_ray.comparison.table import PretrainFigures
from crate_ray.config import CompareConfig, FinetuneConfig, PretrainConfig
from crate_ray.evaluation.extraction import Extraction
from crate_ray.evaluation.feature_cache import FeatureCache
from crate_ray.evaluation.online import measure_checkpoint
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription
from crate_ray.runs.pretraining import open_pretraining
from crate_ray.runs.references import load_encoder
from crate_ray.storage.node_folders import feature_folder
from crate_ray.tracking.pretraining import publish
from crate_ray.training.lifecycle import run_training
from crate_ray.training.pretraining import PretrainTask

_CACHE_BYTES = 20 * 2**30


class OnRay:
    """A compare.Trainer on Ray. Interrupted runs resume."""

    def __init__(self, config: CompareConfig) -> None:
        self._config = config
        self.features = Extraction(FeatureCache(feature_folder(), _CACHE_BYTES), config.s3)

    def pretrain(self, config: PretrainConfig) -> PretrainFigures:
        """Train the remaining steps of a run."""
        follower = follower_of(self._config, config.name)
        options = {**self._options(follower), "measure": measure_checkpoint}
        run = run_training(config, PretrainTask, open_pretraining, publish, **options).run
        return follower.figures(run)

    def load(self, config: PretrainConfig) -> tuple[MaskedAutoencoder, ModelDescription]:
        """Load the model from the run's folder."""
        return load_encoder(f"{config.storage}/{config.name}", config.tracking, config.s3)

    def finetune(self, config: FinetuneConfig) -> float:
        """Train the remaining steps of a run."""
        follower = follower_of(self._config, config.name)
        run = run_training(config, FinetuneTask, open_finetuning, publish, **self._options(follower)).run
        return follower.final("top1", run)

    def _options(self, follower: Follower) -> dict[str, Any]:
        return {"listeners": [follower], "tags": {"crate_ray.comparison": self._config.name}}
