"""Images that Pillow decodes: PNG, WebP, and JPEGs that are not 8-bit."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from crate_ray.data.decode.errors import DecodeError, check_pixels
from crate_ray.data.decode.member import EXIF_ORIENTATION, Crop, orientation_of, upright
from crate_ray.data.decode.transforms import Orientation, resize_image


class PillowImage(NamedTuple):
    """An image that Pillow has opened but not decoded."""

    image: Image.Image
    orientation: Orientation

    @property
    def hw(self) -> tuple[int, int]:
        return self.image.size if self.orientation.transposed else self.image.size[::-1]

    def whole(self, channels: int) -> NDArray[np.uint8]:
        height, width = self.hw
        pixels = self._pixels(Crop(0, 0, height, width, False).stored(self.orientation, self.hw), channels)
        return upright(pixels, self.orientation).transpose(2, 0, 1)

    def crop_into(self, crop: Crop, out_CHW: Tensor) -> None:
        pixels = self._pixels(crop.stored(self.orientation, self.hw), out_CHW.shape[0])
        resize_image(pixels, out_CHW, self.orientation.mirrored() if crop.flip else self.orientation)

    def _pixels(self, crop: Crop, channels: int) -> NDArray[np.uint8]:
        try:
            part = self.image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
            pixels = np.array(to_eight_bits(part).convert("L" if channels == 1 else "RGB"))
        except Exception as error:  # damaged files can raise anything in Pillow's parsers
            raise DecodeError(f"the {self.image.format} is damaged: {error}", "damaged") from None
        return pixels[:, :, None] if channels == 1 else pixels


def open_with_pillow(content: bytes | memoryview, formats: tuple[str, ...], max_pixels: int) -> PillowImage:
    """Open an image of one of these formats. Raises DecodeError if it is of none of them, damaged or too large."""
    stored = bytes(content)
    check_pixels(*_webp_hw(stored), max_pixels)
    try:
        image = Image.open(io.BytesIO(stored), formats=formats)
        check_pixels(image.height, image.width, max_pixels)
        if image.format == "PNG" and "exif" not in image.info and b"eXIf" in stored:
            image.load()  # the chunk may come after the pixels
        # Call the base class: the PNG plugin's getexif() decodes the pixels if there is no eXIf chunk.
        value = Image.Image.getexif(image).get(EXIF_ORIENTATION)
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("not a JPEG, PNG or WebP image", "not_an_image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(str(error), "too_large") from None
    except Exception as error:
        raise DecodeError(f"the image is damaged: {error}", "damaged") from None
    return PillowImage(image, orientation_of(value))


def _webp_hw(content: bytes) -> tuple[int, int]:
    """Height and width of a WebP image (RFC 9649), zeros for other formats. Pillow allocates before it reports them."""
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
    """Scale 16-bit grayscale to 0 … 255 (Pillow's convert would clip it at 255). Other images are returned as is."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
