"""The interface of opened images and grids, and the conversion of stored pixels to upright ones."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_ray.data.decode.transforms import Crops, Orientation

UPRIGHT = Orientation()
EXIF_ORIENTATION = 0x0112
_ORIENTATIONS = (
    UPRIGHT,
    Orientation(False, False, True),
    Orientation(False, True, True),
    Orientation(False, True, False),
    Orientation(True, False, False),
    Orientation(True, False, True),
    Orientation(True, True, True),
    Orientation(True, True, False),
)
"""Values 1 to 8 of EXIF's orientation tag."""


class Crop(NamedTuple):
    """One row of Crops."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @classmethod
    def of(cls, crops: Crops, row: int) -> Crop:
        """The crop of one image."""
        top, left, height, width, flip = (column[row] for column in crops)
        return cls(int(top), int(left), int(height), int(width), bool(flip))

    def stored(self, orientation: Orientation, hw: tuple[int, int]) -> Crop:
        """Map this crop of an upright image of size hw to the image as it is stored."""
        top = hw[0] - self.top - self.height if orientation.flip_vertical else self.top
        left = hw[1] - self.left - self.width if orientation.flip_horizontal else self.left
        if orientation.transposed:
            return Crop(left, top, self.width, self.height, self.flip)
        return Crop(top, left, self.height, self.width, self.flip)


class Member(Protocol):
    """An image or grid whose header has been read and checked."""

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the upright image."""

    def whole(self, channels: int) -> NDArray[Any]:
        """Decode the whole upright image: (C, height, width), uint8 for images, float32 for grids."""

    def crop_into(self, crop: Crop, out_CHW: Tensor) -> None:
        """Decode what the crop needs and resize it into one slot of the batch."""


def exif_orientation(segment: bytes) -> Orientation:
    """Orientation in an EXIF segment; upright if the segment is damaged or has none."""
    exif = Image.Exif()
    try:
        exif.load(segment)
        value = exif.get(EXIF_ORIENTATION)
    except Exception:  # damaged EXIF can raise anything in Pillow's parser; the pixels may still be good
        return UPRIGHT
    return orientation_of(value)


def orientation_of(value: object) -> Orientation:
    """Orientation of a value of EXIF's orientation tag; upright for invalid values."""
    return _ORIENTATIONS[value - 1] if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


def upright(pixels_HWC: NDArray[np.uint8], orientation: Orientation) -> NDArray[np.uint8]:
    """View of stored pixels as the upright image."""
    if orientation.transposed:
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation.flip_vertical:
        pixels_HWC = pixels_HWC[::-1]
    return pixels_HWC[:, ::-1] if orientation.flip_horizontal else pixels_HWC
