"""AdamW with layer-wise learning rate decay: layers closer to the input get smaller learning rates."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from crate_ray.config import OptimConfig
from crate_ray.models.classifier import Classifier


class LayerwiseAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups scale their learning rate, which is set before each step, by `lr_scale`."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step with the learning rates that were set since the last step."""
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["lr_scale"]
        return super().step(closure)


def layer_of(name: str, depth: int) -> int:
    """Layer of a classifier's parameter: 0 for patch embedding and CLS token, 1 … depth for encoder layers, depth + 1
    for the head."""
    if match := re.match(r"autoencoder\.encoder\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if name.startswith("autoencoder.") else depth + 1


def build_layerwise_optimizer(model: Classifier, optim: OptimConfig, layer_decay: float) -> LayerwiseAdamW:
    """Fused AdamW with one parameter group for each layer and weight decay.

    As in MAE, learning rates decrease by the factor layer_decay from layer to layer below the head. There is no weight
    decay on biases, norms (1-D parameters) and tokens (`*_token`).
    """
    depth = len(model.encoder)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer, decays = layer_of(name, depth), parameter.ndim > 1 and not name.endswith("_token")
        new = {
            "params": [],
            "weight_decay": optim.weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, decays), new)["params"].append(parameter)
    return LayerwiseAdamW(list(groups.values()), lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)
