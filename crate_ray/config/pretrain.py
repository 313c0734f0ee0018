"""Settings of `crate-ray pretrain`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, PositiveInt, RunName, Settings
from crate_ray.config.data import DataConfig
from crate_ray.config.evaluate import Feature
from crate_ray.config.models import CrateMAEConfig, ModelConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.training import (
    CheckpointConfig,
    OptimConfig,
    ScalingConfig,
    TrackingConfig,
    TrainingConfig,
    check_step,
)


class OnlineProbeConfig(Settings):
    """Labelled datasets on which the encoder's features are measured while it trains.

    Measured are the accuracy of k-NN and of a linear probe, and the effective rank of the features (RankMe, arXiv
    2210.02885). A process of low priority measures the checkpoints on the driver's node; the workers do not wait.
    """

    train: str
    """Local folder or s3://bucket/prefix of labelled shards (member `cls`), which k-NN and the linear probe learn
    from."""
    test: str
    """Labelled shards to measure the accuracy on."""
    every: Advanced[PositiveInt | None] = None
    """Steps between measurements; a checkpoint is saved for each. By default, each checkpoint is measured. If measuring
    takes longer than that, only the newest checkpoint is measured."""
    feature: Advanced[Feature] = "mean"
    """Feature of an image: 'mean' of the encoder's patch tokens, or the CLS token 'cls'."""
    max_samples: Advanced[PositiveInt] = 2_000
    """Largest number of samples of each dataset to use, spread evenly over it."""


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
    probe: OnlineProbeConfig | None = None
    """Labelled datasets on which the encoder's features are measured while it trains; off by default."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and its learning rate."""
    scaling: ScalingConfig = ScalingConfig()
    """Ray Train workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is saved."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        check_step(self.training, self.optim)
        return self

    @model_validator(mode="after")
    def _check_decoder(self) -> Self:
        if self.model.decoder_depth == 0:
            raise ValueError("model.decoder_depth 0 is an encoder alone, which cannot be pretrained; give it layers")
        return self

    @model_validator(mode="after")
    def _check_keep_best(self) -> Self:
        by = self.checkpoint.keep_best_by
        if by != "validation_loss" and self.probe is None:
            raise ValueError(f"checkpoint.keep_best_by {by!r} compares accuracies; set probe.train and probe.test")
        if self.checkpoint.keep_best and by == "validation_loss" and not self.data.validation:
            raise ValueError("checkpoint.keep_best compares validation losses; set data.validation")
        return self
