"""Settings of `crate-ray pretrain`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from crate_ray.config.base import RunName, Settings
from crate_ray.config.data import DataConfig
from crate_ray.config.models import CrateMAEConfig, ModelConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.training import CheckpointConfig, OptimConfig, ScalingConfig, TrackingConfig, TrainingConfig


class PretrainConfig(Settings):
    """Pretrain CRATE-MAE or ViT-MAE on images or other grids, on Ray."""

    short_forms: ClassVar[dict[str, str]] = {
        "data": "Folder or s3://bucket/prefix of images, .npy grids or .tar shards. Chooses model, batch, length and "
        "workers to suit the data and the machine; settings that you give override the choice."
    }

    name: RunName = "pretrain"
    """Name of the run; the same name and storage resume it. With --data, the folder's name by default."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for checkpoints and results. On several nodes, all of them must reach it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights, the data order, augmentation and masks."""
    init_from: str | None = None
    """Model to take the initial weights from. The run still starts at step 0. Forms: a run's folder (its newest
    checkpoint), <run>@<step>, <run>@best (lowest validation loss), a checkpoint's folder, the folder of an exported
    model, models:/<name>@<alias>, models:/<name>/<version>, runs:/<MLflow run id>, or a published checkpoint (.pth,
    .pt, .ckpt, .bin, .safetensors)."""
    model: ModelConfig = CrateMAEConfig()
    """Architecture and size."""
    data: DataConfig
    """Datasets, and how samples are read and augmented."""
    training: TrainingConfig
    """Batch, length and precision."""
    optim: OptimConfig = OptimConfig()
    """AdamW and its learning rate."""
    scaling: ScalingConfig = ScalingConfig()
    """Ray Train workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is saved."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_keep_best(self) -> Self:
        if self.checkpoint.keep_best and not self.data.validation:
            raise ValueError("checkpoint.keep_best compares validation losses; set data.validation")
        return self
