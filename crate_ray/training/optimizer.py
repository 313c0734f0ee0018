"""The optimizer and its learning rate. Plain torch: no Ray, no MLflow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from crate_ray.config import OptimConfig


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
