"""Re-encode large images at a smaller size, so that no pixels are stored that training would discard.

Colours are treated as in `decode`: ICC profiles and transparency are ignored, CMYK becomes RGB.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.pillow import to_eight_bits
from crate_ray.data.decode.samples import read_image_header
from crate_ray.data.prepare.statistics import IMAGE_FORMATS, BadSample, channels_of

_REDUCING_GAP = 3.0  # Pillow first averages whole pixels down to 3 times the size; no visible difference to one pass


def shrunk_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Height and width after the shortest side is reduced to max_side; unchanged if it is not longer."""
    short = min(height, width)
    if short <= max_side:
        return height, width
    return max(max_side, round(height * max_side / short)), max(max_side, round(width * max_side / short))


class Shrunk(NamedTuple):
    """A re-encoded image."""

    content: bytes
    """The encoded bytes."""
    kind: str
    """Format, by Pillow's name."""
    channels: int
    """1 or 3."""
    size: tuple[int, int]
    """Height and width."""


def shrink_image(content: bytes, max_side: int, quality: int) -> Shrunk | None:
    """Reduce the shortest side of an image to max_side. Returns None if it is not longer.

    Resizing is bicubic and antialiased. EXIF orientation is applied, then all metadata is dropped. The format stays.

    Args:
        content: JPEG, PNG or WebP.
        max_side: largest shortest side, in pixels.
        quality: of JPEG and WebP, 1 to 100.

    Raises:
        BadSample: it cannot be decoded.
    """
    image = _open(content, max_side)
    if image is None:
        return None
    try:
        pixels = to_eight_bits(image).convert("L" if channels_of(image) == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise BadSample(str(error)) from None
    smaller = _resized(pixels, image, max_side, Image.Resampling.BICUBIC)
    kind = image.format if image.format in ("PNG", "WEBP") else "JPEG"
    return Shrunk(_encoded(smaller, kind, quality), kind, channels_of(smaller), (smaller.height, smaller.width))


def shrink_mask(content: bytes, max_side: int) -> bytes:
    """Resize a mask like its image, by nearest neighbour, so that no new values arise.

    Raises:
        BadSample: it cannot be decoded.
    """
    image = _open(content, max_side)
    return content if image is None else _encoded(_resized(image, image, max_side, Image.Resampling.NEAREST), "PNG", 0)


def _open(content: bytes, max_side: int) -> Image.Image | None:
    """The decoded image, not rotated; None if it is small enough."""
    try:
        header = read_image_header(content)
        if min(header.height, header.width) <= max_side:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            image.load()
        return image
    except UnidentifiedImageError:
        raise BadSample("not a JPEG, PNG or WebP image") from None
    except (DecodeError, OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise BadSample(str(error)) from None


def _resized(pixels: Image.Image, stored: Image.Image, max_side: int, filter_: Image.Resampling) -> Image.Image:
    """Pixels of a stored image, resized and upright."""
    height, width = shrunk_size(stored.height, stored.width, max_side)
    gap = None if filter_ == Image.Resampling.NEAREST else _REDUCING_GAP
    smaller = pixels.resize((width, height), filter_, reducing_gap=gap)
    exif = stored.getexif()
    smaller.info = {}  # drop all metadata except the orientation, which is applied next
    if exif.get(0x0112, 1) != 1:
        orientation = Image.Exif()
        orientation[0x0112] = exif[0x0112]
        smaller.info["exif"] = orientation.tobytes()
        smaller = ImageOps.exif_transpose(smaller)
        smaller.info = {}
    return smaller


def _encoded(image: Image.Image, kind: str, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "PNG" else {"quality": quality}))
    return file.getvalue()
