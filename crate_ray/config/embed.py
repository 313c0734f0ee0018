"""Settings of `crate-ray embed`."""

from __future__ import annotations

from typing import Literal

from crate_ray.config.base import Advanced, Fraction, PositiveInt, Settings
from crate_ray.config.export import ExportFeature
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig

EmbeddingFormat = Literal["parquet", "npy-shards"]
EmbeddingType = Literal["float32", "float16"]


class EmbedConfig(Settings):
    """Embed every sample of a dataset with a trained encoder, into Parquet files with the samples' keys.

    A job that was stopped goes on when it is started again.
    """

    model: str = "models:/crate-mae@champion"
    """Model to embed with: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation loss), a
    checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors)."""
    data: str
    """Dataset: local folder or s3://bucket/prefix of prepared shards."""
    output: str
    """Local folder or s3://bucket/prefix for the files."""
    feature: ExportFeature = "mean"
    """mean: average of the encoder's patch tokens. cls: its CLS token. patch: all patch tokens, N × d numbers. The
    features of a fine-tuned classifier are those of its encoder's last layer."""
    workers: PositiveInt | None = None
    """Number of encoders that run in parallel on Ray, each on one CPU or one GPU. Default: none if this process can do
    the work in about ten minutes, else one on each CPU or GPU of the cluster."""
    gpu: bool | None = None
    """Compute on GPUs; by default if there are any."""
    dtype: EmbeddingType = "float32"
    """Type of the numbers in the files. float16 halves their size."""
    format: Advanced[EmbeddingFormat] = "parquet"
    """parquet: a table. npy-shards: tar files with a .npy array for each sample, which WebDataset reads."""
    batch_size: Advanced[PositiveInt] = 256
    """Samples per forward pass."""
    part_samples: Advanced[PositiveInt | None] = None
    """Samples per file. Default: 50,000, or fewer if a file would exceed 128 MiB, take an encoder longer than ten
    minutes, or leave encoders without work."""
    max_bad_fraction: Advanced[Fraction] = 0.01
    """Largest share of bad samples. They are skipped and reported; above this share the job stops."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, for models:/ and runs:/."""
    s3: S3Config = S3Config()
    """Object storage."""
