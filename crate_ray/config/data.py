"""Settings of what a run reads: which samples, in which order, and how they become batches."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, Fraction, PositiveInt, Settings


class DataConfig(Settings):
    """What to train on, in which order, and how samples become batches."""

    train: Annotated[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)] | str
    """Local folder or s3://bucket/prefix with the training shards, as written or indexed by jobs/prepare.py. Or several
    of them with the share that each has in every batch, in proportion: {s3://data/photos: 3, s3://data/drawings: 1}."""
    validation: str | None = None
    """The same for held-out samples; masked validation loss and pictures come from them."""
    shuffle: Advanced[bool] = True
    """Read in the epoch's pseudo-random order; false keeps the order of the shards."""
    block_samples: Advanced[PositiveInt | None] = None
    """Samples b that are always read together, as one ranged GET. By default 1 for data that fits memory_bytes, else as
    many as make about 2 MiB."""
    window_blocks: Advanced[PositiveInt | None] = None
    """Blocks g of one lane that are shuffled together. By default as many as buffer_bytes allows."""
    lanes: Advanced[PositiveInt | None] = None
    """Number L of lanes, each in another place of the epoch, that every batch is drawn from equally. By default 32, or
    what small data or a small batch has room for; 1 for data that fits memory_bytes, which needs none."""
    memory_bytes: Advanced[PositiveInt] = 2 * 2**30
    """Data up to this many bytes is kept in memory by every worker, and shuffled sample by sample."""
    buffer_bytes: Advanced[PositiveInt] = 2**30
    """Most encoded bytes that one worker has in memory while streaming: of the windows that its lanes draw from, of
    those ahead, and of batches that wait for decoding. The more there are of them, over all workers, the better data is
    shuffled that lies sorted in its shards. What the lanes draw from is fixed when a run begins: where a run goes on
    with fewer workers than it was planned for and that exceeds these bytes, the rest waits in unnamed files in
    cache_dir or the temporary folder (up to fetch_threads reads of part_bytes each are in memory on the way there), no
    window is read ahead, and a warning says so."""
    fetch_threads: Advanced[PositiveInt] = 8
    """Concurrent ranged reads per worker."""
    part_bytes: Advanced[PositiveInt] = 8 * 2**20
    """Largest ranged read: longer stretches are read in parts of about this size, in parallel."""
    cache_dir: Advanced[str | None] = None
    """Local folder that keeps what was read, for all workers of a node; none by default."""
    cache_bytes: Advanced[PositiveInt] = 50 * 2**30
    """Size limit of cache_dir; what was used longest ago makes room."""
    max_bad_fraction: Advanced[Fraction] = 0.01
    """Share of samples that may be unreadable (they are replaced and reported); above it the run stops."""
    max_pixels: Advanced[PositiveInt] = 2**26
    """Images with more pixels than this count as unreadable: they may be decompression bombs."""
    decode_threads: Advanced[PositiveInt | None] = None
    """Threads that decode and augment, per worker; by default the CPUs of the worker."""
    decode_device: Advanced[Literal["cpu", "cuda"]] = "cpu"
    """Where JPEGs are decoded: 'cuda' decodes and crops on the GPU that trains (nvJPEG; needs a torchvision that fits
    torch), for hosts whose CPUs cannot keep up. Pixels differ a little from the CPU's."""
    prefetch_batches: Advanced[PositiveInt] = 4
    """Batches to have decoded ahead of the training step."""
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Random resized crop: smallest and largest share of the image's area. [1, 1] keeps the centre, as large as the
    aspect ratio of the model's image allows."""
    crop_ratio: Advanced[tuple[float, float]] = (3 / 4, 4 / 3)
    """Random resized crop: smallest and largest aspect ratio (width / height)."""
    flip: bool = True
    """Mirror every other sample left to right."""
    mean: Advanced[tuple[float, ...] | None] = None
    """Mean per channel that is subtracted, for images on the scale 0 to 1; the dataset's own by default."""
    std: Advanced[tuple[float, ...] | None] = None
    """Standard deviation per channel that is divided by; the dataset's own by default."""

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if min(self.crop_ratio) <= 0:
            raise ValueError(f"crop_ratio is {list(self.crop_ratio)}; aspect ratios are positive")
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} is {[low, high]}; give the smaller number first")
        return self
