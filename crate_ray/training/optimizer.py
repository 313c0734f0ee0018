"""The optimizer and its learning rate. Plain torch: no Ray, no MLflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from crate_ray.config import OptimConfig
from crate_ray.models.parameters import decays, is_layer_matrix
from crate_ray.training.lion import Lion
from crate_ray.training.muon import MuonWithAdamW


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


def build_optimizer(
    model: nn.Module, optim: OptimConfig, lr_scale: Callable[[str], float] | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of the settings; weight decay as in `parameters.decays`.

    Like a fused optimizer of torch, it makes no step if its attribute `found_inf` is 1, without waiting for the device.
    `lr_scale` gives for a parameter's name the factor of its learning rate, which `train_step` applies.
    """
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        orthogonal = optim.optimizer == "muon" and is_layer_matrix(name, parameter)
        kind = orthogonal, lr_scale(name) if lr_scale else 1.0, decays(name, parameter)
        new = {"params": [], "weight_decay": optim.weight_decay if kind[2] else 0.0}
        if lr_scale:
            new["lr_scale"] = kind[1]
        groups.setdefault(kind, new)["params"].append(parameter)
    ordered = sorted(groups, reverse=True)
    if optim.optimizer == "lion":
        return Lion([groups[kind] for kind in ordered], optim.betas)
    matrices, others = ([groups[kind] for kind in ordered if kind[0] == orthogonal] for orthogonal in (True, False))
    if optim.optimizer == "muon":
        return MuonWithAdamW(matrices, others, betas=optim.betas, eps=optim.eps)
    return torch.optim.AdamW(others, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)
