"""Decoded pixels to model input: random resized crop and flip for training, centre crop and resize for evaluation.

Random numbers are passed in (order.hashing.uniform), so the augmentation of a sample does not depend on the worker.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_ray.data.decode.scratch import scratch

Int64 = NDArray[np.int64]

_CROP_TRIES = 10
CROP_UNIFORMS = 4 * _CROP_TRIES + 1
"""Most uniform numbers that one training sample needs: four per try, and the last one for the flip."""

CropUniforms = Callable[[slice | Int64, Int64], NDArray[np.float64]]
"""From rows of the n images and columns in 0 … CROP_UNIFORMS to uniform numbers (rows, columns)."""

_FIRST_TRY_AND_FLIP = np.array([0, 1, 2, 3, CROP_UNIFORMS - 1])
_LATER_TRIES = np.arange(4, CROP_UNIFORMS - 1)

LARGEST_SMALL_SIDE = 64
"""Images with at most this many pixels per side are resized together."""


class Crops(NamedTuple):
    """Rectangles in pixels of n source images, and whether to mirror them; arrays (n,)."""

    top: Int64
    left: Int64
    height: Int64
    width: Int64
    flip: NDArray[np.bool_]

    def take(self, rows: Int64) -> Crops:
        """Crops of some of the images."""
        return Crops(self.top[rows], self.left[rows], self.height[rows], self.width[rows], self.flip[rows])


CropRule = Callable[[Int64, Int64], Crops]
"""From the heights and widths of n images, (n,), to their crops."""


class Orientation(NamedTuple):
    """How stored pixels become the upright image: transpose first, then flip vertically and horizontally."""

    transposed: bool = False
    flip_vertical: bool = False
    flip_horizontal: bool = False

    def mirrored(self) -> Orientation:
        """This orientation, followed by a horizontal flip."""
        return self._replace(flip_horizontal=not self.flip_horizontal)


_UPRIGHT = Orientation()
_CHANNEL_BITS = np.array([0, 8, 16], np.uint32)[:, None, None]
"""Bit offsets of the channels in a little-endian word."""


class Box(NamedTuple):
    """A rectangle with fractional pixels."""

    top: float
    left: float
    height: float
    width: float


# --- Crops ----------------------------------------------------------------------------------------------------------


def random_crops(
    heights: Int64,
    widths: Int64,
    uniforms: CropUniforms,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> Crops:
    """Random resized crops with torchvision's distribution: area uniform in scale, log of aspect ratio uniform.

    If ten tries do not fit into an image, the largest centre crop within the range of ratios is used.
    """
    # Most crops fit at the first try, so later tries are drawn for the other images only.
    u = uniforms(slice(None), _FIRST_TRY_AND_FLIP)
    top, left, height, width, fits = _tried_crops(heights, widths, u[:, None, :4], scale, ratio)
    if not fits.all():
        rows = np.flatnonzero(~fits)
        tries = uniforms(rows, _LATER_TRIES).reshape(len(rows), -1, 4)
        *again, fits = _tried_crops(heights[rows], widths[rows], tries, scale, ratio)
        fallback = _widest_crops(heights[rows], widths[rows], ratio)
        for column, tried, widest in zip((top, left, height, width), again, fallback, strict=True):
            column[rows] = np.where(fits, tried, widest)
    return Crops(top, left, height, width, u[:, 4] < 0.5 if flip else np.zeros(len(u), np.bool_))


def random_flips(uniforms: CropUniforms) -> NDArray[np.bool_]:
    """Which images `random_crops` would mirror."""
    return uniforms(slice(None), _FIRST_TRY_AND_FLIP[4:])[:, 0] < 0.5


def _tried_crops(
    heights: Int64,
    widths: Int64,
    tries: NDArray[np.float64],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Int64, Int64, Int64, Int64, NDArray[np.bool_]]:
    """The first of the tries, (n, tries, 4), that fits into each image, and whether any fits."""
    H, W = heights[:, None], widths[:, None]
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    area = H * W * (scale[0] + (scale[1] - scale[0]) * tries[:, :, 0])
    logs = log_low + (log_high - log_low) * tries[:, :, 1]
    # The last bit of NumPy's exp depends on the processor, which would change a few crops.
    aspect = np.array([math.exp(x) for x in logs.ravel().tolist()]).reshape(logs.shape)
    w, h = np.rint(np.sqrt(area * aspect)).astype(np.int64), np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    rows, first = np.arange(len(heights)), fits.argmax(1)
    h, w, u_top, u_left = h[rows, first], w[rows, first], tries[rows, first, 2], tries[rows, first, 3]
    top, left = (u_top * (heights - h + 1)).astype(np.int64), (u_left * (widths - w + 1)).astype(np.int64)
    return top, left, h, w, fits[rows, first]


def _widest_crops(heights: Int64, widths: Int64, ratio: tuple[float, float]) -> tuple[Int64, Int64, Int64, Int64]:
    """The largest centre crops with an aspect ratio in the range."""
    aspect = widths / heights
    h = np.where(aspect < ratio[0], np.clip(np.rint(widths / ratio[0]).astype(np.int64), 1, heights), heights)
    too_wide = (aspect >= ratio[0]) & (aspect > ratio[1])
    w = np.where(too_wide, np.clip(np.rint(heights * ratio[1]).astype(np.int64), 1, widths), widths)
    return (heights - h) // 2, (widths - w) // 2, h, w


def centre_crops(heights: Int64, widths: Int64, out_hw: tuple[int, int]) -> Crops:
    """The largest centre crops with the output's aspect ratio, the same as resizing the short side and cropping."""
    scale = np.minimum(heights / out_hw[0], widths / out_hw[1])
    h = np.clip(np.rint(out_hw[0] * scale).astype(np.int64), 1, heights)
    w = np.clip(np.rint(out_hw[1] * scale).astype(np.int64), 1, widths)
    return Crops((heights - h) // 2, (widths - w) // 2, h, w, np.zeros(len(heights), np.bool_))


# --- Resizing -------------------------------------------------------------------------------------------------------


def resize_image(
    pixels_HWC: NDArray[np.uint8], out_CHW: Tensor, orientation: Orientation | None = None, box: Box | None = None
) -> None:
    """Resize an image (antialiased bicubic, uint8) into one slot of the batch, and make it upright.

    Args:
        pixels_HWC: crop of the image as stored: luma, RGB, or RGB and a fourth channel that is ignored. The last form
            is the fastest, because torch resizes words of four bytes.
        out_CHW: the slot.
        orientation: from stored to upright pixels.
        box: part of the pixels to sample; by default all.
    """
    size, channels = _stored_hw(out_CHW, orientation), pixels_HWC.shape[2]
    if box is not None:  # only Pillow samples fractional pixels
        mode, stored_as = ("L", "L") if channels == 1 else ("RGB", "RGBX" if channels == 4 else "RGB")
        shape, pixels = pixels_HWC.shape[1::-1], np.ascontiguousarray(pixels_HWC)
        image = Image.frombuffer(mode, shape, pixels, "raw", stored_as, 0, 1)
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, corners))
        resized_HWC = resized.reshape(*size, -1)
    elif pixels_HWC.shape[:2] == size:
        resized_HWC = pixels_HWC
    else:
        # Without this, torch would copy the array.
        pixels_HWC = np.require(pixels_HWC, requirements=("C", "W"))
        source_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
        if channels == 4:  # write words, too, which F.interpolate cannot
            resized_HWC = scratch("resized words", (*size, 4), np.uint8)
            out_1CHW = torch.from_numpy(resized_HWC).permute(2, 0, 1)[None]
            torch.ops.aten._upsample_bicubic2d_aa.out(source_CHW[None], size, False, None, None, out=out_1CHW)
        else:
            resized_1CHW = F.interpolate(source_CHW[None], size=size, mode="bicubic", antialias=True)
            resized_HWC = resized_1CHW[0].permute(1, 2, 0).numpy()
    if resized_HWC.shape[2] == 4:
        if orientation is None or orientation == _UPRIGHT:
            _split(resized_HWC, out_CHW.numpy())
            return
        resized_CHW = scratch("stored planes", (3, *size), np.uint8)
        _split(resized_HWC, resized_CHW)
    else:
        resized_CHW = resized_HWC.transpose(2, 0, 1)
    _put(resized_CHW, orientation, out_CHW)


def _split(pixels_HW4: NDArray[np.uint8], out_3HW: NDArray[np.uint8]) -> None:
    """The first three channels as planes."""
    # Words are three times as fast as bytes. Use one call, because threads wait for the GIL after each call.
    words = pixels_HW4.view("<u4")[:, :, 0]
    np.right_shift(words, _CHANNEL_BITS, out=out_3HW, dtype=np.uint32, casting="unsafe")


def resize_grid(grid_CHW: NDArray[np.float32], out_CHW: Tensor, flip: bool = False) -> None:
    """Resize a float grid (channels, height, width) into one slot of the batch."""
    out = out_CHW.numpy()
    for plane, target in zip(grid_CHW, out[:, :, ::-1] if flip else out, strict=True):
        # Use Pillow, because torch would resize floats with several threads for each decoding thread.
        target[...] = Image.fromarray(plane).resize(out.shape[:0:-1], Image.Resampling.BICUBIC)


def _stored_hw(out_CHW: Tensor, orientation: Orientation | None) -> tuple[int, int]:
    height, width = out_CHW.shape[1:]
    return (width, height) if orientation is not None and orientation.transposed else (height, width)


def _put(resized_CHW: NDArray[np.uint8], orientation: Orientation | None, out_CHW: Tensor) -> None:
    if orientation is not None:
        if orientation.transposed:
            resized_CHW = resized_CHW.transpose(0, 2, 1)
        if orientation.flip_vertical:
            resized_CHW = resized_CHW[:, ::-1]
        if orientation.flip_horizontal:
            resized_CHW = _mirrored(resized_CHW)
    # Do not use torch: after a copy, its threads busy-wait on cores that the other decoding threads need.
    np.copyto(out_CHW.numpy(), resized_CHW)


def _mirrored(pixels_CHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if pixels_CHW.shape[2] % 8 or not pixels_CHW.flags.c_contiguous:
        return pixels_CHW[:, :, ::-1]
    # Eight pixels at once: byte by byte, this would take a fifth of the time of the resize.
    return pixels_CHW.view(np.uint64)[:, :, ::-1].byteswap().view(np.uint8)


class SmallResize(NamedTuple):
    """Crops, resizes (antialiased bicubic) and mirrors n small images at once, by two batched matrix products.

    For small images, separate calls would cost more than the arithmetic. Results do not depend on the other images.
    """

    rows: NDArray[np.float32]
    """(n, output height, side)."""
    columns: NDArray[np.float32]
    """(n, side, output width)."""

    @classmethod
    def of(cls, crops: Crops, side: int, out_hw: tuple[int, int], reduction: tuple[int, int] = (1, 1)) -> SmallResize:
        """For images in the upper left corner of squares.

        Args:
            crops: the crops.
            side: height and width of the squares.
            out_hw: height and width of the output.
            reduction: subsampling of the images' rows and columns, 1 or 2. If it is 2, planes are interpolated as
                libjpeg does with chroma; they must be padded with a copy of the first and last row (column).
        """
        rows = _small_weights("rows", crops.top, crops.height, side, out_hw[0], reduction[0])
        columns = _small_weights("columns", crops.left, crops.width, side, out_hw[1], reduction[1])
        columns[crops.flip] = columns[crops.flip, ::-1]
        return cls(rows, columns.transpose(0, 2, 1))

    def __call__(self, planes_NCHW: NDArray[np.float32], out_NCHW: NDArray[np.float32]) -> None:
        """From the n squares with C channels to (n, C, output height, output width)."""
        n, channels, height, _ = planes_NCHW.shape
        narrow = scratch("narrow", (n, channels, height, self.columns.shape[2]), np.float32)
        np.matmul(planes_NCHW, self.columns[:, None], out=narrow)
        np.matmul(self.rows[:, None], narrow, out=out_NCHW)


@functools.lru_cache(maxsize=4096)
def small_side(height: int, width: int, out_hw: tuple[int, int]) -> int | None:
    """Side of the square in which images of this size are resized together; None if they are too large.

    It depends on the image alone. BLAS uses a single thread for products of this size.
    """
    side = 32 if max(height, width) <= 32 else LARGEST_SMALL_SIDE
    largest_product = side * max(side, out_hw[0]) * out_hw[1]
    return side if max(height, width) <= side and largest_product <= 2**18 else None


def _small_weights(
    name: str, start: Int64, length: Int64, side: int, out_size: int, reduction: int
) -> NDArray[np.float32]:
    """The weights of n crops, (n, out_size, side / reduction), in scratch memory."""
    first_of_length, table = _weight_table(side, out_size, reduction)
    weights = scratch(f"{name} {reduction}", (len(start), *table.shape[1:]), np.float32)
    # All indices are in range; with mode="clip", NumPy does not need a temporary buffer.
    return table.take(first_of_length[length] + start, axis=0, out=weights, mode="clip")


@functools.lru_cache(maxsize=8)
def _weight_table(side: int, out_size: int, reduction: int) -> tuple[Int64, NDArray[np.float32]]:
    """Pillow's weights for the pixels of every crop [start, start + length) of `side` pixels.

    Returns the row of the first crop of each length, and the table (crops, out_size, side) by length and start.
    """
    starts = np.arange(side, -1, -1) + 1  # number of starts for each length
    starts[0] = 0
    first_of_length = np.concatenate(([0], starts.cumsum()[:-1]))
    table = np.zeros((int(starts.sum()), out_size, side), np.float32)
    for length in range(1, side + 1):
        scale = length / out_size
        stretch = max(scale, 1.0)
        centre = (np.arange(out_size)[:, None] + 0.5) * scale
        x = np.abs((np.arange(length) + 0.5 - centre) / stretch)
        weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
        weights[x >= 2] = 0
        weights /= weights.sum(1, keepdims=True)
        for start in range(side - length + 1):
            table[first_of_length[length] + start, :, start : start + length] = weights
    if reduction == 2:  # ¾ of the pixel's own value and ¼ of the neighbour on its side
        pixel = np.arange(side)
        interpolation = np.zeros((side, side // 2 + 2), np.float32)
        interpolation[pixel, pixel // 2 + 1] = 0.75
        interpolation[pixel, pixel // 2 + 2 * (pixel % 2)] = 0.25
        table = table @ interpolation
    return first_of_length, table
