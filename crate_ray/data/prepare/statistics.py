"""Shapes, mean, standard deviation, suffixes and labels of a dataset, gathered while it is packed or indexed.

Each shard is measured on its own; the results are merged in the order of the shards.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

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

_FORMATS = (*IMAGE_SUFFIXES, "npy")
_NUMBERED_SUFFIX = re.compile(r"\d[\d.]*\.(jpe?g|png|webp|npy)")
_REPORTED_NAMES = 10
_SHOWN_CHARACTERS = 300
_SHOWN_LABEL = 20
_MAX_SUFFIXES = 1000
_KNOWN_SUFFIXES = frozenset({*IMAGE_SUFFIXES, "npy", "cls", "mask.png"})
_REPORTED_UNSAFE = 100
_REDUCED_SIDE = 256


class BadSample(Exception):  # noqa: N818
    """A sample cannot be used. Packing skips it."""


class UnreadableSample(BadSample):
    """A sample's file cannot be read. If this happens to many, something else is wrong."""


def bad_sample(name: str, cause: object) -> str:
    """A bad sample and the cause, for records and messages."""
    return printable(f"{name[:_SHOWN_CHARACTERS]} ({str(cause)[:_SHOWN_CHARACTERS]})")


def checked_size(size: int) -> int:
    """The size of a member in bytes. Raises BadSample if it is larger than any that is read."""
    if size > MAX_MEMBER_BYTES:
        raise BadSample(f"it has {size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
    return size


def image_suffix(suffixes: Iterable[str], chosen: str | None = None) -> str | None:
    """The suffix under which a sample with these suffixes holds its image, or else its grid.

    With `chosen`, such as 'left' or 'left.jpg': this suffix, or the first one that is `chosen`, a dot and a format.
    """
    present = set(suffixes)
    if chosen is None:
        wanted = _FORMATS
    else:
        wanted = (*((chosen,) if _format(chosen) in _FORMATS else ()), *(f"{chosen}.{form}" for form in _FORMATS))
    return next((suffix for suffix in wanted if suffix in present), None)


def image_members(suffixes: Iterable[str]) -> list[str]:
    """The suffixes of images and grids, without masks and those that come from dots within file names."""
    return [s for s in suffixes if _format(s) in _FORMATS and s != "mask.png" and not _NUMBERED_SUFFIX.fullmatch(s)]


def is_grid(suffix: str) -> bool:
    """Whether a member with this suffix is a grid."""
    return _format(suffix) == "npy"


def _format(suffix: str) -> str:
    """The last part of a suffix, such as 'jpg' of 'left.jpg'."""
    return suffix.rpartition(".")[2]


class SampleStatistics(NamedTuple):
    """Shape of a sample and, if computed, mean and mean square per channel."""

    channels: int
    size: tuple[int, int]
    """Height and width of the upright image, as training sees it."""
    mean: NDArray[np.float64] | None
    square: NDArray[np.float64] | None
    low: NDArray[np.float64] | None = None
    """Smallest value per channel, if mean and mean square are computed."""
    high: NDArray[np.float64] | None = None
    """Largest value per channel, likewise."""
    dtype: str | None = None
    """Type of a grid's numbers."""
    refused: str | None = None
    """Why libjpeg-turbo refuses the image, if only Pillow decodes it."""


def image_statistics(
    content: bytes, *, moments: bool = True, reduce: bool = True, max_pixels: int = MAX_PIXELS
) -> tuple[ImageFormat, SampleStatistics]:
    """Decode a JPEG, PNG or WebP image, as training does. Returns its format and statistics.

    Args:
        content: the encoded image.
        moments: compute mean and mean square, on the scale 0-1.
        reduce: decode large JPEGs at a smaller scale, of at least 256 pixels; enough for statistics.
        max_pixels: larger images are refused.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        reduced_side = _REDUCED_SIDE if reduce else None
        with decode_whole(content, max_pixels=max_pixels, reduced_side=reduced_side) as image:
            return image.format, statistics_of(image, moments=moments)
    except (DecodeError, MemoryError) as error:
        raise BadSample(str(error)) from None


def statistics_of(image: WholeImage, *, moments: bool) -> SampleStatistics:
    """Statistics of a decoded image."""
    channels = image.pixels.shape[2]
    if not moments:
        return SampleStatistics(channels, image.size, None, None, refused=image.refused)
    histogram = np.array(as_picture(image).histogram(), np.float64).reshape(-1, 256)
    share = histogram / histogram.sum(1, keepdims=True)
    values = np.arange(256) / 255
    low, high = (np.where(histogram > 0, values, end).T for end in (1.0, 0.0))
    return SampleStatistics(
        channels, image.size, share @ values, share @ values**2, low.min(0), high.max(0), refused=image.refused
    )


def as_picture(image: WholeImage) -> Image.Image:
    """A decoded image for Pillow."""
    return Image.fromarray(image.pixels[:, :, 0] if image.pixels.shape[2] == 1 else image.pixels)


def grid_statistics(content: bytes, *, moments: bool = True, max_pixels: int = MAX_PIXELS) -> SampleStatistics:
    """Check a .npy array of shape (C, H, W) or (H, W), as training does.

    Args:
        content: the .npy file.
        moments: compute mean and mean square.
        max_pixels: larger grids are refused.

    Raises:
        BadSample: it has another shape, or holds something other than finite float32 numbers.
    """
    try:
        grid = open_grid(content, None, max_pixels)
        with room_for(grid.num_bytes + 16 * grid.hw[0] * grid.hw[1]):
            array = grid.whole(grid.channels)
            if not moments:
                return SampleStatistics(grid.channels, grid.hw, None, None, dtype=grid.dtype_name)
            mean = np.array([plane.mean(dtype=np.float64) for plane in array])
            square = np.array([np.square(plane, dtype=np.float64).mean() for plane in array])
            low, high = (extreme(array, (1, 2)).astype(np.float64) for extreme in (np.min, np.max))
    except (DecodeError, MemoryError) as error:
        raise BadSample(str(error)) from None
    return SampleStatistics(grid.channels, grid.hw, mean, square, low, high, grid.dtype_name)


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
    low: list[float] = []
    """Smallest value of the measured samples, per channel."""
    high: list[float] = []
    """Largest value of the measured samples, per channel."""
    dtypes: list[str] = []
    """Types of the grids' numbers, ascending."""
    refused: Count = 0
    """Number of decoded images that libjpeg-turbo refuses, and Pillow decodes."""
    refused_names: list[str] = []
    """The first ten of them, with the cause."""

    def add(self, sample: SampleStatistics, weight: float = 1.0, name: str = "") -> None:
        """Add a sample; without moments, only its shape counts."""
        statistics: dict[str, Any] = {"dtypes": [] if sample.dtype is None else [sample.dtype]}
        if sample.mean is not None and sample.square is not None:
            mean, square = (weight * sample.mean).tolist(), (weight * sample.square).tolist()
            statistics |= {"count": 1, "mean": mean, "square": square, "weight": weight}
        if sample.low is not None and sample.high is not None:
            statistics |= {"low": sample.low.tolist(), "high": sample.high.tolist()}
        if sample.refused is not None:
            statistics |= {"refused": 1, "refused_names": [bad_sample(name, sample.refused)]}
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
            self.low, self.high = _joined(np.minimum, self.low, other.low), _joined(np.maximum, self.high, other.high)
        if not set(other.dtypes) <= set(self.dtypes):
            self.dtypes = sorted({*self.dtypes, *other.dtypes})
        self.refused += other.refused
        self.refused_names = [*self.refused_names, *other.refused_names][:_REPORTED_NAMES]

    def constants(self) -> dict[int, float]:
        """The channels that have the same value in all measured samples, with this value."""
        channels = self.channels[-1] if self.channels else 0
        pairs = zip(np.resize(self.low, channels), np.resize(self.high, channels), strict=True) if self.low else ()
        return {channel: float(low) for channel, (low, high) in enumerate(pairs) if low == high}

    def form(self, shape: tuple[int, ...], axes: Literal["CHW", "HWC"]) -> str | None:
        """What was taken of grids, in words: the order of their axes and the type of their numbers. None for images.

        Args:
            shape: of one of them, as it is stored.
            axes: order of their axes.
        """
        if not self.dtypes:
            return None
        words = {"C": "channels", "H": "height", "W": "width"}
        order = ", ".join(words[axis] for axis in axes[-len(shape) :]) if len(shape) == 3 else "height, width"
        stored = f", stored as (channels, height, width) = {(shape[2], *shape[:2])}" if axes == "HWC" else ""
        dtypes = " and ".join(self.dtypes)
        return f"grids such as {shape} are ({order}){stored}; numbers are {dtypes}, read as float32"

    def warn(self, uri: str) -> None:
        """Log what a user should know of the samples: constant channels, and images that only Pillow decodes."""
        if constants := self.constants():
            channels = self.channels[-1]
            named = [f"channel {number + 1} of {channels} is {value:g}" for number, value in constants.items()]
            logger.warning(
                "%s: some channels have the same value everywhere, in all %d samples that were measured; models see 0 "
                "there: %s", uri, self.count, first_few(named),
            )  # fmt: skip
        if self.refused:
            logger.warning(
                "%s: %d images are odd JPEGs that libjpeg-turbo refuses; Pillow decodes them, which is slower: %s",
                uri, self.refused, first_few(self.refused_names, self.refused),
            )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The manifest's fields for channels, size, mean and std."""
        channels = self.channels[-1]
        mean = np.resize(self.mean, channels) / self.weight
        std = np.sqrt(np.maximum(np.resize(self.square, channels) / self.weight - mean**2, 0))
        for channel, value in self.constants().items():  # exact: rounding errors would make it vary
            mean[channel], std[channel] = value, 0
        size = self.sizes[0] if len(self.sizes) == 1 else (None, None)
        return {
            "channels": channels,
            "height": size[0],
            "width": size[1],
            "mean": tuple(map(_rounded, mean.tolist(), std.tolist())),
            "std": tuple(float(f"{value:.6g}") for value in std),
            "num_measured": self.count,
        }


def _sum(first: list[float], second: list[float]) -> list[float]:
    """Sum per channel. If only one of the two has colour, the grayscale one counts as three equal channels."""
    if not first:
        return list(second)
    channels = max(len(first), len(second))
    return [float(value) for value in np.resize(first, channels) + np.resize(second, channels)]


def _joined(join: np.ufunc, first: list[float], second: list[float]) -> list[float]:
    """Smallest or largest values per channel. A grayscale image counts as three equal channels, as in `_sum`."""
    if not first or not second:
        return list(first or second)
    channels = max(len(first), len(second))
    return [float(value) for value in join(np.resize(first, channels), np.resize(second, channels))]


def _rounded(mean: float, std: float) -> float:
    """The mean to six digits, or more if it is so much larger than the standard deviation that they would be missed."""
    rounded = float(f"{mean:.6g}")
    return rounded if abs(rounded - mean) <= 1e-3 * std else mean


class SampleCounts(BaseModel):
    """Suffixes and labels of all samples of a dataset or a part of it."""

    model_config = ConfigDict(extra="forbid")

    samples: Count = 0
    suffixes: set[str] = set()
    images: set[str] = set()
    """Suffixes under which samples hold their image or grid."""
    labelled: Count = 0
    max_label: Annotated[int, Field(ge=-1)] = -1
    odd_labels: Count = 0
    """Samples whose `cls` is not a class number."""
    unlabelled_names: list[str] = []
    """The first ten samples without a class number, with their `cls` if they have one."""
    without_image: Count = 0
    """Samples that are left out because they have no image or grid."""
    without_image_names: list[str] = []
    """The first ten."""
    with_several: Count = 0
    """Samples with several images or grids."""
    several: set[str] = set()
    """Suffixes of images and grids, also of those that are not read."""
    named: Count = 0
    """Samples whose names in their source are stored."""
    num_unsafe: Count = 0
    unsafe_names: list[str] = []
    """As in the manifest."""

    def add(self, members: Collection[str], label: int | None, image: str) -> None:
        """Add a sample by its suffixes, its class, and the suffix of its image or grid.

        A class below 0 stands for one that cannot be used. The dataset may have classes all the same.
        """
        self.samples += 1
        self._add_suffixes(members)
        self.images.add(printable(image))
        if len(members) > 1 and self._add_images(members) > 1:
            self.with_several += 1
        if label is not None:
            self.labelled += 1
            self.max_label = max(self.max_label, label)

    def add_unlabelled(self, key: str, content: bytes | None) -> None:
        """Keep what a sample without a class number has in `cls`; None if it has no such member."""
        self.odd_labels += content is not None
        if len(self.unlabelled_names) < _REPORTED_NAMES:
            shown = "no 'cls'" if content is None else f"'cls' is {content[:_SHOWN_LABEL].decode(errors='replace')!r}"
            self.unlabelled_names.append(printable(f"{key[:_SHOWN_CHARACTERS]} ({shown})"))

    def leave_out(self, members: Collection[str], key: str) -> None:
        """Count a sample without an image or grid."""
        self._add_suffixes(members)
        self._add_images(members)
        self.without_image += 1
        if len(self.without_image_names) < _REPORTED_NAMES:
            self.without_image_names.append(printable(key[:_SHOWN_CHARACTERS]))

    def _add_suffixes(self, members: Collection[str]) -> None:
        for member in members:
            if len(self.suffixes) < _MAX_SUFFIXES or member in _KNOWN_SUFFIXES:
                self.suffixes.add(printable(member[:_SHOWN_CHARACTERS]))

    def _add_images(self, members: Collection[str]) -> int:
        """Keep the suffixes of images and grids. Returns their number."""
        found = image_members(members)
        for member in found[: _REPORTED_NAMES - len(self.several)]:
            self.several.add(printable(member[:_SHOWN_CHARACTERS]))
        return len(found)

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
        self.odd_labels += other.odd_labels
        self.unlabelled_names = (self.unlabelled_names + other.unlabelled_names)[:_REPORTED_NAMES]
        self.without_image += other.without_image
        self.without_image_names = (self.without_image_names + other.without_image_names)[:_REPORTED_NAMES]
        self.with_several += other.with_several
        self.several.update(sorted(other.several)[: max(0, _REPORTED_NAMES - len(self.several))])
        self.named += other.named
        self.num_unsafe += other.num_unsafe
        self.unsafe_names = (self.unsafe_names + other.unsafe_names)[:_REPORTED_UNSAFE]

    def describe(self, uri: str, image: str | None = None) -> dict[str, Any]:
        """The manifest's fields for kind, suffixes and classes. Logs what is left out, and if samples disagree.

        Args:
            uri: the dataset's address.
            image: the member that the user has chosen.

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
        others = sorted(self.several - self.images)
        choose = f"--image chooses one, such as --image {shlex.quote(others[0])}" if others else ""
        if not self.images:
            raise UserError(
                f"no sample under {uri} has an image or grid, only {', '.join(sorted(self.suffixes)) or 'nothing'}; "
                f"one of {', '.join(_FORMATS)} is needed{f'; {choose}' if choose else ''}{hint}"
            )
        if len({is_grid(suffix) for suffix in self.images}) > 1:
            raise UserError(f"{uri} holds samples with images and samples with .npy grids; make them two datasets")
        if self.without_image:
            names = first_few(self.without_image_names, self.without_image)
            total = self.samples + self.without_image
            logger.warning(
                "left out %d of %d samples, which have no image or grid: %s%s", self.without_image, total, names, hint
            )
        elif numbered:
            logger.warning("%s%s", uri, hint)
        without = self.samples - self.labelled
        if without and (self.labelled or self.odd_labels):  # else the dataset has no labels at all
            logger.warning(
                "%s counts as unlabelled: %d of %d samples have no class number 0, 1, 2, … in 'cls': %s",
                uri, without, self.samples, first_few(self.unlabelled_names, without),
            )  # fmt: skip
        elif self.max_label >= max(self.samples, 2):
            logger.warning(
                "%s: the class numbers in 'cls' go up to %d, and there are %d samples; a classifier takes memory for "
                "each number up to the largest", uri, self.max_label, self.samples,
            )  # fmt: skip
        if self.with_several and image is None:
            logger.warning(
                "%d of %d samples hold several images or grids (%s), of which %s is used; %s",
                self.with_several, self.samples, ", ".join(sorted(self.several)), " or ".join(sorted(self.images)),
                choose,
            )  # fmt: skip
        return {
            "kind": "grid" if any(map(is_grid, self.images)) else "image",
            "image_suffixes": tuple(
                suffix for form in _FORMATS for suffix in sorted(self.images) if _format(suffix) == form
            ),
            "suffixes": tuple(sorted(self.suffixes)),
            "num_classes": self.max_label + 1 if self.labelled == self.samples else None,
            "num_unsafe": self.num_unsafe,
            "unsafe_names": tuple(self.unsafe_names),
            "source_names": self.named > 0,
        }
