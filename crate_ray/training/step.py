"""One optimizer step on one worker's part of a global batch, and what it needs. Plain torch: no Ray, no MLflow."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crate_ray.config import TrainingConfig
from crate_ray.data.order.hashing import STREAM_MASK, STREAM_PROBE, Int64, uniform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def autocast_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype | None:
    """Dtype of autocast: bf16 for 'bf16', and for 'auto' if the device supports it natively; None for plain fp32."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def prepare_cpu() -> None:
    """Change settings of this process that make steps on the CPU faster. Call it first: new threads inherit them.

    Denormal numbers are flushed to zero. Softmax produces many of them when tokens are far apart, and is several times
    slower with them. With glibc, freed memory is kept for the next step. Returning it to the system and requesting it
    again, page by page, would take a tenth of a step.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def mask_noise(seed: int, epochs: Int64, samples: Int64, num_patches: int) -> Tensor:
    """Noise that determines the masks, (n, num_patches) float32 in [0, 1). It depends on seed, epoch and sample only.

    Args:
        seed: of the run.
        epochs, samples: (n,) each.
        num_patches: of an image.
    """
    noise = uniform(seed, STREAM_MASK, epochs[:, None], samples[:, None], np.arange(num_patches))
    return torch.from_numpy(noise.astype(np.float32))


def probe_noise(samples: Int64, num_patches: int) -> Tensor:
    """Noise of one fixed mask per sample, the same in all runs, so that their losses can be compared."""
    return torch.from_numpy(uniform(STREAM_PROBE, samples[:, None], np.arange(num_patches)).astype(np.float32))


def num_micro_steps(training: TrainingConfig, world_size: int) -> int:
    """Forward passes per optimizer step, the same on every worker: as many as the largest local batch needs."""
    largest = -(-training.batch_size // world_size)
    return -(-largest // (training.micro_batch_size or largest))


def largest_micro_batch(training: TrainingConfig, world_size: int) -> int:
    """Samples of the largest forward pass on any worker."""
    local = -(-training.batch_size // world_size)
    return -(-local // num_micro_steps(training, world_size))


def micro_batches(count: int, parts: int) -> Iterator[slice]:
    """Slices that cut a local batch into parts of nearly equal size. Only the first may be empty."""
    for i in range(parts):
        yield slice(i * count // parts, (i + 1) * count // parts)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images_BCHW: Tensor,
    given: Any,
    *,
    batch_size: int,
    world_size: int = 1,
    micro_steps: int = 1,
    lr: float | Tensor,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the mean loss over the global batch, and make one optimizer step with it.

    Each sample weighs 1 / batch_size, regardless of how many samples a worker has. If the loss or the gradient of any
    worker is not finite, the optimizer changes nothing, not even its step counts.

    Args:
        model: returns `sample_loss`; wrapped in DistributedDataParallel, or sharded, if world_size > 1.
        optimizer: one that `build_optimizer` built, or a fused one of torch; others do not skip steps.
        images_BCHW: this worker's normalised images.
        given: the model's second argument, such as mask noise; sliced into micro-batches.
        batch_size: size of the global batch.
        world_size: number of workers.
        micro_steps: forward passes.
        lr: learning rate of this step; in a CUDA graph, a scalar tensor. It is multiplied by the `lr_scale` of a
            parameter group that has one.
        clip_norm: largest norm of the global gradient; None for no clipping.
        autocast: dtype of autocast; None for no autocast.

    Returns:
        Two scalars on the device, without waiting for it: this worker's sum of sample losses, and the norm of the
        global gradient before clipping. If the norm is not finite on one worker, it is not finite on all workers.
    """
    device_type = images_BCHW.device.type
    loss_sum = torch.zeros((), device=images_BCHW.device)
    optimizer.zero_grad(set_to_none=True)
    parts = list(micro_batches(len(images_BCHW), micro_steps))
    for i, part in enumerate(parts):
        images = images_BCHW[part]
        if not len(images):
            continue
        last = i == len(parts) - 1
        no_sync: Any = getattr(model, "no_sync", nullcontext)
        with nullcontext() if last else no_sync():
            with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None):
                sample_loss = model(images, given[part]).sample_loss
            part_sum = sample_loss.float().sum()
            # DistributedDataParallel averages over the workers. Multiplying by world_size gives the global sum. A loss
            # that is not finite may have a finite gradient, so the weight NaN passes it on to all workers.
            weight = torch.where(part_sum.detach().isfinite(), world_size / batch_size, math.nan)
            (part_sum * weight).backward()
        loss_sum += part_sum.detach()
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    fused: Any = optimizer  # a step is skipped with the attributes that torch.amp.GradScaler uses
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        fused.found_inf = (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if "lr_scale" in group else lr
    optimizer.step()
    return loss_sum, norm


def discard_step(model: nn.Module, images_BCHW: Tensor, given: Any, autocast: torch.dtype | None = None) -> None:
    """One forward and one backward pass whose gradients are discarded.

    DistributedDataParallel rebuilds its buckets after the first backward pass. With three or more workers, this changes
    the order of summation. Calling this before the first real step, in new and resumed runs, keeps both bitwise equal.
    """
    with torch.autocast(images_BCHW.device.type, dtype=autocast, enabled=autocast is not None):
        sample_loss = model(images_BCHW, given).sample_loss
    (sample_loss.sum() * 0.0).backward()
    model.zero_grad(set_to_none=True)
