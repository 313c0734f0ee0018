"""One optimizer step on one worker's part of a global batch, and what it needs. Plain torch: no Ray, no MLflow."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crate_ray.config import OptimConfig, TrainingConfig
from crate_ray.data.order.hashing import STREAM_MASK, STREAM_PROBE, Int64, uniform

logger = logging.getLogger(__name__)

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

    Denormal numbers are flushed to zero: softmax produces many of them when tokens are far apart, and is several times
    slower with them. With glibc, freed memory is kept for the next step: returning it to the system and requesting it
    again, page by page, takes a tenth of a step.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def should_compile(choice: Literal["auto", "layers", "off"], device: torch.device) -> bool:
    """Whether to compile layers on a device, for a value of training.compile."""
    return choice == "layers" or (choice == "auto" and device.type == "cuda")


def compile_layers(
    model: nn.Module, layers: Sequence[nn.Module], inputs: tuple[Tensor, Any], autocast: torch.dtype | None = None
) -> bool:
    """Compile layers of a model in place; returns whether that worked. If not, a warning is logged and the model is as
    before.

    Layers of one kind share one program. It is compiled here, by a discarded step on the inputs, which have as many
    samples as the largest micro-batch. Another number of samples is compiled when it first occurs; a layer for which
    that fails continues uncompiled. Passes without gradients, as in validation, stay uncompiled. Call this before the
    model is wrapped or sharded. The names of parameters do not change.
    """
    # Otherwise the backward half is compiled in the first backward pass, when a failure can no longer be replaced.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    compilation = _Compilation()
    for layer in layers:
        _compile_in_training(layer, compilation)
    try:
        discard_step(model, *inputs, autocast)
    except Exception as error:  # of any kind: no compiler, out of memory, an error in the compiler
        for layer in layers:
            del layer.forward
        model.zero_grad(set_to_none=True)
        logger.warning("layers cannot be compiled, training continues without it (%s)", _described(error))
        return False
    compilation.has_worked = True
    return True


@dataclass
class _Compilation:
    """State that the compiled layers of a model share."""

    has_worked: bool = False
    """Compiling has worked for the first number of samples."""
    has_failed: bool = False
    """Compiling has failed for another number, and a warning was logged."""


def _compile_in_training(layer: nn.Module, compilation: _Compilation) -> None:
    eager = layer.forward
    compiled = torch.compile(eager, dynamic=False)

    def forward(*inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return eager(*inputs)
        try:
            return compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # of compiling: nothing was computed yet
            if not compilation.has_worked:
                raise
            if not compilation.has_failed:
                shape, compilation.has_failed = list(inputs[0].shape), True
                logger.warning(
                    "layers cannot be compiled for tokens of shape %s, training continues with them uncompiled (%s)",
                    shape,
                    _described(error),
                )
        # This layer only: with activation checkpointing, the layers before it are computed again in this pass, and have
        # to be computed in the same way.
        del layer.forward
        return eager(*inputs)

    # Not the layer as a whole, so that hooks, such as FSDP's, stay outside.
    layer.forward = forward


def _described(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)  # the compiler's exception inside Dynamo's
    reason = str(cause).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {reason}"


def peak_learning_rate(optim: OptimConfig, batch_size: int) -> float:
    """optim.lr, or base_lr × batch / 256 (the linear scaling rule of MAE)."""
    return optim.lr if optim.lr is not None else optim.base_lr * batch_size / 256


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Length of the warm-up in steps: optim.warmup if it is at least 1, else that share of the run."""
    return int(optim.warmup) if optim.warmup >= 1 else round(optim.warmup * total_steps)


def learning_rate(step: int, total_steps: int, optim: OptimConfig, batch_size: int) -> float:
    """Learning rate of step 0, 1, …: linear warm-up to the peak, then a half cosine to min_lr at the last step
    (MAE)."""
    peak, warmup = peak_learning_rate(optim, batch_size), warmup_steps(optim, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; no weight decay on biases, norms (one dimension) and tokens (`*_token`)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim > 1 and not name.endswith("_token")
        (decayed if plain else free).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


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
    lr: float,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the mean loss over the global batch, and make one optimizer step with it.

    Each sample weighs 1 / batch_size, however many samples a worker has. If the loss or the gradient of any worker is
    not finite, the optimizer changes nothing, its step counts included (an optimizer that is not fused cannot do that).

    Args:
        model: returns `sample_loss`; wrapped in DistributedDataParallel, or sharded, if world_size > 1.
        optimizer: a fused one.
        images_BCHW: this worker's normalised images.
        given: the model's second argument, such as mask noise; sliced into micro-batches.
        batch_size: size of the global batch.
        world_size: number of workers.
        micro_steps: forward passes.
        lr: learning rate of this step.
        clip_norm: largest norm of the global gradient; None for no clipping.
        autocast: dtype of autocast; None for no autocast.

    Returns:
        Two scalars on the device, without waiting for it: this worker's sum of sample losses, and the norm of the
        global gradient before clipping, which is not finite on any worker if it is not finite on one.
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
            # DistributedDataParallel averages over the workers; times world_size makes that the global sum. A loss
            # that is not finite may have a finite gradient: the weight NaN passes it on to all workers.
            weight = torch.where(part_sum.detach().isfinite(), world_size / batch_size, math.nan)
            (part_sum * weight).backward()
        loss_sum += part_sum.detach()
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    fused: Any = optimizer  # skips a step in the way that torch.amp.GradScaler uses
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        fused.found_inf = (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss_sum, norm


def discard_step(model: nn.Module, images_BCHW: Tensor, given: Any, autocast: torch.dtype | None = None) -> None:
    """One forward and one backward pass whose gradients are discarded.

    DistributedDataParallel rebuilds its buckets after the first backward pass, and with three or more workers the order
    of summation changes with them. Doing this before the first real step of a new run and of a resumed one keeps the
    two bitwise equal.
    """
    with torch.autocast(images_BCHW.device.type, dtype=autocast, enabled=autocast is not None):
        sample_loss = model(images_BCHW, given).sample_loss
    (sample_loss.sum() * 0.0).backward()
    model.zero_grad(set_to_none=True)
