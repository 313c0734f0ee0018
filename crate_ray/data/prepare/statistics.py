"""Shapes, mean, standard deviation, suffixes and labels of a dataset, gathered while it is packed or indexed.

Each shard is measured on its own; the results are merged in the order of the shards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from crate_ray.bounded import MAX_MEMBER_BYTES
from crate_ray.config.identifiers import Count
from crate_ray.data.decode.arrays import open_grid
from crate_ray.data.decode.errors import MAX_PIXELS, DecodeError
from crate_ray.data.decode.pillow import ImageFormat
from crate_ray.data.decode.room import room_for
from crate_ray.data.decode.samples import WholeImage, decode_whole
from crate_ray.data.format.names import IMAGE_SUFFIXES, printable
from crate_ray.errors import UserError, first_few

logger = logging.getLogger(__name__)

STATISTICS_SAMPLES = 2048
"""Mean and standard deviation are computed from at most this many samples."""

_NUMBERED_SUFFIX = re.compile(r"\d[\d.]*\.(jpe?g|png|webp|npy)")
_REPORTED_NAMES = 10
_SHOWN_CHARACTERS = 300
_MAX_SUFFIXES = 1000
_KNOWN_SUFFIXES = frozenset({*IMAGE_SUFFIXES, "npy", "cls", "mask.png"})
_REPORTED_UNSAFE = 100
_REDUCED_SIDE = 256


class BadSample(Exception):  # noqa: N818
    """A sample cannot be used. Packing skips it."""


def bad_sample(name: str, cause: object) -> str:
    """A bad sample and the cause, for records and messages."""
    return printable(f"{name[:_SHOWN_CHARACTERS]} ({str(cause)[:_SHOWN_CHARACTERS]})")


def checked_size(size: int) -> int:
    """The size of a member in bytes. Raises BadSample if it is larger than any that is read."""
    if size > MAX_MEMBER_BYTES:
        raise BadSample(f"it has {size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
    return size


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


def image_statistics(
    content: bytes, *, moments: bool = True, reduce: bool = True
) -> tuple[ImageFormat, SampleStatistics]:
    """Decode a JPEG, PNG or WebP image, as training does. Returns its format and statistics.

    Args:
        content: the encoded image.
        moments: compute mean and mean square, on the scale 0-1.
        reduce: decode large JPEGs at a smaller scale, of at least 256 pixels; enough for statistics.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        with decode_whole(content, reduced_side=_REDUCED_SIDE if reduce else None) as image:
            return image.format, statistics_of(image, moments=moments)
    except (DecodeError, MemoryError) as error:
        raise BadSample(str(error)) from None


def statistics_of(image: WholeImage, *, moments: bool) -> SampleStatistics:
    """Statistics of a decoded image."""
    channels = image.pixels.shape[2]
    if not moments:
        return SampleStatistics(channels, image.size, None, None)
    histogram = np.array(as_picture(image).histogram(), np.float64).reshape(-1, 256)
    share = histogram / histogram.sum(1, keepdims=True)
    values = np.arange(256) / 255
    return SampleStatistics(channels, image.size, share @ values, share @ values**2)


def as_picture(image: WholeImage) -> Image.Image:
    """A decoded image for Pillow."""
    return Image.fromarray(image.pixels[:, :, 0] if image.pixels.shape[2] == 1 else image.pixels)


def grid_statistics(content: bytes, *, moments: bool = True) -> SampleStatistics:
    """Check a .npy array of shape (C, H, W) or (H, W), as training does.

    Args:
        content: the .npy file.
        moments: compute mean and mean square.

    Raises:
        BadSample: it has another shape, or holds something other than finite float32 numbers.
    """
    try:
        grid = open_grid(content, None, MAX_PIXELS)
        with room_for(grid.num_bytes + 16 * grid.hw[0] * grid.hw[1]):
            array = grid.whole(grid.channels)
            if not moments:
                return SampleStatistics(grid.channels, grid.hw, None, None)
            mean = np.array([plane.mean(dtype=np.float64) for plane in array])
            square = np.array([np.square(plane, dtype=np.float64).mean() for plane in array])
    except (DecodeError, MemoryError) as error:
        raise BadSample(str(error)) from None
    return SampleStatistics(grid.channels, grid.hw, mean, square)


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

    def add(self, members: Iterable[str], label: int | None, key: str = "") -> None:
        """Add a sample by its suffixes, its class, and its key.

        A class below 0 stands for one that cannot be used. The dataset may have classes all the same.
        """
        self.samples += 1
        for member in members:
            if len(self.suffixes) < _MAX_SUFFIXES or member in _KNOWN_SUFFIXES:
                self.suffixes.add(printable(member[:_SHOWN_CHARACTERS]))
        suffix = image_suffix(members)
        if suffix is not None:
            self.images.add(suffix)
        else:
            self.without_image += 1
            if len(self.without_image_names) < _REPORTED_NAMES:
                self.without_image_names.append(printable(key[:_SHOWN_CHARACTERS]))
        if label is not None:
            self.labelled += 1
            self.max_label = max(self.max_label, label)

    def add_unsafe(self, names: Sequence[str]) -> None:
        """Add members with unsafe names, each after its shard's name."""
        self.num_unsafe += len(names)
        named = [printable(name[:_SHOWN_CHARACTERS]) for name in names[:_REPORTED_UNSAFE]]
        self.unsafe_names = [*self.unsafe_names, *named][:_REPORTED_UNSAFE]

    def merge(self, other: SampleCounts) -> None:
        """Add the counts of another part."""
        self.samples += other.samples
        self.suffixes.update(sorted(other.suffixes)[:_MAX_SUFFIXES], other.suffixes & _KNOWN_SUFFIXES)
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
