"""`.npy` grids, read without pickle, and images that are already decoded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import Kind
from crate_ray.data.decode.errors import DecodeError, check_pixels
from crate_ray.data.decode.member import UPRIGHT, Crop
from crate_ray.data.decode.room import room_for
from crate_ray.data.decode.transforms import resize_grid, resize_image
from crate_ray.data.format import npy

_MAX_CHANNELS = 4096


class DecodedImage(NamedTuple):
    """A decoded image: (height, width, C), uint8."""

    array: NDArray[np.uint8]

    @property
    def hw(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def whole(self, channels: int) -> NDArray[np.uint8]:
        return self.array.transpose(2, 0, 1)

    def crop_into(self, crop: Crop, out_CHW: Tensor) -> None:
        part = self.array[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        resize_image(part, out_CHW, UPRIGHT.mirrored() if crop.flip else UPRIGHT)


def open_array(array: NDArray[Any], kind: Kind, channels: int) -> DecodedImage | Grid:
    """Check the type and shape of an array. Raises DecodeError if they do not match."""
    if kind == "grid":
        _check_grid(array.shape, array.dtype, channels)
        return Grid(array.tobytes(), 0, array.dtype, array.shape, False)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise DecodeError(
            f"{array.dtype} of shape {array.shape}, but the model expects uint8 (height, width, {channels})",
            "wrong_shape",
        )
    return DecodedImage(array)


class Grid(NamedTuple):
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
        with np.errstate(over="ignore"):  # overflow gives infinity, which is checked below
            grid = stored.reshape(self.shape, order="F" if self.fortran else "C").astype(np.float32)
        if not np.isfinite(grid).all():
            raise DecodeError("holds numbers that are not finite", "not_finite")
        return grid.reshape(channels, *self.hw)

    def crop_into(self, crop: Crop, out_CHW: Tensor) -> None:
        with room_for(self.num_bytes):
            grid = self.whole(out_CHW.shape[0])
            part = grid[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            resize_grid(part, out_CHW, crop.flip)

    @property
    def channels(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def dtype_name(self) -> str:
        """Name of the stored numbers' type."""
        order = "big-endian " if self.dtype.newbyteorder("=") != self.dtype else ""
        return f"{order}{self.dtype.name}"

    @property
    def num_bytes(self) -> int:
        """Memory to decode it: as float32, with a copy of the crop and a mask."""
        return 9 * math.prod(self.shape)


def open_grid(content: bytes | memoryview, channels: int | None, max_pixels: int) -> Grid:
    """Read and check the header of a `.npy` array. It may have any number of channels if `channels` is None.

    Raises DecodeError.
    """
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
    check_pixels(shape[-2], shape[-1], max_pixels)
    if math.prod(shape) * dtype.itemsize > len(content) - offset:
        raise DecodeError("the .npy array is damaged: it ends before its last number", "damaged")
    return Grid(content, offset, dtype, shape, fortran)


def grid_shape(content: bytes) -> tuple[int, ...]:
    """Shape of a `.npy` array by its header. Raises DecodeError if it is none."""
    try:
        return npy.read_header(content).shape
    except ValueError as error:
        raise DecodeError(f"not a plain .npy array: {error}", "not_an_array") from None


def looks_like_hwc(shape: tuple[int, ...]) -> bool:
    """Whether an array is more likely (height, width, C) than (C, height, width): its last axis is the shortest."""
    return len(shape) == 3 and shape[2] < min(shape[:2])


def channels_first(content: bytes) -> bytes:
    """A `.npy` array of shape (height, width, C) as one of shape (C, height, width). Others are returned as they are.

    Raises DecodeError if it is not a plain array.
    """
    try:
        array = npy.read(content)
    except ValueError as error:
        raise DecodeError(f"not a plain .npy array: {error}", "not_an_array") from None
    if array.ndim != 3:
        return content
    with room_for(2 * array.nbytes):
        return npy.content_of(array.transpose(2, 0, 1))


def _check_grid(shape: tuple[int, ...], dtype: np.dtype[Any], channels: int | None) -> None:
    if dtype.hasobject:
        raise DecodeError("not a plain .npy array: it holds pickled objects", "pickled")
    if dtype.kind not in "fiub":
        raise DecodeError(f"an array of {dtype} of shape {shape}, not of numbers", "not_numbers")
    found = shape[0] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or min(shape) < 1 or found > _MAX_CHANNELS or channels not in (None, found):
        expected = "C" if channels is None else channels
        raise DecodeError(f"shape {shape}, but the model expects ({expected}, height, width)", "wrong_shape")
