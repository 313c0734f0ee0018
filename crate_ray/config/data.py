"""Settings of the data that a run reads."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, Fraction, PositiveInt, Settings


class DataConfig(Settings):
    """Training data, its order, and how samples become batches."""

    train: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | str
    """Training dataset: local folder or s3://bucket/prefix of prepared shards. Or several datasets with their relative
    shares of every batch: {s3://data/photos: 3, s3://data/drawings: 1}. On the command line also
    s3://data/photos=3,s3://data/drawings=1."""
    validation: str | None = None
    """Held-out dataset for the masked validation loss and the pictures."""
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Random resized crop: smallest and largest share of the image's area. [1, 1] takes the largest centre crop."""
    flip: bool = True
    """Mirror images left to right with probability 1/2."""
    crop_ratio: Advanced[tuple[float, float]] = (3 / 4, 4 / 3)
    """Random resized crop: smallest and largest aspect ratio (width / height)."""
    mean: Advanced[tuple[float, ...] | None] = None
    """Mean per channel to subtract, of images in 0 … 1. Default: the dataset's mean."""
    std: Advanced[tuple[Annotated[float, Field(gt=0)], ...] | None] = None
    """Standard deviation per channel to divide by. Default: the dataset's."""
    shuffle: Advanced[bool] = True
    """Read in a pseudo-random order. false: in the order of the shards."""
    max_bad_fraction: Advanced[Fraction] = 0.01
    """Largest share of bad samples. They are replaced and reported; above this share the run stops."""
    max_pixels: Advanced[PositiveInt] = 2**26
    """Images with more pixels are bad samples, since they may be decompression bombs."""
    memory_bytes: Advanced[PositiveInt] = 2 * 2**30
    """A dataset of up to this size is kept in memory by every worker, and shuffled sample by sample. A larger one is
    streamed."""
    buffer_bytes: Advanced[PositiveInt] = 2**30
    """Limit on the encoded bytes that a worker keeps in memory while streaming: the windows its lanes draw from,
    windows read ahead, and batches that wait for decoding. A larger buffer shuffles better. If the lanes' windows need
    more, for example after a resume on fewer workers, the rest goes to unnamed files in cache_dir or the temporary
    folder, and a warning is logged."""
    block_samples: Advanced[PositiveInt | None] = None
    """Samples b per block; a block is read with one ranged GET. Default: 1 if the data fits in memory_bytes, else about
    2 MiB of samples."""
    window_blocks: Advanced[PositiveInt | None] = None
    """Blocks g of a lane that are shuffled together. Default: as many as buffer_bytes has room for."""
    lanes: Advanced[PositiveInt | None] = None
    """Number L of lanes. Each reads another part of the epoch, and every batch draws from all of them equally. Default:
    1 if the data fits in memory_bytes, else 32, or fewer for a small dataset or batch."""
    fetch_threads: Advanced[PositiveInt] = 8
    """Concurrent ranged reads per worker."""
    part_bytes: Advanced[PositiveInt] = 8 * 2**20
    """Approximate size of the largest ranged read. Longer ranges are split and read in parallel."""
    cache_dir: Advanced[str | None] = None
    """Local folder that caches the bytes that were read, shared by all workers of a node. Default: no cache."""
    cache_bytes: Advanced[PositiveInt] = 50 * 2**30
    """Size limit of cache_dir. The least recently used data is removed first."""
    decode_threads: Advanced[PositiveInt | None] = None
    """Threads per worker that decode and augment. Default: the CPUs of the worker."""
    decode_device: Advanced[Literal["cpu", "cuda"]] = "cpu"
    """cuda: decode and crop JPEGs on the training GPU (nvJPEG), for hosts whose CPUs are too slow. Needs a torchvision
    that matches torch. Pixels differ slightly from the CPU's."""
    prefetch_batches: Advanced[PositiveInt] = 4
    """Number of batches to decode ahead of the training step."""

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if min(self.crop_ratio) <= 0:
            raise ValueError(f"crop_ratio is {list(self.crop_ratio)}; aspect ratios must be positive")
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} is {[low, high]}; give the smaller number first")
        return self
