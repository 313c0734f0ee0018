"""Why an encoded image or grid cannot be decoded."""

from __future__ import annotations

from typing import Literal

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
"""Kinds of decoding errors."""

MAX_PIXELS = 2**26
"""Default limit on height times width; larger images are treated as decompression bombs."""


class DecodeError(ValueError):
    """An image or grid cannot be decoded, or is not of the expected kind. `cause` is the kind of error."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause: Cause = cause


class Refused(DecodeError):  # noqa: N818 - named for what it reports
    """libjpeg-turbo refuses a JPEG, at the first warning. Pillow decides whether it is damaged."""


def no_memory(hw: tuple[int, int]) -> DecodeError:
    """The error of an image or grid of this height and width, if a MemoryError was raised for it."""
    return DecodeError(f"there is not enough memory to decode its {hw[1]}×{hw[0]} pixels", "too_large")


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raise DecodeError if an image has more than max_pixels pixels."""
    if height * width > max_pixels:
        raise DecodeError(f"{width}×{height} pixels are more than the limit of {max_pixels} (max_pixels)", "too_large")
