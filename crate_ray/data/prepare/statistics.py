"""What samples are: each is decoded once when it is packed or indexed, and their shape and statistics are gathered.

Parts of a dataset are measured apart and merged, in the order of the shards.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict

from crate_ray.data.decode.samples import DecodeError, read_image_header, to_eight_bits
from crate_ray.data.format import npy
from crate_ray.data.format.names import IMAGE_SUFFIXES
from crate_ray.errors import UserError, first_few

logger = logging.getLogger(__name__)

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MEASURED_SAMPLES = 2048
"""At most this many samples are measured for mean and standard deviation."""

_NUMBERED_SUFFIX = re.compile(r"\d[\d.]*\.(jpe?g|png|webp|npy)")
_REPORTED_NAMES = 10
_REPORTED_UNSAFE = 100
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "F")


class BadSample(Exception):  # noqa: N818
    """A sample that cannot be decoded; packing goes on without it."""


def image_suffix(suffixes: Iterable[str]) -> str | None:
    """The suffix under which a sample with these suffixes holds its image or grid; images are preferred."""
    present = set(suffixes)
    return next((suffix for suffix in (*IMAGE_SUFFIXES, "npy") if suffix in present), None)


class Measured(NamedTuple):
    """One sample: shape, and mean of values and of their squares per channel where measured."""

    channels: int
    size: tuple[int, int]
    """Height, width; upright, as training sees the picture."""
    mean: NDArray[np.float64] | None
    square: NDArray[np.float64] | None


def channels_of(image: Image.Image) -> int:
    """1 for a grayscale picture, 3 for any other."""
    return 1 if image.mode in _GRAY_MODES else 3


def measure_image(content: bytes, *, measure: bool = True, reduce: bool = True) -> tuple[Image.Image, Measured]:
    """Decode a JPEG, PNG or WebP image; nothing else is tried.

    Args:
        content: the encoded image.
        measure: compute its statistics on the scale 0-1 too.
        reduce: decode large JPEGs at a smaller scale of at least 256 pixels, for statistics only.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        header = read_image_header(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        if sorted(image.size) != sorted(header[:2]):  # upright or not
            raise BadSample("the image is damaged: it has two sizes")
        if reduce:
            image.draft(None, (256, 256))
        image.load()
        channels = channels_of(image)
        if not measure:
            return image, Measured(channels, header[:2], None, None)
        eight_bits = to_eight_bits(image).convert("L" if channels == 1 else "RGB")
        histogram = np.array(eight_bits.histogram(), np.float64).reshape(-1, 256)
    except UnidentifiedImageError:
        raise BadSample("not a JPEG, PNG or WebP image") from None
    except (DecodeError, OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise BadSample(str(error)) from None
    share = histogram / histogram.sum(1, keepdims=True)
    values = np.arange(256) / 255
    return image, Measured(channels, header[:2], share @ values, share @ values**2)


def measure_grid(content: bytes, *, measure: bool = True) -> Measured:
    """Check a .npy array of shape (C, H, W) or (H, W) and compute its statistics.

    Raises:
        BadSample: it is no such array of finite numbers.
    """
    if not content.startswith(npy.MAGIC):
        raise BadSample("not a .npy array")
    try:
        array = npy.read(content)
    except ValueError as error:
        raise BadSample(f"not a readable .npy array: {error}") from None
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or not array.size:
        raise BadSample(f"an array of {array.dtype} of shape {array.shape}, not numbers of shape (C, H, W) or (H, W)")
    if not np.isfinite(array).all():
        raise BadSample("the array holds infinities or NaN")
    grid = array[None] if array.ndim == 2 else array
    size = (int(grid.shape[1]), int(grid.shape[2]))
    if not measure:
        return Measured(len(grid), size, None, None)
    flat = grid.reshape(len(grid), -1).astype(np.float64)
    return Measured(len(grid), size, flat.mean(1), (flat**2).mean(1))


class Measurement(BaseModel):
    """Shape and statistics of a dataset or a part of it, gathered from samples."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    count: int = 0
    """Samples whose statistics were measured."""
    channels: list[int] = []
    """All numbers of channels that occur, ascending."""
    sizes: list[tuple[int, int]] = []
    """The first one or two sizes that occur."""
    mean: list[float] = []
    """Weighted sum of the samples' means, per channel."""
    square: list[float] = []
    """The same of the means of squares."""
    weight: float = 0.0

    def add(self, sample: Measured, weight: float = 1.0) -> None:
        """Add a sample; of one that was not measured, only the shape counts."""
        statistics = {}
        if sample.mean is not None and sample.square is not None:
            mean, square = (weight * sample.mean).tolist(), (weight * sample.square).tolist()
            statistics = {"count": 1, "mean": mean, "square": square, "weight": weight}
        self.merge(Measurement.model_construct(channels=[sample.channels], sizes=[sample.size], **statistics))

    def merge(self, other: Measurement) -> None:
        """Add what was gathered from another part."""
        for size in other.sizes:
            if len(self.sizes) < 2 and size not in self.sizes:
                self.sizes = [*self.sizes, size]
        if not set(other.channels) <= set(self.channels):
            self.channels = sorted({*self.channels, *other.channels})
        if other.count:
            self.count += other.count
            self.weight += other.weight
            self.mean, self.square = _sum(self.mean, other.mean), _sum(self.square, other.square)

    def describe(self) -> dict[str, Any]:
        """Fields of the manifest."""
        channels = self.channels[-1]
        mean = np.resize(self.mean, channels) / self.weight
        std = np.sqrt(np.maximum(np.resize(self.square, channels) / self.weight - mean**2, 0))
        size = self.sizes[0] if len(self.sizes) == 1 else (None, None)
        return {
            "channels": channels,
            "height": size[0],
            "width": size[1],
            "mean": tuple(float(f"{value:.6g}") for value in mean),
            "std": tuple(float(f"{value:.6g}") for value in std),
            "num_measured": self.count,
        }


def _sum(first: list[float], second: list[float]) -> list[float]:
    """Sum per channel; a grayscale picture has three equal channels among coloured ones."""
    if not first:
        return list(second)
    channels = max(len(first), len(second))
    return [float(value) for value in np.resize(first, channels) + np.resize(second, channels)]


class SampleCounts(BaseModel):
    """Which members and labels all samples of a dataset or a part of it have."""

    model_config = ConfigDict(extra="forbid")

    samples: int = 0
    suffixes: set[str] = set()
    images: set[str] = set()
    """Suffixes under which samples hold their image or grid."""
    labelled: int = 0
    max_label: int = -1
    without_image: int = 0
    without_image_names: list[str] = []
    """The first few."""
    num_unsafe: int = 0
    unsafe_names: list[str] = []
    """As in the manifest."""

    def add(self, members: Iterable[str], label: bytes | None, key: str = "") -> None:
        """Add a sample: its suffixes, the content of its `cls` member, its key."""
        self.samples += 1
        self.suffixes.update(members)
        suffix = image_suffix(members)
        if suffix is not None:
            self.images.add(suffix)
        else:
            self.without_image += 1
            if len(self.without_image_names) < _REPORTED_NAMES:
                self.without_image_names.append(key)
        if label is not None and label.strip().isdigit():
            self.labelled += 1
            self.max_label = max(self.max_label, int(label))

    def add_unsafe(self, names: Sequence[str]) -> None:
        """Add members with unsafe names, each behind its shard's name."""
        self.num_unsafe += len(names)
        # Bytes that are no UTF-8 cannot be written to JSON.
        named = [name.encode("utf-8", "backslashreplace").decode() for name in names[:_REPORTED_UNSAFE]]
        self.unsafe_names = [*self.unsafe_names, *named][:_REPORTED_UNSAFE]

    def merge(self, other: SampleCounts) -> None:
        """Add what was counted in another part."""
        self.samples += other.samples
        self.suffixes |= other.suffixes
        self.images |= other.images
        self.labelled += other.labelled
        self.max_label = max(self.max_label, other.max_label)
        self.without_image += other.without_image
        self.without_image_names = (self.without_image_names + other.without_image_names)[:_REPORTED_NAMES]
        self.num_unsafe += other.num_unsafe
        self.unsafe_names = (self.unsafe_names + other.unsafe_names)[:_REPORTED_UNSAFE]

    def describe(self, uri: str) -> dict[str, Any]:
        """Fields of the manifest; warnings and errors where samples do not agree."""
        numbered = sorted(suffix for suffix in self.suffixes if _NUMBERED_SUFFIX.fullmatch(suffix))
        hint = (
            f" (suffixes such as {numbered[0]!r} come from dots within file names: in WebDataset the key ends at the "
            "first dot, so files may have merged into one sample)"
            if numbered
            else ""
        )
        if not self.images:
            raise UserError(
                f"no sample under {uri} has an image or grid but {', '.join(sorted(self.suffixes)) or 'nothing'}; "
                f"wanted is one of {', '.join((*IMAGE_SUFFIXES, 'npy'))}{hint}"
            )
        if "npy" in self.images and len(self.images) > 1:
            raise UserError(f"{uri} mixes samples with images and samples with .npy grids; make two datasets of them")
        if self.without_image:
            names = first_few(self.without_image_names, self.without_image)
            logger.warning(
                "%d of %d samples have no image or grid: %s%s", self.without_image, self.samples, names, hint
            )
        elif numbered:
            logger.warning("%s%s", uri, hint)
        return {
            "kind": "grid" if "npy" in self.images else "image",
            "image_suffixes": tuple(suffix for suffix in (*IMAGE_SUFFIXES, "npy") if suffix in self.images),
            "suffixes": tuple(sorted(self.suffixes)),
            "num_classes": self.max_label + 1 if self.labelled == self.samples else None,
            "num_unsafe": self.num_unsafe,
            "unsafe_names": tuple(self.unsafe_names),
        }
