"""Settings of `crate-ray prepare`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from crate_ray.config.base import Advanced, PositiveInt, Settings
from crate_ray.config.storage import S3Config


class PrepareConfig(Settings):
    """Pack images into WebDataset shards with a manifest and an index, or index the shards that are already there."""

    source: str | None = None
    """What to pack: a folder (or s3://bucket/prefix) of images or .npy grids, class folders optional, or of .tar shards
    to repack; or the built-in 'digits' (scikit-learn's, 8×8, 1 channel) or 'shapes' (procedural, with masks). Not set:
    index the shards under output."""
    output: str
    """Local folder or s3://bucket/prefix of the dataset: shards, index and manifest."""
    shards: str = "*.tar"
    """Which shards to index or to repack: 'train-*.tar', 'train-{00000..00049}.tar', '{train,extra}-*.tar'; all that
    braces stand for must be there. To index shards elsewhere, which are only read, their address, such as
    's3://bucket/cifar10/train-{00000..00049}.tar' or '/data/cifar10/*.tar'."""
    split: Literal["all", "train", "test"] = "all"
    """Part of a built-in dataset: every sample, or the fixed 80 % for training or 20 % for testing."""
    num_samples: PositiveInt = 2000
    """Number of samples of the procedural 'shapes' set."""
    image_size: PositiveInt = 64
    """Image side of the procedural 'shapes' set, in pixels."""
    shard_bytes: Advanced[PositiveInt] = 256 * 2**20
    """Start a new shard when the current one reaches this many bytes, after a multiple of 16 samples."""
    shard_samples: Advanced[PositiveInt] = 10_000
    """Start a new shard when the current one holds this many samples."""
    shuffle: Advanced[bool] = True
    """Pack the samples in a random order (fixed by seed), so that neighbours in a shard are unrelated."""
    seed: Advanced[int] = 0
    """Seed of the packing order and of the procedural set."""
    max_side: Annotated[PositiveInt | None, Field(validation_alias=AliasChoices("max_side", "max-side"))] = None
    """Largest shortest side in pixels: while packing, an image whose shortest side is longer is encoded anew with this
    shortest side (antialiased, upright, without metadata), its mask.png with it. Smaller ones stay byte for byte. By
    default nothing is encoded anew. Usual are 256 to 480."""
    quality: Advanced[Annotated[int, Field(ge=1, le=100)]] = 90
    """Quality of JPEGs and WebPs that max_side encodes anew, 1 to 100; PNGs stay PNGs."""
    overwrite: bool = False
    """Replace a dataset, or the beginning of another one, that is already under output."""
    lease_seconds: Advanced[Annotated[float, Field(ge=1)]] = 30.0
    """One process at a time writes to an output. One that was killed keeps it for so many seconds; they must be longer
    than any stall of the machine or the store."""
    s3: S3Config = S3Config()
    """Object storage."""
