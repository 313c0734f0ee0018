"""Floating-point operations (FLOPs) of a training step, and the peak rate of GPUs. Both give the MFU.

FLOPs are counted by PyTorch's `FlopCounterMode` while a step runs on the meta device, which has shapes but no data. It
counts matrix products of the forward and the backward pass, as two operations per multiply-add, and no elementwise
operations. The step runs without activation checkpointing, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crate_ray.config import CrateMAEConfig, ModelConfig
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.reference import ReferenceCrateMAE

GPU_PEAK_FLOPS: dict[str, float] = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "MI300X": 1307e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L20": 119.5e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX PRO 6000": 504e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Peak FLOP/s in bf16 (V100 and T4: fp16) with fp32 accumulation and without sparsity, from the vendors' data sheets.
The keys are words of the name that torch.cuda.get_device_name returns; the first match counts."""


def gpu_peak_flops(name: str) -> float | None:
    """Peak FLOP/s in bf16 of a GPU by its name, as its vendor states it; None if the GPU is not listed.

    None too for a part of a GPU (MIG), whose name is that of the whole one with its profile.
    """
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((peak for part, peak in GPU_PEAK_FLOPS.items() if f" {part} " in words), None)


@lru_cache(maxsize=256)
def training_flops(config: ModelConfig, batch_size: int) -> int:
    """FLOPs of one forward and backward pass of a model over a batch of images."""
    return _count(build_model, config, batch_size)


@lru_cache(maxsize=256)
def reference_training_flops(config: CrateMAEConfig, batch_size: int) -> int:
    """FLOPs of one forward and backward pass of `ReferenceCrateMAE`, whose ISTA takes three products."""
    return _count(ReferenceCrateMAE, config, batch_size)


@lru_cache(maxsize=256)
def encoding_flops(config: ModelConfig) -> int:
    """FLOPs of the encoder for one image, of which it sees all patches."""

    def measure(model: nn.Module) -> int:
        assert isinstance(model, MaskedAutoencoder)
        images = torch.empty(1, config.channels, *config.image_hw, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            z_BTD, _ = model.embed(images)
            for layer in model.encoder:
                z_BTD = layer(z_BTD)
        return counter.get_total_flops()

    return by_layers(build_model, config, measure)


def _count(build: Callable[[Any], nn.Module], config: ModelConfig, batch_size: int) -> int:
    return by_layers(build, config, lambda model: count_step(model, config, batch_size))


def by_layers(build: Callable[[Any], nn.Module], config: ModelConfig, measure: Callable[[nn.Module], int]) -> int:
    """Measure models on the meta device that have few layers, and extrapolate to the layers of the config.

    All layers of a stack are equal, and measuring each takes time.
    """
    assert config.decoder_depth is not None  # set by the config's validation

    def count(depth: int, decoder_depth: int) -> int:
        with torch.device("meta"):
            model = build(config.model_copy(update={"depth": depth, "decoder_depth": decoder_depth}))
        return measure(model.to("meta"))  # buffers are on the meta device only now

    smallest = count(1, 1)
    encoder_layer, decoder_layer = count(2, 1) - smallest, count(1, 2) - smallest
    return smallest + (config.depth - 1) * encoder_layer + (config.decoder_depth - 1) * decoder_layer


def count_step(model: nn.Module, config: ModelConfig, batch_size: int) -> int:
    """FLOPs of a forward and backward pass of a model that is on the meta device."""
    images = torch.empty(batch_size, config.channels, *config.image_hw, device="meta")
    noise = torch.empty(batch_size, config.num_patches, device="meta")
    # Attention as explicit products: the counter does not know every fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, noise).sample_loss.sum().backward()
    return counter.get_total_flops()
