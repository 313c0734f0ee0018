"""Label smoothing, mixup and CutMix of pairs, and drop path, with counter-based random numbers.

Shapes: B samples of this worker, C classes, P residual branches of all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_ray.config import AugmentConfig
from crate_ray.data.order.hashing import Int64, hash64, uniform
from crate_ray.finetuning.streams import STREAM_DROP_PATH, STREAM_MIX


class Mix(NamedTuple):
    """How the samples of a global batch are mixed with their partners."""

    weight: float
    """λ, the share of the sample itself. 1: nothing is mixed."""
    box: tuple[int, int, int, int] | None
    """CutMix: top, bottom, left and right of the partner's box; λ is the share of the area outside it. None: mixup."""


def draw_mix(seed: int, step: int, config: AugmentConfig, image_hw: tuple[int, int]) -> Mix:
    """The mix of a step's batch, a function of (seed, step) that is the same on all workers."""
    alphas = [config.mixup, config.cutmix]
    if not any(alphas):
        return Mix(1.0, None)
    random = np.random.Generator(np.random.Philox(key=int(hash64(seed, STREAM_MIX, step)[0])))
    cuts = random.random() < 0.5 if all(alphas) else bool(config.cutmix)
    weight = float(random.beta(alphas[cuts], alphas[cuts]))
    if not cuts:
        return Mix(weight, None)
    side = np.sqrt(1 - weight)
    span: list[int] = []
    for size in image_hw:  # a box with that share of the area around a random pixel, clipped to the image
        centre, length = int(random.integers(size)), int(size * side)
        span += [max(centre - length // 2, 0), min(centre + length // 2, size)]
    top, bottom, left, right = span
    return Mix(1 - (bottom - top) * (right - left) / (image_hw[0] * image_hw[1]), (top, bottom, left, right))


def mix_pairs(images_BCHW: Tensor, classes_BC: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Mix images and class probabilities of each sample with its partner, the other one of slots 2i and 2i + 1.

    The pairs follow from the random order of the data, and do not depend on the number of workers.
    """
    if mix.weight == 1:
        return images_BCHW, classes_BC
    partner_B = torch.arange(len(images_BCHW), device=images_BCHW.device) ^ 1
    classes_BC = mix.weight * classes_BC + (1 - mix.weight) * classes_BC[partner_B]
    others_BCHW = images_BCHW[partner_B]
    if mix.box is None:
        return mix.weight * images_BCHW + (1 - mix.weight) * others_BCHW, classes_BC
    top, bottom, left, right = mix.box
    images_BCHW = images_BCHW.clone()
    images_BCHW[:, :, top:bottom, left:right] = others_BCHW[:, :, top:bottom, left:right]
    return images_BCHW, classes_BC


def class_targets(labels: Int64, num_classes: int, smoothing: float) -> Tensor:
    """Class probabilities (B, C) of labels (B,): 1 − smoothing for the label, plus smoothing / C for every class."""
    one_hot = F.one_hot(torch.from_numpy(labels), num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


def branch_scales(seed: int, step: int, slots: tuple[int, int], branches: list[int], drop_path: float) -> Tensor | None:
    """Drop path's factors (B, P) for the slots [start, stop) of a step's batch, a function of (seed, step, slot).

    In layer l = 0 … L − 1, a branch is dropped (0) with probability drop_path · l / (L − 1). Other branches are scaled
    by 1 / (1 − rate), so that the expectation is 1. None if drop_path is 0.
    """
    if not drop_path:
        return None
    rates = np.repeat(np.linspace(0, drop_path, len(branches)), branches)
    columns = np.arange(len(rates))
    u = uniform(seed, STREAM_DROP_PATH, step, np.arange(*slots)[:, None], columns)
    return torch.from_numpy(np.where(u < rates, 0.0, 1 / (1 - rates)).astype(np.float32))
