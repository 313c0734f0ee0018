"""Re-encode large images at a smaller size, so that no pixels are stored that training would discard.

Colours are treated as in `decode`: ICC profiles and transparency are ignored, CMYK becomes RGB.
"""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from crate_ray.data.decode.errors import MAX_PIXELS, DecodeError
from crate_ray.data.decode.room import room_for
from crate_ray.data.decode.samples import decode_whole, read_image_header
from crate_ray.data.prepare.statistics import BadSample, as_picture

_REDUCING_GAP = 3.0  # Pillow first averages whole pixels down to 3 times the size; no visible difference to one pass
_MASK_BYTES_PER_PIXEL = 8


def shrunk_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Height and width after the shortest side is reduced to max_side; unchanged if it is not longer."""
    short = min(height, width)
    if short <= max_side:
        return height, width
    return max(max_side, round(height * max_side / short)), max(max_side, round(width * max_side / short))


def shrink_image(content: bytes, max_side: int, quality: int, max_pixels: int = MAX_PIXELS) -> bytes | None:
    """Reduce the shortest side of an image to max_side. Returns None if it is not longer.

    Resizing is bicubic and antialiased. EXIF orientation is applied, then all metadata is dropped. The format stays.

    Args:
        content: JPEG, PNG or WebP.
        max_side: largest shortest side, in pixels.
        quality: of JPEG and WebP, 1 to 100.
        max_pixels: larger images are refused.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        header = read_image_header(content, max_pixels=max_pixels)
        if min(header.height, header.width) <= max_side:
            return None
        with decode_whole(content, max_pixels=max_pixels) as image:
            height, width = shrunk_size(*image.size, max_side)
            picture = as_picture(image)
            smaller = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
            return _encoded(smaller, image.format, quality)
    except (DecodeError, MemoryError) as error:
        raise BadSample(str(error)) from None


def shrink_mask(content: bytes, max_side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """Resize a mask like its image, by nearest neighbour, so that no new values arise. The result is a PNG.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        header = read_image_header(content, max_pixels=max_pixels)
        if min(header.height, header.width) <= max_side:
            return content
        with (
            room_for(header.height * header.width * _MASK_BYTES_PER_PIXEL),
            Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as stored,
        ):
            image = ImageOps.exif_transpose(stored)
            if image.mode == "CMYK":  # which PNG does not have
                image = image.convert("RGB")
            height, width = shrunk_size(image.height, image.width, max_side)
            smaller = image.resize((width, height), Image.Resampling.NEAREST)
            smaller.info = {}
            return _encoded(smaller, "PNG", 0)
    except Exception as error:  # damaged files can raise anything in Pillow's parsers
        raise BadSample(str(error)) from None


def _encoded(image: Image.Image, kind: str, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "PNG" else {"quality": quality}))
    return file.getvalue()
