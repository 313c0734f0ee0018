"""8-bit JPEGs, decoded by libjpeg-turbo. Only the crop's part of a large JPEG is decoded.

Any warning of libjpeg-turbo is an error here, so that no damage goes unnoticed. What it refuses is left to Pillow.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.data.decode.errors import DecodeError, Refused
from crate_ray.data.decode.jpeg_stack import Layout, layout_of
from crate_ray.data.decode.member import UPRIGHT, Crop, exif_orientation, upright
from crate_ray.data.decode.pillow import ImageFormat, PillowImage, check_size
from crate_ray.data.decode.refused import count_refused
from crate_ray.data.decode.room import room_for
from crate_ray.data.decode.transforms import LARGEST_SMALL_SIDE, Box, Orientation, resize_image
from crate_ray.data.decode.turbojpeg import Region, RegionError, find_turbojpeg

_REDUCED_CROP = 1.5
"""A crop is decoded at a reduced scale only if it stays this many times as large as the output."""
_REDUCED_PIXELS = 2**18
"""Crops with fewer pixels are decoded at full scale: the sub-pixel resize would cost more than decoding saves."""
_COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBX"}
"""simplejpeg's color spaces, by number of channels."""
_DECODED = {1: 1, 3: 4}
"""Channels in the batch -> channels to decode: resize_image is faster with a fourth one."""

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Segments with a length that may come before a frame: tables, comments, application data. Other markers are refused:
decoders disagree on whether those have a length, so they could find different frames."""
_RESTARTS = frozenset(range(0xD0, 0xD8))
"""Markers without a length, which decoders skip."""
_NEXT_MARKER = re.compile(rb"\xff[^\0\xff]")
"""Decoders skip all bytes before it as padding."""
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_MAX_SEGMENTS = 4096
"""Most segments before the frame. Long profiles and metadata are cut into segments of 64 kB."""
_SCAN = b"\xff\xda"
_MAX_SCANS = 100
"""Most scans. Encoders write about ten, and every one costs a pass over the whole image."""
_APP1, _START_OF_SCAN, _RESTART_INTERVAL = 0xE1, 0xDA, 0xDD


class Jpeg(NamedTuple):
    """An 8-bit JPEG: grayscale, YCbCr, RGB, CMYK or YCCK."""

    content: bytes | memoryview
    frame: int
    """Offset of the frame header."""
    height: int
    """As stored, before orientation."""
    width: int
    """As stored, before orientation."""
    components: int
    orientation: Orientation
    layout: Layout | None
    """Set for a small JPEG that can be decoded together with others."""
    has_scans: bool = False
    """Whether it has several scans, so that decoding keeps the coefficients of the whole image."""

    @property
    def format(self) -> ImageFormat:
        """Its format."""
        return "JPEG"

    @property
    def channels(self) -> int:
        """1 for grayscale, else 3."""
        return 1 if self.components == 1 else 3

    @property
    def hw(self) -> tuple[int, int]:
        return (self.width, self.height) if self.orientation.transposed else (self.height, self.width)

    def whole(self, channels: int, factor: int = 1) -> NDArray[np.uint8]:
        """As for any member, but at 1/factor scale. Raises Refused if only Pillow may decode it."""
        return upright(self._all(factor, channels), self.orientation).transpose(2, 0, 1)

    def crop_into(self, crop: Crop, out_CHW: Tensor) -> None:
        try:
            self._crop_into(crop, out_CHW)
        except Refused as refused:
            self.for_pillow().crop_into(crop, out_CHW)
            count_refused(refused)

    def for_pillow(self) -> PillowImage:
        """The same image, to be decoded by Pillow."""
        size = self.height * self.width
        coefficients = 2 * self.components * size if self.has_scans else 0
        return PillowImage(
            bytes(self.content), "JPEG", self.height, self.width, self.channels, self.orientation, coefficients
        )

    def _crop_into(self, crop: Crop, out_CHW: Tensor) -> None:
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
        with room_for(self.num_bytes(factor)):
            pixels = self._region(region, factor, _DECODED[out_CHW.shape[0]])
            resize_image(pixels, out_CHW, orientation.mirrored() if flip else orientation, box)

    def num_bytes(self, factor: int = 1) -> int:
        """Memory to decode it at 1/factor scale: four bytes per pixel, and two per coefficient if they are kept."""
        size = self.height * self.width
        return 4 * size // factor**2 + (2 * self.components * size if self.has_scans else 0)

    def _region(self, region: Region, factor: int, channels: int) -> NDArray[np.uint8]:
        """Decode a region at 1/factor scale: (height, width, channels)."""
        # Decode everything if the end marker is missing, to find out whether pixels are missing too.
        # Also decode CMYK as a whole: simplejpeg converts it to RGB afterwards.
        if self.content[-2:] == b"\xff\xd9" and self.components < 4:
            pixels = self._region_alone(region, factor, channels)
            if pixels is not None:
                return pixels
        pixels = self._all(factor, channels)
        return pixels[region.top : region.top + region.height, region.left : region.left + region.width]

    def _region_alone(self, region: Region, factor: int, channels: int) -> NDArray[np.uint8] | None:
        """Like _region, but decode no more than needed. None if that is not possible."""
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
        # Two rows more, because chroma is interpolated between neighbours.
        rows = -(-((region.top + region.height) * factor + 2) // mcu_height) * mcu_height
        if rows >= self.height or not self._can_be_cut():
            return None
        first = self._first_rows(rows, factor, channels)
        if first is None:
            return None
        return first[region.top : region.top + region.height, region.left : region.left + region.width]

    def skim(self, rows: int) -> None:
        """Entropy-decode the first rows with as little other work as possible: luma only, at 1/8 scale."""
        height = self._mcu()[0]
        rows = -(-rows // height) * height
        if rows >= self.height or not self._can_be_cut() or self._first_rows(rows, 8, 1) is None:
            self._all(8, 1)

    def _first_rows(self, rows: int, factor: int, channels: int) -> NDArray[np.uint8] | None:
        """Decode only the first rows, a multiple of the MCU height. None if the JPEG is damaged."""
        cut = bytearray(self.content)  # the frame header gets a smaller height
        cut[self.frame + 5 : self.frame + 7] = rows.to_bytes(2, "big")
        pixels = np.empty((-(-rows // factor), -(-self.width // factor), channels), np.uint8)
        try:
            _decode_jpeg(cut, factor, pixels)
        except ValueError as error:
            # This warning is expected: all rows are decoded, and data follows. The decoder reports the first warning
            # only, so any other one came before it.
            if not str(error).endswith("extraneous bytes before marker 0xd9"):
                return None
        return pixels

    def _all(self, factor: int, channels: int) -> NDArray[np.uint8]:
        """Decode the whole image. Raises Refused at any error or warning."""
        pixels = np.empty((-(-self.height // factor), -(-self.width // factor), channels), np.uint8)
        try:
            _decode_jpeg(self.content, factor, pixels)
        except ValueError as error:
            raise Refused(str(error), "damaged") from None
        return pixels

    def _mcu(self) -> tuple[int, int]:
        """Height and width of a minimum coded unit in pixels."""
        first = self.frame + 11
        sampling = [self.content[first + 3 * i] for i in range(self.components)]
        return 8 * max(s & 15 for s in sampling), 8 * max(s >> 4 for s in sampling)

    def _can_be_cut(self) -> bool:
        """Whether the rows are stored in order: a sequential JPEG with a single scan and no restart markers."""
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


def jpeg_error(message: str) -> DecodeError:
    """The error of a damaged JPEG."""
    return DecodeError(f"the JPEG is damaged: {message}", "damaged")


def _decode_jpeg(content: bytes | bytearray | memoryview, factor: int, out: NDArray[np.uint8]) -> None:
    """Decode a JPEG at 1/factor scale into out. Raises ValueError for errors, warnings, and a size other than out's."""
    colours = _COLOURS[out.shape[2]]
    if factor == 1:
        decoded = simplejpeg.decode_jpeg(content, colours, buffer=out)
    else:
        size = {"min_height": out.shape[0], "min_width": out.shape[1], "min_factor": factor}
        decoded = simplejpeg.decode_jpeg(content, colours, buffer=out, **size)
    if decoded.shape != out.shape:
        raise ValueError(f"it has {decoded.shape[1]}×{decoded.shape[0]} pixels, not {out.shape[1]}×{out.shape[0]}")


def open_jpeg(content: bytes | memoryview, max_pixels: int) -> Jpeg | PillowImage:
    """Read a JPEG's header up to its frame (ITU T.81 annex B). Raises DecodeError if it is damaged or too large."""
    exif, position, segments_left = b"", 2, _MAX_SEGMENTS
    try:
        while True:
            segments_left -= 1
            if not segments_left:
                raise jpeg_error(f"it has more than {_MAX_SEGMENTS} segments before its frame")
            if content[position] != 0xFF or content[position + 1] in (0, 0xFF):
                found = _NEXT_MARKER.search(content, position)
                if found is None:
                    raise jpeg_error("its header has no frame")
                position = found.start()
            marker = content[position + 1]
            if marker in _START_OF_FRAME:
                break
            if marker in _RESTARTS:
                position += 2
                continue
            size = content[position + 2] << 8 | content[position + 3]
            if marker not in _SEGMENTS or size < 2:
                raise jpeg_error("its header has no frame")
            if not exif and marker == _APP1 and content[position + 4 : position + 10] == b"Exif\0\0":
                exif = bytes(content[position + 4 : position + 2 + size])
            position += 2 + size
        precision, height, width, components = struct.unpack_from(">BHHB", content, position + 4)
        sampling = [content[position + 11 + 3 * i] for i in range(components)]
    except (IndexError, struct.error):
        raise jpeg_error("it ends within its header") from None
    if not components:
        raise jpeg_error("it has no pixels")
    if not all(s >> 4 and s & 15 for s in sampling):
        raise jpeg_error("a component has no samples")
    check_size(height, width, max_pixels)
    orientation = exif_orientation(exif) if exif else UPRIGHT
    layout = None
    if max(height, width) <= LARGEST_SMALL_SIDE and orientation == UPRIGHT and precision == 8:
        content = bytes(content)
        layout = layout_of(content)
        if layout is not None and layout[1:4] != (height, width, components):  # it belongs to a second frame
            layout = None
    scans = 1
    if layout is None and not (content[position + 1] in _SEQUENTIAL and _has_one_scan(content, position, components)):
        content = bytes(content)
        scans = content.count(_SCAN, position)
        if scans > _MAX_SCANS:
            raise DecodeError(f"it has {scans} scans, more than the limit of {_MAX_SCANS}", "too_large")
    if precision != 8 or components not in (1, 3, 4):
        return PillowImage(bytes(content), "JPEG", height, width, 1 if components == 1 else 3, orientation)
    return Jpeg(content, position, height, width, components, orientation, layout, scans > 1)


def _has_one_scan(content: bytes | memoryview, position: int, components: int) -> bool:
    """Whether the first scan of a sequential JPEG has all components, so that decoders read no other one."""
    for _ in range(_MAX_SEGMENTS):
        position += 2 + (content[position + 2] << 8 | content[position + 3])
        if position + 5 > len(content) or content[position] != 0xFF:
            return False
        if content[position + 1] == _START_OF_SCAN:
            return content[position + 4] == components
        if content[position + 1] not in _SEGMENTS:
            return False
    return False


def _reduction(crop: Crop, out_height: int, out_width: int) -> int:
    """Largest reduction while decoding (1, 2, 4 or 8) that keeps the crop at least 1.5 times as large as the output."""
    if crop.height * crop.width < _REDUCED_PIXELS:
        return 1
    room = min(crop.height / out_height, crop.width / out_width) / _REDUCED_CROP
    return 8 if room >= 8 else 4 if room >= 4 else 2 if room >= 2 else 1
