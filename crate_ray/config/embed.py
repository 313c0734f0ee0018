"""Settings of `crate-ray embed`."""

from __future__ import annotations

from crate_ray.config.base import PositiveInt, Settings
from crate_ray.config.evaluate import Feature
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class EmbedConfig(Settings):
    """Embed every sample of a dataset with a trained encoder; Parquet files with sample keys come out."""

    model: str = "models:/crate-mae@champion"
    """Model that embeds: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation loss), a
    checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors)."""
    data: str
    """Local folder or s3://bucket/prefix of the shards, with manifest."""
    output: str
    """Local folder or s3://bucket/prefix for the Parquet files."""
    feature: Feature = "mean"
    """'mean' of the encoder's patch tokens, or its CLS token 'cls'."""
    workers: PositiveInt = 1
    """Encoders that work at the same time, each on one CPU (or one GPU)."""
    gpu: bool = False
    """Put each encoder on a GPU."""
    batch_size: PositiveInt = 256
    """Samples per task; one Parquet file holds at least as many."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""
