"""The optimizer Lion. Plain torch: no Ray, no MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Lion (algorithm 2 of arXiv 2302.06675): each number of a weight moves by the learning rate, in one direction.

        c_t = β₁ m_{t−1} + (1 − β₁) g_t;   θ_t = θ_{t−1} − η (sign(c_t) + λ θ_{t−1});   m_t = β₂ m_{t−1} + (1 − β₂) g_t

    The step never waits for the device, works in a CUDA graph, and takes a learning rate that is a tensor. Parameters
    may be sharded. Set `found_inf` as for a fused optimizer of torch: if it is 1, the step changes nothing.

    Args:
        groups: parameter groups, each with its `weight_decay` λ.
        betas: β₁ and β₂.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make a step."""
        assert closure is None
        for group in self.param_groups:
            lr, weight_decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                direction = average.lerp(gradient, 1 - beta1).sign_()
                self._replace(parameter, parameter * (1 - lr * weight_decay) - direction * lr)
                self._replace(average, average.lerp(gradient, 1 - beta2))

    def _replace(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))
