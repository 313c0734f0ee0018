"""RandAugment (arXiv 1909.13719) by kornia's operations, with random numbers that belong to the samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from kornia.augmentation.auto import RandAugment
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)
from torch import Tensor

from crate_ray.data.device import to_device
from crate_ray.data.order.hashing import Int64, uniform
from crate_ray.finetuning.streams import STREAM_RANDAUGMENT

_LARGEST = 30.0  # of kornia's magnitudes and torchvision's

Operation = Callable[[Tensor, Tensor], Tensor]
"""From images (B, channels, H, W) on the scale 0 to 1 and directions (B,), −1 or 1, to images."""


class RandAugmentation:
    """RandAugment(n, m) with the operations and ranges of torchvision, on which published recipes are built.

    kornia draws the operations once for a batch. Here each image has its own, which are functions of (seed, epoch,
    sample), whoever computes them; images of one operation are transformed together. Where an operation may go either
    way (left or right, brighter or darker), either is as likely.

    Args:
        num_operations: n, operations applied to each image one after the other, drawn with replacement.
        magnitude: m, of 30.
        seed: seed of the run.
    """

    def __init__(self, num_operations: int, magnitude: float, seed: int) -> None:
        self._num_operations, self._seed = num_operations, seed
        self._operations = _operations(magnitude)

    def __call__(self, images_BCHW: Tensor, epochs: Int64, samples: Int64) -> Tensor:
        """Augmented images, on the device of the images.

        Args:
            images_BCHW: on the scale 0 to 1, of 1 or 3 channels.
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
                rows_B, sign_B = to_device(torch.from_numpy(rows), device), torch.from_numpy(signs[rows, turn])
                images_BCHW[rows_B] = operation(images_BCHW[rows_B], sign_B).clamp(0, 1)
        return images_BCHW


def _operations(magnitude: float) -> list[Operation | None]:
    """torchvision's operations at a magnitude; None is the identity."""
    share = magnitude / _LARGEST
    # kornia shears by an angle, 180° times its range; torchvision by a ratio.
    shear = math.degrees(math.atan(0.3 * share)) / (180 * share)
    translate = 150 / 331  # of the side

    def kornia(name: str, low: float, high: float, m: float = magnitude) -> Operation:
        # The magnitude is annotated as a whole number, and only ever divided by 30.
        return partial(_by_policy, RandAugment(1, cast("int", m), [[(name, low, high)]], "skip"))

    def enhanced(adjust: Callable[[Tensor, Tensor], Tensor]) -> Operation:
        return lambda images, sign_B: adjust(images, 1 + sign_B * 0.9 * share)

    return [
        None,
        kornia("auto_contrast", 0.0, 1.0),
        kornia("equalize", 0.0, 1.0),
        kornia("posterize", 4.0, 8.0),
        kornia("solarize", 0.0, 1.0, _LARGEST - magnitude),  # above a threshold that falls with the magnitude
        kornia("rotate", -30.0, 30.0),
        kornia("shear_x", -shear, shear),
        kornia("shear_y", -shear, shear),
        kornia("translate_x", -translate, translate),
        kornia("translate_y", -translate, translate),
        kornia("sharpness", 1.0, 1.9),
        # What its policies call brightness, contrast and color are other operations than Pillow's; these are Pillow's.
        enhanced(adjust_brightness_accumulative),
        enhanced(adjust_contrast_with_mean_subtraction),
        enhanced(adjust_saturation_with_gray_subtraction),
    ]


_NEUTRAL = {
    "degrees": 0.0,
    "shear_x": 0.0,
    "shear_y": 0.0,
    "translate_x": 0.0,
    "translate_y": 0.0,
    "sharpness": 1.0,
}
"""Parameters of kornia's operations that go either way, and the value that changes nothing."""


def _by_policy(operation: RandAugment, images_BCHW: Tensor, sign_B: Tensor) -> Tensor:
    """Images after kornia's RandAugment of a single operation, in the direction of their signs."""
    # It draws signs of its own, which are replaced; the global generator stays where it is.
    with torch.random.fork_rng(devices=[]):
        drawn = operation.forward_parameters(images_BCHW.shape)
    values: Any = cast("Any", drawn[0].data)[0].data
    for name, neutral in _NEUTRAL.items():
        if name in values:
            values[name] = neutral + sign_B * (values[name] - neutral).abs()
    return cast("Tensor", operation(images_BCHW, params=drawn))
