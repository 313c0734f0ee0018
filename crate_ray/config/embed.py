"""Settings of `crate-ray embed`."""

from __future__ import annotations

from crate_ray.config.base import Advanced, Fraction, PositiveInt, Settings
from crate_ray.config.evaluate import Feature
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class EmbedConfig(Settings):
    """Embed every sample of a dataset with a trained encoder, into Parquet files with the samples' keys."""

    model: str = "models:/crate-mae@champion"
    """Model to embed with: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation loss), a
    checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors)."""
    data: str
    """Dataset: local folder or s3://bucket/prefix of prepared shards."""
    output: str
    """Local folder or s3://bucket/prefix for the Parquet files."""
    feature: Feature = "mean"
    """mean: average of the encoder's patch tokens. cls: its CLS token."""
    workers: PositiveInt = 1
    """Number of encoders that run in parallel, each on one CPU or one GPU."""
    gpu: bool = False
    """Run each encoder on a GPU."""
    batch_size: PositiveInt = 256
    """Samples per forward pass. Each Parquet file holds at least this many."""
    max_bad_fraction: Advanced[Fraction] = 0.01
    """Largest share of bad samples. They are skipped and reported; above this share the job stops."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, for models:/ and runs:/."""
    s3: S3Config = S3Config()
    """Object storage."""
