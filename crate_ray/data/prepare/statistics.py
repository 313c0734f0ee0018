"""Shapes, mean, standard deviation, suffixes and labels of a dataset, gathered while it is packed or indexed.

Each shard is measured on its own; the results are merged in the order of the shards.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from crate_ray.config.identifiers import Count
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.pillow import to_eight_bits
from crate_ray.data.decode.samples import read_image_header
from crate_ray.data.format import npy
from crate_ray.data.format.names import IMAGE_SUFFIXES
from crate_ray.errors import UserError, first_few

logger = logging.getLogger(__name__)

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
STATISTICS_SAMPLES = 2048
"""Mean and standard deviation are computed from at most this many samples."""

_NUMBERED_SUFFIX = re.compile(r"\d[\d.]*\.(jpe?g|png|webp|npy)")
_REPORTED_NAMES = 10
_REPORTED_UNSAFE = 100
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "F")


class BadSample(Exception):  # noqa: N818
    """A sample cannot be decoded. Packing skips it."""


def image_suffix(suffixes: Iterable[str]) -> str | None:
    """The suffix under which a sample with these suffixes holds its image, or else its grid."""
    present = set(suffixes)
    return next((suffix for suffix in (*IMAGE_SUFFIXES, "npy") if suffix in present), None)


class SampleStatistics(NamedTuple):
    """Shape of a sample and, if computed, mean and mean square per channel."""

    channels: int
    size: tuple[int, int]
    """Height and width of the upright image, as training sees it."""
    mean: NDArray[np.float64] | None
    square: NDArray[np.float64] | None


def channels_of(image: Image.Image) -> int:
    """1 for a grayscale image, 3 for any other."""
    return 1 if image.mode in _GRAY_MODES else 3


def image_statistics(
    content: bytes, *, moments: bool = True, reduce: bool = True
) -> tuple[Image.Image, SampleStatistics]:
    """Decode a JPEG, PNG or WebP image, and no other format.

    Args:
        content: the encoded image.
        moments: compute mean and mean square, on the scale 0-1.
        reduce: decode large JPEGs at a smaller scale, of at least 256 pixels; enough for statistics.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        header = read_image_header(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        if sorted(image.size) != sorted(header[:2]):  # upright or not
            raise BadSample("the image is damaged: its headers give two sizes")
        if reduce:
            image.draft(None, (256, 256))
        image.load()
        channels = channels_of(image)
        if not moments:
            return image, SampleStatistics(channels, header[:2], None, None)
        eight_bits = to_eight_bits(image).convert("L" if channels == 1 else "RGB")
        histogram = np.array(eight_bits.histogram(), np.float64).reshape(-1, 256)
    except UnidentifiedImageError:
        raise BadSample("not a JPEG, PNG or WebP image") from None
    except (DecodeError, OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise BadSample(str(error)) from None
    share = histogram / histogram.sum(1, keepdims=True)
    values = np.arange(256) / 255
    return image, SampleStatistics(channels, header[:2], share @ values, share @ values**2)


def grid_statistics(content: bytes, *, moments: bool = True) -> SampleStatistics:
    """Check a .npy array of shape (C, H, W) or (H, W).

    Args:
        content: the .npy file.
        moments: compute mean and mean square.

    Raises:
        BadSample: it has another shape, or holds something other than finite numbers.
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
    if not moments:
        return SampleStatistics(len(grid), size, None, None)
    flat = grid.reshape(len(grid), -1).astype(np.float64)
    return SampleStatistics(len(grid), size, flat.mean(1), (flat**2).mean(1))


class DatasetStatistics(BaseModel):
    """Shape, mean and standard deviation of a dataset or a part of it."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    count: Count = 0
    """Number of samples whose moments were computed."""
    channels: list[PositiveInt] = []
    """The numbers of channels found, ascending."""
    sizes: list[tuple[int, int]] = []
    """The first two sizes found, or the only one."""
    mean: list[float] = []
    """Weighted sum of the samples' means, per channel."""
    square: list[float] = []
    """Weighted sum of the samples' mean squares, per channel."""
    weight: float = 0.0

    def add(self, sample: SampleStatistics, weight: float = 1.0) -> None:
        """Add a sample; without moments, only its shape counts."""
        statistics = {}
        if sample.mean is not None and sample.square is not None:
            mean, square = (weight * sample.mean).tolist(), (weight * sample.square).tolist()
            statistics = {"count": 1, "mean": mean, "square": square, "weight": weight}
        self.merge(DatasetStatistics.model_construct(channels=[sample.channels], sizes=[sample.size], **statistics))

    def merge(self, other: DatasetStatistics) -> None:
        """Add the statistics of another part."""
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
        """The manifest's fields for channels, size, mean and std."""
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
    """Sum per channel. If only one of the two has colour, the grayscale one counts as three equal channels."""
    if not first:
        return list(second)
    channels = max(len(first), len(second))
    return [float(value) for value in np.resize(first, channels) + np.resize(second, channels)]


class SampleCounts(BaseModel):
    """Suffixes and labels of all samples of a dataset or a part of it."""

    model_config = ConfigDict(extra="forbid")

    samples: Count = 0
    suffixes: set[str] = set()
    images: set[str] = set()
    """Suffixes under which samples hold their image or grid."""
    labelled: Count = 0
    max_label: Annotated[int, Field(ge=-1)] = -1
    without_image: Count = 0
    without_image_names: list[str] = []
    """The first ten."""
    num_unsafe: Count = 0
    unsafe_names: list[str] = []
    """As in the manifest."""

    def add(self, members: Iterable[str], label: bytes | None, key: str = "") -> None:
        """Add a sample by its suffixes, the content of its `cls` member, and its key."""
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
        """Add members with unsafe names, each after its shard's name."""
        self.num_unsafe += len(names)
        # Names that are not UTF-8 cannot be written to JSON.
        named = [name.encode("utf-8", "backslashreplace").decode() for name in names[:_REPORTED_UNSAFE]]
        self.unsafe_names = [*self.unsafe_names, *named][:_REPORTED_UNSAFE]

    def merge(self, other: SampleCounts) -> None:
        """Add the counts of another part."""
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
        """The manifest's fields for kind, suffixes and classes. Logs a warning if samples disagree.

        Raises:
            UserError: no sample has an image or grid, or some have images and some grids.
        """
        numbered = sorted(suffix for suffix in self.suffixes if _NUMBERED_SUFFIX.fullmatch(suffix))
        hint = (
            f" (suffixes such as {numbered[0]!r} come from dots within file names: WebDataset ends the key at the "
            "first dot, so several files may have become one sample)"
            if numbered
            else ""
        )
        if not self.images:
            raise UserError(
                f"no sample under {uri} has an image or grid, only {', '.join(sorted(self.suffixes)) or 'nothing'}; "
                f"one of {', '.join((*IMAGE_SUFFIXES, 'npy'))} is needed{hint}"
            )
        if "npy" in self.images and len(self.images) > 1:
            raise UserError(f"{uri} holds samples with images and samples with .npy grids; make them two datasets")
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
