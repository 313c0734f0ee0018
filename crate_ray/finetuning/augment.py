"""RandAugment (arXiv 1909.13719) with kornia's image operations and counter-based random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
    equalize,
    normalize_min_max,
    posterize,
    sharpness,
    solarize,
)
from kornia.geometry.transform import get_shear_matrix2d, rotate, translate, warp_affine
from torch import Tensor

from crate_ray.data.device import to_device
from crate_ray.data.order.hashing import Int64, uniform
from crate_ray.finetuning.streams import STREAM_RANDAUGMENT

_MAX_MAGNITUDE = 30.0

Operation = Callable[[Tensor, Tensor], Tensor]
"""From images (B, channels, H, W) in 0 … 1 and signs (B,), −1 or 1, to images."""


class RandAugmentation:
    """RandAugment(n, m) with torchvision's operations and ranges, which published recipes use.

    The operations of an image are functions of (seed, epoch, sample), so they do not depend on the worker.
    Images with the same operation are transformed together. Where an operation has a direction (left or right, brighter
    or darker), both are equally likely.

    Args:
        num_operations: n, operations applied to each image one after the other, drawn with replacement.
        magnitude: m, of 30.
        seed: seed of the run.
    """

    def __init__(self, num_operations: int, magnitude: float, seed: int) -> None:
        self._num_operations, self._seed = num_operations, seed
        self._operations = _operations(magnitude / _MAX_MAGNITUDE)

    def __call__(self, images_BCHW: Tensor, epochs: Int64, samples: Int64) -> Tensor:
        """Augmented images, on the device of the images.

        Args:
            images_BCHW: 1 or 3 channels, in 0 … 1.
            epochs, samples: (B,) of each image.
        """
        columns = np.arange(2 * self._num_operations)
        u = uniform(self._seed, STREAM_RANDAUGMENT, epochs[:, None], samples[:, None], columns)
        chosen = (u[:, ::2] * len(self._operations)).astype(np.int64)
        signs = np.where(u[:, 1::2] < 0.5, -1.0, 1.0).astype(np.float32)
        device = images_BCHW.device
        images_BCHW = images_BCHW.clone()
        for turn in range(self._num_operations):
            for number, operation in enumerate(self._operations):
                rows = np.flatnonzero(chosen[:, turn] == number)
                if operation is None or not len(rows):
                    continue
                rows_B = to_device(torch.from_numpy(rows), device)
                sign_B = to_device(torch.from_numpy(signs[rows, turn]), device)
                images_BCHW[rows_B] = operation(images_BCHW[rows_B], sign_B).clamp(0, 1)
        return images_BCHW


def _operations(share: float) -> list[Operation | None]:
    """torchvision's operations at a share (0 … 1) of the largest magnitude. None is the identity."""

    def enhanced(adjust: Callable[[Tensor, Tensor], Tensor]) -> Operation:
        return lambda images, sign_B: adjust(images, 1 + sign_B * 0.9 * share)

    return [
        None,
        lambda images, sign_B: normalize_min_max(images),  # auto contrast
        lambda images, sign_B: equalize(images),
        # Constants as tensors that are filled on the device: copying a number from the host would wait for the device.
        lambda images, sign_B: posterize(
            images, torch.full_like(sign_B, int(8 - 4 * share), dtype=torch.int64)
        ),  # bits
        lambda images, sign_B: solarize(images, torch.full_like(sign_B, 1 - share)),  # invert what is above it
        lambda images, sign_B: rotate(images, sign_B * 30 * share),  # degrees
        lambda images, sign_B: _shear(images, sign_B * 0.3 * share, None),
        lambda images, sign_B: _shear(images, None, sign_B * 0.3 * share),
        lambda images, sign_B: _translate(images, sign_B * 150 / 331 * share, x=1),
        lambda images, sign_B: _translate(images, sign_B * 150 / 331 * share, y=1),
        enhanced(sharpness),
        # These variants of kornia's functions compute the same as Pillow's ImageEnhance.
        enhanced(adjust_brightness_accumulative),
        enhanced(adjust_contrast_with_mean_subtraction),
        enhanced(adjust_saturation_with_gray_subtraction),
    ]


def _shear(images_BCHW: Tensor, ratio_x_B: Tensor | None, ratio_y_B: Tensor | None) -> Tensor:
    """Shear about the centre by ratios of width to height, or of height to width."""
    height, width = images_BCHW.shape[2:]
    count = len(images_BCHW)
    centre = torch.stack([images_BCHW.new_full((count,), (side - 1) / 2) for side in (width, height)], 1)
    angles = [None if ratio is None else torch.atan(ratio) for ratio in (ratio_x_B, ratio_y_B)]
    return warp_affine(images_BCHW, get_shear_matrix2d(centre, *angles)[:, :2], (height, width))


def _translate(images_BCHW: Tensor, share_B: Tensor, *, x: float = 0, y: float = 0) -> Tensor:
    """Translate by shares of the width or height."""
    height, width = images_BCHW.shape[2:]
    return translate(images_BCHW, torch.stack([share_B * x * width, share_B * y * height], 1))
