"""Settings of `crate-ray prepare`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, StringConstraints

from crate_ray.bounded import MAX_LEASE_SECONDS
from crate_ray.config.base import Advanced, PositiveInt, Settings
from crate_ray.config.data import DataConfig
from crate_ray.config.storage import S3Config

_MAX_PIXELS = DataConfig.model_fields["max_pixels"].default


class PrepareConfig(Settings):
    """Pack images into WebDataset shards with a manifest and an index, or index existing shards."""

    source: str | None = None
    """Samples to pack: a folder or s3://bucket/prefix of images or .npy grids (class folders optional), or of .tar
    shards to repack; or a built-in set: 'digits' (scikit-learn's, 8×8, 1 channel), 'shapes' (procedural, with masks) or
    'plain-shapes' (the same without textures and clutter). If not set, the shards under output are indexed in place."""
    output: str
    """Local folder or s3://bucket/prefix for the dataset: shards, index and manifest."""
    validation: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Hold out this share of the samples, such as 0.1: they are packed into OUTPUT/validation, all others into
    OUTPUT/train. A hash of the sample's name and the seed decides which ones."""
    shards: str = "*.tar"
    """Shards to index or repack: 'train-*.tar', 'train-{00000..00049}.tar', '{train,extra}-*.tar'. Every alternative in
    braces must exist. To index shards in another place, which are only read, give their address:
    's3://bucket/cifar10/train-{00000..00049}.tar' or '/data/cifar10/*.tar'."""
    image: Annotated[str, StringConstraints(to_lower=True, pattern=r"^[^/\s]+$")] | None = None
    """Which member of each sample holds its image, for shards whose samples hold several: 'left.jpg', or 'left' for any
    format. Default: jpg, jpeg, png, webp or npy, in this order."""
    split: Literal["all", "train", "test"] = "all"
    """Part of a built-in set: all samples, the fixed 80 % for training, or the other 20 % for testing."""
    num_samples: PositiveInt = 2000
    """Number of samples of a set of shapes, both splits together."""
    image_size: PositiveInt = 64
    """Side of the images of a set of shapes, in pixels."""
    shard_bytes: Advanced[PositiveInt] = 256 * 2**20
    """Close a shard when it reaches this many bytes, at a multiple of 16 samples."""
    shard_samples: Advanced[PositiveInt] = 10_000
    """Largest number of samples in a shard."""
    shuffle: Advanced[bool] = True
    """Pack the samples in random order, fixed by seed, so that neighbours in a shard are unrelated."""
    seed: Advanced[int] = 0
    """Seed of the packing order, of the validation samples, and of a set of shapes."""
    max_side: Annotated[PositiveInt | None, Field(validation_alias=AliasChoices("max_side", "max-side"))] = None
    """Re-encode images whose shortest side exceeds this many pixels, so that it has this length (antialiased, upright,
    without metadata), together with their mask.png. Smaller images are stored unchanged. Not set: no image is
    re-encoded. Typical values: 256 to 480."""
    quality: Advanced[Annotated[int, Field(ge=1, le=100)]] = 90
    """Quality of JPEGs and WebPs that max_side re-encodes, 1 to 100. PNGs stay PNGs."""
    max_pixels: Advanced[PositiveInt | None] = None
    """Images with more pixels are bad samples, since they may be decompression bombs. Default: 2²⁶, as in training
    (data.max_pixels); with max_side 2²⁷, because large images are stored smaller. PNG and WebP images have at most
    178,956,970, Pillow's limit."""
    grid_axes: Advanced[Literal["auto", "CHW", "HWC"]] = "auto"
    """Order of the axes of .npy grids with three axes: channels, height, width. auto: HWC if the last axis is the
    shortest, else CHW. HWC grids are packed as CHW. A grid with two axes has one channel."""
    overwrite: bool = False
    """Replace a dataset, or an unfinished one, that is already at output."""
    lease_seconds: Advanced[Annotated[float, Field(ge=1, le=MAX_LEASE_SECONDS)]] = 30.0
    """Only one process at a time may write to an output. After it is killed, the output stays reserved for this many
    seconds. Make it longer than any pause of the machine or the store."""
    s3: S3Config = S3Config()
    """Object storage."""

    @property
    def largest_image(self) -> int:
        """max_pixels or its default."""
        return self.max_pixels or (_MAX_PIXELS if self.max_side is None else 2 * _MAX_PIXELS)
