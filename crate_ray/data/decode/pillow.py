"""Images that Pillow decodes: PNG, WebP, and JPEGs that are not 8-bit.

Pillow opens an image only when it is decoded, because it takes memory when it opens one. Before that, size and
orientation are read from the file's chunks.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_ray.data.decode.errors import DecodeError, check_pixels
from crate_ray.data.decode.member import EXIF_ORIENTATION, UPRIGHT, Crop, orientation_of, upright
from crate_ray.data.decode.room import room_for
from crate_ray.data.decode.transforms import Orientation, resize_image

# Pillow takes memory for large images in blocks of 16 MiB. glibc keeps freed blocks of this size for the thread that
# used them, but returns larger ones to the system.
if "PILLOW_BLOCK_SIZE" not in os.environ:
    Image.core.set_block_size(2**26)

ImageFormat = Literal["JPEG", "PNG", "WEBP"]

PNG_START = b"\x89PNG\r\n\x1a\n"
_BYTES_PER_PIXEL = {"JPEG": 20, "PNG": 20, "WEBP": 28}
"""Memory while an image is decoded: the decoder's, Pillow's image and its crop, that in eight bits, and the array."""
_TEXT_BYTES = 64 * 2**20
"""Pillow's limit on the texts of a PNG, after decompression."""
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_MAX_CHUNKS = 2**16


class PillowImage(NamedTuple):
    """An image that Pillow will decode. Its header has been checked."""

    content: bytes
    format: ImageFormat
    height: int
    """As stored, before orientation."""
    width: int
    """As stored, before orientation."""
    channels: int
    """1 for grayscale, else 3."""
    orientation: Orientation
    extra_bytes: int = 0
    """Memory to decode it, apart from its pixels."""

    @property
    def hw(self) -> tuple[int, int]:
        return (self.width, self.height) if self.orientation.transposed else (self.height, self.width)

    def whole(self, channels: int, factor: int = 1) -> NDArray[np.uint8]:
        """As for any member. Pillow decodes at full scale only, so `factor` is 1."""
        height, width = self.hw
        pixels = self._pixels(Crop(0, 0, height, width, False).stored(self.orientation, self.hw), channels)
        return upright(pixels, self.orientation).transpose(2, 0, 1)

    def crop_into(self, crop: Crop, out_CHW: Tensor) -> None:
        with room_for(self.num_bytes()):
            pixels = self._pixels(crop.stored(self.orientation, self.hw), out_CHW.shape[0])
            resize_image(pixels, out_CHW, self.orientation.mirrored() if crop.flip else self.orientation)

    def num_bytes(self, factor: int = 1) -> int:
        """Memory to decode it. `factor` is 1."""
        return self.height * self.width * _BYTES_PER_PIXEL[self.format] + self.extra_bytes

    def _pixels(self, crop: Crop, channels: int) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(self.content), formats=(self.format,)) as image:
                if image.size != (self.width, self.height):
                    raise DecodeError(f"the {self.format} is damaged: its headers give two sizes", "damaged")
                part = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
            part.info.pop("transparency", None)  # which is ignored; Pillow's convert would warn of some forms of it
            pixels = np.array(to_eight_bits(part).convert("L" if channels == 1 else "RGB"))
        except (DecodeError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DecodeError(str(error), "too_large") from None
        except Exception as error:  # damaged files can raise anything in Pillow's parsers
            raise DecodeError(f"the {self.format} is damaged: {error}", "damaged") from None
        return pixels[:, :, None] if channels == 1 else pixels


def open_png_or_webp(content: bytes | memoryview, max_pixels: int) -> PillowImage:
    """Read the header of a PNG or WebP image. Raises DecodeError if it is neither, damaged or too large."""
    stored = bytes(content)
    if stored[:8] == PNG_START:
        return _open_png(stored, max_pixels)
    if stored[:4] == b"RIFF" and stored[8:12] == b"WEBP":
        return _open_webp(stored, max_pixels)
    raise DecodeError("not a JPEG, PNG or WebP image", "not_an_image")


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise DecodeError if an image has no pixels or more than max_pixels."""
    if not height or not width:
        raise DecodeError("the image is damaged: it has no pixels", "damaged")
    check_pixels(height, width, max_pixels)


def _open_png(content: bytes, max_pixels: int) -> PillowImage:
    if len(content) < 33 or content[12:16] != b"IHDR":
        raise DecodeError("the PNG is damaged: it ends within its header", "damaged")
    width, height = struct.unpack_from(">II", content, 16)
    check_size(height, width, max_pixels)
    info: dict[str, Any] = {}
    extra_bytes = 0
    for kind, start, stop in _chunks(content, 8, "big"):
        if kind == b"eXIf":
            info.setdefault("exif", content[start:stop])
        elif kind in _TEXTS:
            extra_bytes = _TEXT_BYTES
    if extra_bytes and (b"Raw profile type exif" in content or b"XML:com.adobe.xmp" in content):
        info = _pillows_info(content) | info
    channels = 1 if content[25] in (0, 4) else 3  # the colour types of grayscale
    return PillowImage(content, "PNG", height, width, channels, _orientation(info), extra_bytes)


def _pillows_info(content: bytes) -> dict[str, Any]:
    """The texts of a PNG. Pillow does not decode pixels for them."""
    try:
        with room_for(_TEXT_BYTES), Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            return {str(key): value for key, value in image.info.items()}
    except Exception:  # reported when it is decoded
        return {}


def _open_webp(content: bytes, max_pixels: int) -> PillowImage:
    """Sizes are where RFC 9649 says."""
    if len(content) < 30:
        raise DecodeError("the WEBP is damaged: it ends within its header", "damaged")
    info: dict[str, Any] = {}
    if content[12:16] == b"VP8X":
        width, height = (int.from_bytes(content[i : i + 3], "little") + 1 for i in (24, 27))
        for kind, start, stop in _chunks(content, 12, "little"):
            if kind in (b"EXIF", b"XMP "):
                info.setdefault({b"EXIF": "exif", b"XMP ": "xmp"}[kind], content[start:stop])
    elif content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", content, 26))
    check_size(height, width, max_pixels)
    return PillowImage(content, "WEBP", height, width, 3, _orientation(info))


def _chunks(content: bytes, position: int, order: Literal["big", "little"]) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the chunks of a PNG (big-endian) or WebP file, up to the first one that is cut off."""
    is_png = order == "big"
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(content):
            return
        first, second = content[position : position + 4], content[position + 4 : position + 8]
        kind, size = (second, int.from_bytes(first, order)) if is_png else (first, int.from_bytes(second, order))
        start, position = position + 8, position + 8 + size + (4 if is_png else size % 2)
        if start + size > len(content):
            return
        yield kind, start, start + size
    raise DecodeError(f"it has more than {_MAX_CHUNKS} chunks", "too_large")


def _orientation(info: dict[str, Any]) -> Orientation:
    """Orientation in Pillow's metadata of an image: EXIF, or else XMP. Upright if it is damaged or there is none."""
    if not info:
        return UPRIGHT
    image = Image.new("1", (1, 1))
    image.info = dict(info)  # type: ignore[assignment]
    try:
        return orientation_of(image.getexif().get(EXIF_ORIENTATION))
    except Exception:  # damaged metadata can raise anything in Pillow's parsers; the pixels may still be good
        return UPRIGHT


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 0 … 255 (Pillow's convert would clip it at 255). Other images are returned as is."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
