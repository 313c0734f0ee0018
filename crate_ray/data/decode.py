"""Encoded members to pixels: JPEG by libjpeg-turbo, PNG and WebP by Pillow, `.npy` grids by NumPy without pickle."""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
GRID_SUFFIX = "npy"
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_MAGIC = b"\xff\xd8\xff"


Kind = Literal["image", "grid"]
"""What samples are: encoded pictures, or arrays of numbers."""


class DecodeError(ValueError):
    """A member that is not a readable image or grid of the expected kind."""


def decode_image(encoded: bytes | memoryview, channels: int) -> NDArray[np.uint8]:
    """Pixels of a JPEG, PNG or WebP, (height, width, channels), 0 to 255; channels is 1 (luma) or 3 (RGB).

    Raises DecodeError for anything else, images too large to be honest ones (Pillow's bomb limit) included.
    """
    if channels not in (1, 3):
        raise DecodeError(f"images have 1 or 3 channels, the model has {channels}; store other data as .npy grids")
    try:
        if bytes(encoded[:3]) == _JPEG_MAGIC:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
            limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # where Pillow goes from a warning to an error
            if height * width > limit:
                raise DecodeError(f"{width}×{height} pixels are more than the limit of {limit}")
            if colorspace in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(encoded, "RGB" if channels == 3 else "GRAY")
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            pixels = np.asarray(to_eight_bits(image).convert("RGB" if channels == 3 else "L"))
        return pixels if channels == 3 else pixels[:, :, None]
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("not a JPEG, PNG or WebP image") from None
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(str(error)) from error


def to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grayscale, which Pillow's convert would clip at 255, on the scale 0 to 255; other images as they are."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def decode_grid(encoded: bytes | memoryview, channels: int) -> NDArray[np.float32]:
    """A `.npy` array of numbers as float32 (channels, height, width); (height, width) counts as one channel.

    Raises DecodeError for object arrays (they would need pickle), other shapes and numbers that are not finite.
    """
    if bytes(encoded[:6]) != b"\x93NUMPY":
        raise DecodeError("not a plain .npy array")
    try:
        grid = np.load(io.BytesIO(encoded), allow_pickle=False)
    except Exception as error:  # NumPy lets through whatever a damaged header does to Python's parser
        raise DecodeError(f"not a plain .npy array: {error}") from error
    if grid.dtype.kind not in "fiub" or not grid.size:
        raise DecodeError(f"an array of {grid.dtype} of shape {grid.shape}, not of numbers")
    if grid.ndim == 2:
        grid = grid[None]
    if grid.ndim != 3 or grid.shape[0] != channels:
        raise DecodeError(f"shape {grid.shape}, but the model expects ({channels}, height, width)")
    out = grid.astype(np.float32)
    if not np.isfinite(out).all():
        raise DecodeError("holds numbers that are not finite")
    return out
