"""Decoded pixels to model input: random resized crop and flip for training, resize and centre crop for evaluation.

Randomness comes in as uniform numbers (order.uniform): a sample's augmentation does not depend on who computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_CROP_TRIES = 10
CROP_UNIFORMS = 4 * _CROP_TRIES + 1
"""Uniform numbers that one training sample consumes."""


@dataclass(frozen=True)
class Crop:
    """A rectangle of the source image in pixels, and whether to mirror it."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_crop(
    height: int,
    width: int,
    u: NDArray[np.float64],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> Crop:
    """Random resized crop as torchvision draws it: area uniform in scale, log aspect ratio uniform in log ratio.

    Ten tries, then the largest centre crop within the ratio. `u` holds CROP_UNIFORMS uniform numbers.
    """
    mirrored = flip and bool(u[-1] < 0.5)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 4 * _CROP_TRIES, 4):
        u_area, u_ratio, u_top, u_left = u[i : i + 4]
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w, mirrored)
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return Crop((height - h) // 2, (width - w) // 2, h, w, mirrored)


def centre_crop(height: int, width: int, out_hw: tuple[int, int]) -> Crop:
    """The largest centre crop with the output's aspect ratio: resize of the shortest side and centre crop in one."""
    scale = min(height / out_hw[0], width / out_hw[1])
    h, w = min(height, max(1, round(out_hw[0] * scale))), min(width, max(1, round(out_hw[1] * scale)))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def crop_resize(image_HWC: NDArray[np.uint8], crop: Crop, out_CHW: Tensor) -> None:
    """Cut, resize (antialiased bicubic) and mirror an image into a slot of the batch, uint8."""
    view = image_HWC[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if not view.flags.writeable:
        view = view.copy()
    _resize_into(torch.from_numpy(view).permute(2, 0, 1), crop.flip, out_CHW)


def crop_resize_grid(grid_CHW: NDArray[np.float32], crop: Crop, out_CHW: Tensor) -> None:
    """The same for a float grid (channels, height, width)."""
    view = grid_CHW[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    _resize_into(torch.from_numpy(view), crop.flip, out_CHW)


def _resize_into(view_CHW: Tensor, flip: bool, out_CHW: Tensor) -> None:
    if view_CHW.shape != out_CHW.shape:
        size = out_CHW.shape[1:]
        view_CHW = F.interpolate(view_CHW[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    out_CHW.copy_(view_CHW.flip(-1) if flip else view_CHW)
