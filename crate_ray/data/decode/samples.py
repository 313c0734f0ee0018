"""Encoded members to model input: JPEG by libjpeg-turbo, PNG and WebP by Pillow, `.npy` grids by NumPy without pickle.

Of a JPEG only what the crop needs is decoded. Nothing is allocated before the header was judged.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from crate_ray.config import Kind
from crate_ray.data.decode.jpeg_stack import Layout, layout_of, resize_stacked
from crate_ray.data.decode.scratch import scratch
from crate_ray.data.decode.transforms import (
    LARGEST_SMALL_SIDE,
    Box,
    CropRule,
    Crops,
    Int64,
    Orientation,
    SmallResize,
    resize_grid,
    resize_image,
    small_side,
)
from crate_ray.data.decode.turbojpeg import Region, RegionError, find_turbojpeg
from crate_ray.data.format import npy

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
GRID_SUFFIX = "npy"

Cause = Literal[
    "empty",
    "not_an_image",
    "damaged",
    "too_large",
    "not_an_array",
    "pickled",
    "not_numbers",
    "wrong_shape",
    "not_finite",
]
"""Why a member cannot be used."""

MAX_PIXELS = 2**26
"""Height times width above which a member is taken for a decompression bomb."""

_SMALL_BYTES = 2**16
"""JPEGs of so many bytes are worth a look whether they are like the one before."""
_REDUCED_CROP = 1.5
"""A crop decoded at a reduced scale is at least so many times as large as the output."""
_REDUCED_PIXELS = 2**18
"""Smaller crops are not reduced: the resize that takes fractions of pixels costs more than is won."""
_COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBX"}
"""simplejpeg's names by channels."""
_DECODED = {1: 1, 3: 4}
"""Channels that large JPEGs are decoded to: resize_image is faster with a fourth one."""
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = Orientation()
_ORIENTATIONS = (
    _UPRIGHT,
    Orientation(False, False, True),
    Orientation(False, True, True),
    Orientation(False, True, False),
    Orientation(True, False, False),
    Orientation(True, False, True),
    Orientation(True, True, True),
    Orientation(True, True, False),
)
"""EXIF's orientations 1 to 8."""


class DecodeError(ValueError):
    """A member that is not a readable image or grid of the expected kind; `cause` is the same for alike ones."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause: Cause = cause


def decode_batch(
    encoded: Sequence[bytes | memoryview | NDArray[Any]],
    kind: Kind,
    crop: CropRule,
    out: Tensor,
    *,
    max_pixels: int = MAX_PIXELS,
) -> list[DecodeError | None]:
    """Decode n members, cut each where `crop` says, and resize (antialiased bicubic) into out, (n, C, height, width).

    Safe to call in several threads at once; most of the work is done without the interpreter lock.

    Args:
        encoded: the members' contents: JPEG, PNG or WebP for images, `.npy` for grids; or what has been decoded
            already: (height, width, C) uint8 for images, (C, height, width) numbers for grids.
        kind: what they are.
        crop: called once, with the heights and widths of all n upright images (1 for what has none).
        out: uint8 for images, with 1 (luma) or 3 (RGB) channels; float32 for grids.
        max_pixels: larger members are refused by their headers.

    Returns:
        The error of each member that cannot be used, whose slot stays undefined; None for the others.
    """
    channels, out_hw = int(out.shape[1]), (int(out.shape[2]), int(out.shape[3]))
    if kind == "image" and (alike := _open_alike(encoded, channels, max_pixels)) is not None:
        side = small_side(alike[1].height, alike[1].width, out_hw)
        if side is not None:
            return _decode_alike(*alike, crop, side, out)
    members: list[_Member | None] = []
    errors: list[DecodeError | None] = []
    member: _Member | None = None
    for content in encoded:
        try:
            member = _open(content, kind, channels, max_pixels, member)
            members.append(member)
            errors.append(None)
        except DecodeError as error:
            members.append(None)
            errors.append(error)
    sizes = np.array([(1, 1) if member is None else member.hw for member in members], np.int64).reshape(-1, 2)
    crops = crop(sizes[:, 0], sizes[:, 1])
    small: dict[tuple[int, object], list[int]] = {}
    for i, member in enumerate(members):
        if member is None:
            continue
        side = small_side(*member.hw, out_hw)
        if side is not None:
            layout = member.layout if isinstance(member, _Jpeg) else None
            small.setdefault((side, layout and (layout.components, layout.sampling)), []).append(i)
            continue
        try:
            member.crop_into(_Crop.of(crops, i), out[i])
        except DecodeError as error:
            errors[i] = error
        members[i] = None  # Pillow keeps a whole picture in it
    for (side, _), rows in small.items():
        _decode_small(members, np.array(rows), crops, side, out, errors)
    return errors


class ImageHeader(NamedTuple):
    """What the beginning of an encoded image tells."""

    height: int
    width: int
    """Both upright."""
    is_plain_jpeg: bool
    """A JPEG that is complete, upright, and grayscale or YCbCr of 8 bits: what any decoder can be given."""


def read_image_header(content: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read an image's header. Raises DecodeError for what decode_batch refuses by it."""
    member = _open(content, "image", 3, max_pixels)
    is_plain = (
        isinstance(member, _Jpeg)
        and member.components < 4
        and member.orientation == _UPRIGHT
        and content[-2:] == b"\xff\xd9"
        # Otherwise it may be RGB.
        and b"Adobe" not in bytes(content[: member.frame])
        and content[member.frame + 10] != ord("R")
    )
    return ImageHeader(*member.hw, is_plain)


def skim_jpeg(content: bytes | memoryview, rows: int) -> None:
    """Decode what codes the first rows of a JPEG and throw it away: what a crop that ends there takes at the least.

    Huffman codes can only be read from the beginning. Raises DecodeError for what is not a JPEG of 8 bits.
    """
    member = _open(content, "image", 3, MAX_PIXELS)
    if not isinstance(member, _Jpeg):
        raise DecodeError("not a JPEG of 8 bits", "not_an_image")
    member.skim(rows)


class _Crop(NamedTuple):
    """One row of Crops."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @classmethod
    def of(cls, crops: Crops, row: int) -> _Crop:
        top, left, height, width, flip = (column[row] for column in crops)
        return cls(int(top), int(left), int(height), int(width), bool(flip))

    def stored(self, orientation: Orientation, hw: tuple[int, int]) -> _Crop:
        """Where this crop of the upright image, of size hw, lies in the stored one."""
        top = hw[0] - self.top - self.height if orientation.flip_vertical else self.top
        left = hw[1] - self.left - self.width if orientation.flip_horizontal else self.left
        if orientation.transposed:
            return _Crop(left, top, self.width, self.height, self.flip)
        return _Crop(top, left, self.height, self.width, self.flip)


class _Member(Protocol):
    """A member whose header has been judged."""

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width, upright."""

    def whole(self, channels: int) -> NDArray[Any]:
        """All of it, upright: (C, height, width), uint8 of an image, float32 of a grid."""

    def crop_into(self, crop: _Crop, out_CHW: Tensor) -> None:
        """Decode what the crop needs and resize it into a slot of the batch."""


def _open(
    content: bytes | memoryview | NDArray[Any],
    kind: Kind,
    channels: int,
    max_pixels: int,
    previous: _Member | None = None,
) -> _Member:
    if isinstance(content, np.ndarray):
        return _open_array(content, kind, channels)
    if not len(content):
        raise DecodeError("it is empty", "empty")
    if kind == "grid":
        return _open_grid(content, channels, max_pixels)
    if channels not in (1, 3):
        raise DecodeError(
            f"images have 1 or 3 channels, the model has {channels}; store other data as .npy grids", "wrong_shape"
        )
    if content[:3] != b"\xff\xd8\xff":
        return _open_other(content, ("PNG", "WEBP"), max_pixels)
    if isinstance(previous, _Jpeg) and previous.layout is not None and len(content) < _SMALL_BYTES:
        content = bytes(content)
        if previous.layout.fits(content):
            return _Jpeg(content, *previous[1:])
    return _open_jpeg(content, max_pixels)


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError(f"{width}×{height} pixels are more than the limit of {max_pixels}", "too_large")


def _open_alike(
    encoded: Sequence[bytes | memoryview | NDArray[Any]], channels: int, max_pixels: int
) -> tuple[list[bytes], Layout] | None:
    """Small JPEGs that all have the header of the first, as those of a dataset often do; None for others."""
    if not len(encoded) or any(isinstance(content, np.ndarray) or len(content) >= _SMALL_BYTES for content in encoded):
        return None
    try:
        first = _open(encoded[0], "image", channels, max_pixels)
    except DecodeError:
        return None
    layout = first.layout if isinstance(first, _Jpeg) else None
    if layout is None:
        return None
    contents = [bytes(content) for content in encoded]
    return (contents, layout) if all(map(layout.fits, contents)) else None


def _decode_alike(
    contents: Sequence[bytes], layout: Layout, crop: CropRule, side: int, out: Tensor
) -> list[DecodeError | None]:
    """decode_batch of small JPEGs of one layout."""
    n = len(contents)
    crops = crop(np.full(n, layout.height), np.full(n, layout.width))
    resized = scratch("resized", tuple(out.shape), np.float32)
    damaged = resize_stacked(contents, [layout] * n, crops, side, resized)
    _round_into(out, slice(None), resized)
    return [_damaged(damaged[i]) if i in damaged else None for i in range(n)]


def _decode_small(
    members: Sequence[_Member | None],
    rows: Int64,
    crops: Crops,
    side: int,
    out: Tensor,
    errors: list[DecodeError | None],
) -> None:
    """Decode small members as a whole, and resize them together."""
    numbers, channels = rows.tolist(), out.shape[1]
    crops = crops.take(rows)
    resized = scratch("resized", (len(numbers), *out.shape[1:]), np.float32)
    jpegs = [member for i in numbers if isinstance(member := members[i], _Jpeg)]
    layouts = [member.layout for member in jpegs if member.layout is not None]
    if layouts:
        damaged = resize_stacked([bytes(member.content) for member in jpegs], layouts, crops, side, resized)
        for i, cause in damaged.items():
            errors[numbers[i]] = _damaged(cause)
    else:
        squares = scratch("squares", (len(numbers), channels, side, side), np.float32)
        squares[...] = 0  # what lies outside of an image has no weight, but must be finite
        for square, i in zip(squares, numbers, strict=True):
            member = members[i]
            assert member is not None
            try:
                square[:, : member.hw[0], : member.hw[1]] = member.whole(channels)
            except DecodeError as error:
                errors[i] = error
        SmallResize.of(crops, side, (out.shape[2], out.shape[3]))(squares, resized)
    _round_into(out, slice(None) if len(numbers) == len(out) else rows, resized)


def _round_into(out: Tensor, rows: slice | Int64, resized: NDArray[np.float32]) -> None:
    """Store resized images or grids in rows of a batch; what was resized is overwritten."""
    if out.dtype == torch.uint8:
        resized += 0.5
        np.clip(resized, 0, 255, out=resized)
    out.numpy()[rows] = resized


# --- JPEG -----------------------------------------------------------------------------------------------------------

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Tables, comments and data of applications: what has a length and may come before a frame. Nothing else may: where
decoders disagree whether a marker has a length, they see different frames behind it."""
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_APP1, _START_OF_SCAN, _RESTART_INTERVAL = 0xE1, 0xDA, 0xDD


class _Jpeg(NamedTuple):
    """A JPEG of 8 bits: grayscale, YCbCr, RGB, CMYK or YCCK."""

    content: bytes | memoryview
    frame: int
    """Where the frame's header begins."""
    height: int
    width: int
    """Both as stored."""
    components: int
    orientation: Orientation
    layout: Layout | None
    """Of a small one that can be decoded together with others."""

    @property
    def hw(self) -> tuple[int, int]:
        return (self.width, self.height) if self.orientation.transposed else (self.height, self.width)

    def whole(self, channels: int) -> NDArray[np.uint8]:
        return _upright(self._all(1, channels), self.orientation).transpose(2, 0, 1)

    def crop_into(self, crop: _Crop, out_CHW: Tensor) -> None:
        orientation = self.orientation
        top, left, height, width, flip = crop.stored(orientation, self.hw)
        factor = _reduction(crop, out_CHW.shape[1], out_CHW.shape[2])
        region = Region(
            top // factor,
            left // factor,
            -(-(top + height) // factor) - top // factor,
            -(-(left + width) // factor) - left // factor,
        )
        box = None
        if factor > 1:
            box = Box(top / factor - region.top, left / factor - region.left, height / factor, width / factor)
        pixels = self._region(region, factor, _DECODED[out_CHW.shape[0]])
        resize_image(pixels, out_CHW, orientation.mirrored() if flip else orientation, box)

    def _region(self, region: Region, factor: int, channels: int) -> NDArray[np.uint8]:
        """A region of the image at 1/factor of its scale, (height, width, channels)."""
        # A file that does not end as it should is decoded as a whole, to see whether anything is missing.
        # CMYK is decoded as a whole too: it is converted to RGB afterwards.
        if self.content[-2:] == b"\xff\xd9" and self.components < 4:
            pixels = self._region_alone(region, factor, channels)
            if pixels is not None:
                return pixels
        pixels = self._all(factor, channels)
        return pixels[region.top : region.top + region.height, region.left : region.left + region.width]

    def _region_alone(self, region: Region, factor: int, channels: int) -> NDArray[np.uint8] | None:
        """The same without decoding all of it; None where that does not work, for whatever reason."""
        mcu_height, mcu_width = self._mcu()
        library = find_turbojpeg()
        if library is not None:
            margin = region.left % (mcu_width // factor)
            wider = region._replace(left=region.left - margin, width=region.width + margin)
            pixels = np.empty((wider.height, wider.width, channels), np.uint8)
            try:
                library.decode(self.content, (self.height, self.width), wider, pixels, channels, factor)
            except RegionError:
                return None
            return pixels[:, margin:]
        # Two rows more: interpolated chroma looks at its neighbours.
        rows = -(-((region.top + region.height) * factor + 2) // mcu_height) * mcu_height
        if rows >= self.height or not self._can_be_cut():
            return None
        first = self._first_rows(rows, factor, channels)
        if first is None:
            return None
        return first[region.top : region.top + region.height, region.left : region.left + region.width]

    def skim(self, rows: int) -> None:
        """Decode what codes the first rows, and as little else as possible: no colours, of 8×8 pixels one."""
        height = self._mcu()[0]
        rows = -(-rows // height) * height
        if rows >= self.height or not self._can_be_cut() or self._first_rows(rows, 8, 1) is None:
            self._all(8, 1)

    def _first_rows(self, rows: int, factor: int, channels: int) -> NDArray[np.uint8] | None:
        """A multiple of the MCU's rows, fewer than all, of a JPEG that can be cut; None where something is wrong."""
        cut = bytearray(self.content)
        cut[self.frame + 5 : self.frame + 7] = rows.to_bytes(2, "big")
        pixels = np.empty((-(-rows // factor), -(-self.width // factor), channels), np.uint8)
        try:
            _decode_jpeg(cut, factor, pixels)
        except ValueError as error:
            # Its last row is decoded when the decoder finds that the file goes on. It reports the first oddity only.
            if not str(error).endswith("extraneous bytes before marker 0xd9"):
                return None
        return pixels

    def _all(self, factor: int, channels: int) -> NDArray[np.uint8]:
        """All of the image, strictly."""
        pixels = np.empty((-(-self.height // factor), -(-self.width // factor), channels), np.uint8)
        try:
            _decode_jpeg(self.content, factor, pixels)
        except ValueError as error:
            raise _damaged(str(error)) from None
        return pixels

    def _mcu(self) -> tuple[int, int]:
        """Height and width of the blocks of pixels that are coded together."""
        first = self.frame + 11
        sampling = [self.content[first + 3 * i] for i in range(self.components)]
        return 8 * max(s & 15 for s in sampling), 8 * max(s >> 4 for s in sampling)

    def _can_be_cut(self) -> bool:
        """Whether rows follow each other in the file, one scan of them and without restarts."""
        content, position = self.content, self.frame
        if content[position + 1] not in _SEQUENTIAL:
            return False
        while True:
            position += 2 + (content[position + 2] << 8 | content[position + 3])
            if position + 5 > len(content) or content[position] != 0xFF:
                return False
            if content[position + 1] == _START_OF_SCAN:
                return content[position + 4] == self.components
            if content[position + 1] == _RESTART_INTERVAL or content[position + 1] not in _SEGMENTS:
                return False


def _damaged(cause: str) -> DecodeError:
    return DecodeError(f"the JPEG is damaged: {cause}", "damaged")


def _decode_jpeg(content: bytes | bytearray | memoryview, factor: int, out: NDArray[np.uint8]) -> None:
    """Decode a JPEG at 1/factor of its scale. Raises ValueError, for warnings and other sizes than out's too."""
    colours = _COLOURS[out.shape[2]]
    if factor == 1:
        decoded = simplejpeg.decode_jpeg(content, colours, buffer=out)
    else:
        size = {"min_height": out.shape[0], "min_width": out.shape[1], "min_factor": factor}
        decoded = simplejpeg.decode_jpeg(content, colours, buffer=out, **size)
    if decoded.shape != out.shape:
        raise ValueError(f"it has {decoded.shape[1]}×{decoded.shape[0]} pixels, not {out.shape[1]}×{out.shape[0]}")


def _open_jpeg(content: bytes | memoryview, max_pixels: int) -> _Jpeg | _Other:
    """Read a JPEG's header up to its frame, ITU T.81 annex B."""
    orientation, position = _UPRIGHT, 2
    try:
        while content[position] != 0xFF or (marker := content[position + 1]) not in _START_OF_FRAME:
            if content[position : position + 2] == b"\xff\xff":  # fill byte
                position += 1
                continue
            if content[position] != 0xFF or marker not in _SEGMENTS:
                raise DecodeError("the JPEG is damaged: there is no frame where its header ends", "damaged")
            if marker == _APP1 and content[position + 4 : position + 10] == b"Exif\0\0":
                size = content[position + 2] << 8 | content[position + 3]
                orientation = _exif_orientation(bytes(content[position + 4 : position + 2 + size]))
            position += 2 + (content[position + 2] << 8 | content[position + 3])
        precision, height, width, components = struct.unpack_from(">BHHB", content, position + 4)
        sampling = [content[position + 11 + 3 * i] for i in range(components)]
    except (IndexError, struct.error):
        raise DecodeError("the JPEG is damaged: it ends in its header", "damaged") from None
    if not height or not width or not components:
        raise DecodeError("the JPEG is damaged: it has no pixels", "damaged")
    if not all(s >> 4 and s & 15 for s in sampling):
        raise DecodeError("the JPEG is damaged: a component has no samples", "damaged")
    _check_pixels(height, width, max_pixels)
    if precision != 8 or components not in (1, 3, 4):
        return _open_other(content, ("JPEG",), max_pixels)
    layout = None
    if max(height, width) <= LARGEST_SMALL_SIDE and orientation == _UPRIGHT:
        content = bytes(content)
        layout = layout_of(content)
        if layout is not None and layout[1:4] != (height, width, components):  # of a second frame
            layout = None
    return _Jpeg(content, position, height, width, components, orientation, layout)


def _exif_orientation(segment: bytes) -> Orientation:
    exif = Image.Exif()
    try:
        exif.load(segment)
        value = exif.get(_EXIF_ORIENTATION)
    except Exception:  # damaged metadata does whatever it can to the parser, and is no reason to lose the picture
        return _UPRIGHT
    return _ORIENTATIONS[value - 1] if isinstance(value, int) and 1 <= value <= 8 else _UPRIGHT


def _reduction(crop: _Crop, out_height: int, out_width: int) -> int:
    """By how much a JPEG is reduced while it is decoded, such that the crop is still 1.5 times the output."""
    if crop.height * crop.width < _REDUCED_PIXELS:
        return 1
    room = min(crop.height / out_height, crop.width / out_width) / _REDUCED_CROP
    return 8 if room >= 8 else 4 if room >= 4 else 2 if room >= 2 else 1


# --- What Pillow reads ----------------------------------------------------------------------------------------------


class _Other(NamedTuple):
    """An image that Pillow has opened, not loaded."""

    image: Image.Image
    orientation: Orientation

    @property
    def hw(self) -> tuple[int, int]:
        return self.image.size if self.orientation.transposed else self.image.size[::-1]

    def whole(self, channels: int) -> NDArray[np.uint8]:
        height, width = self.hw
        pixels = self._pixels(_Crop(0, 0, height, width, False).stored(self.orientation, self.hw), channels)
        return _upright(pixels, self.orientation).transpose(2, 0, 1)

    def crop_into(self, crop: _Crop, out_CHW: Tensor) -> None:
        pixels = self._pixels(crop.stored(self.orientation, self.hw), out_CHW.shape[0])
        resize_image(pixels, out_CHW, self.orientation.mirrored() if crop.flip else self.orientation)

    def _pixels(self, crop: _Crop, channels: int) -> NDArray[np.uint8]:
        try:
            part = self.image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
            pixels = np.array(to_eight_bits(part).convert("L" if channels == 1 else "RGB"))
        except Exception as error:  # Pillow lets through whatever a damaged file does to its parsers
            raise DecodeError(f"the {self.image.format} is damaged: {error}", "damaged") from None
        return pixels[:, :, None] if channels == 1 else pixels


def _open_other(content: bytes | memoryview, formats: tuple[str, ...], max_pixels: int) -> _Other:
    stored = bytes(content)
    _check_pixels(*_webp_hw(stored), max_pixels)
    try:
        image = Image.open(io.BytesIO(stored), formats=formats)
        _check_pixels(image.height, image.width, max_pixels)
        if image.format == "PNG" and "exif" not in image.info and b"eXIf" in stored:
            image.load()  # it may come after the pixels
        # The PNG reader's own method loads the pixels whenever there is no such chunk.
        value = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("not a JPEG, PNG or WebP image", "not_an_image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(str(error), "too_large") from None
    except Exception as error:
        raise DecodeError(f"the image is damaged: {error}", "damaged") from None
    return _Other(image, _ORIENTATIONS[value - 1] if isinstance(value, int) and 1 <= value <= 8 else _UPRIGHT)


def _webp_hw(content: bytes) -> tuple[int, int]:
    """Height and width of a WebP image, RFC 9649; zeros where it is none. Pillow allocates before it tells."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return 0, 0
    if content[12:16] == b"VP8X":
        return int.from_bytes(content[27:30], "little") + 1, int.from_bytes(content[24:27], "little") + 1
    if content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", content, 26)
    return height & 0x3FFF, width & 0x3FFF


def to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grayscale, which Pillow's convert would clip at 255, on the scale 0 to 255; other images as they are."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def _upright(pixels_HWC: NDArray[np.uint8], orientation: Orientation) -> NDArray[np.uint8]:
    if orientation.transposed:
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation.flip_vertical:
        pixels_HWC = pixels_HWC[::-1]
    return pixels_HWC[:, ::-1] if orientation.flip_horizontal else pixels_HWC


# --- What is decoded already ----------------------------------------------------------------------------------------


class _Pixels(NamedTuple):
    """An image (height, width, C), uint8."""

    array: NDArray[np.uint8]

    @property
    def hw(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def whole(self, channels: int) -> NDArray[np.uint8]:
        return self.array.transpose(2, 0, 1)

    def crop_into(self, crop: _Crop, out_CHW: Tensor) -> None:
        part = self.array[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        resize_image(part, out_CHW, _UPRIGHT.mirrored() if crop.flip else _UPRIGHT)


def _open_array(array: NDArray[Any], kind: Kind, channels: int) -> _Pixels | _Grid:
    if kind == "grid":
        _check_grid(array.shape, array.dtype, channels)
        return _Grid(array.tobytes(), 0, array.dtype, array.shape, False)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise DecodeError(
            f"{array.dtype} of shape {array.shape}, but the model expects uint8 (height, width, {channels})",
            "wrong_shape",
        )
    return _Pixels(array)


# --- Grids ----------------------------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    """A plain `.npy` array of numbers, (C, height, width) or (height, width)."""

    content: bytes | memoryview
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    @property
    def hw(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]

    def whole(self, channels: int) -> NDArray[np.float32]:
        stored = np.frombuffer(self.content, self.dtype, math.prod(self.shape), self.offset)
        with np.errstate(over="ignore"):  # too large for float32: found below
            grid = stored.reshape(self.shape, order="F" if self.fortran else "C").astype(np.float32)
        if not np.isfinite(grid).all():
            raise DecodeError("holds numbers that are not finite", "not_finite")
        return grid.reshape(channels, *self.hw)

    def crop_into(self, crop: _Crop, out_CHW: Tensor) -> None:
        grid = self.whole(out_CHW.shape[0])
        part = grid[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        resize_grid(part, out_CHW, crop.flip)


def _open_grid(content: bytes | memoryview, channels: int, max_pixels: int) -> _Grid:
    start = bytes(content[:6])
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise DecodeError("a pickle, not a plain .npy array", "pickled")
    if start != npy.MAGIC:
        raise DecodeError("not a plain .npy array", "not_an_array")
    try:
        shape, fortran, dtype, offset = npy.read_header(content)
    except ValueError as error:
        raise DecodeError(f"not a plain .npy array: {error}", "not_an_array") from None
    _check_grid(shape, dtype, channels)
    _check_pixels(shape[-2], shape[-1], max_pixels)
    if math.prod(shape) * dtype.itemsize > len(content) - offset:
        raise DecodeError("the .npy array is damaged: it ends before its last number", "damaged")
    return _Grid(content, offset, dtype, shape, fortran)


def _check_grid(shape: tuple[int, ...], dtype: np.dtype[Any], channels: int) -> None:
    if dtype.hasobject:
        raise DecodeError("not a plain .npy array: it holds pickled objects", "pickled")
    if dtype.kind not in "fiub":
        raise DecodeError(f"an array of {dtype} of shape {shape}, not of numbers", "not_numbers")
    if len(shape) not in (2, 3) or min(shape) < 1 or (shape[0] if len(shape) == 3 else 1) != channels:
        raise DecodeError(f"shape {shape}, but the model expects ({channels}, height, width)", "wrong_shape")
