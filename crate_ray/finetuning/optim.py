"""Layer-wise learning rate decay: layers closer to the input get smaller learning rates."""

from __future__ import annotations

import re

import torch

from crate_ray.config import OptimConfig
from crate_ray.models.classifier import Classifier
from crate_ray.training.optimizer import build_optimizer


def layer_of(name: str, depth: int) -> int:
    """Layer of a classifier's parameter: 0 for patch embedding, CLS token and positions, 1 … depth for encoder layers,
    depth + 1 for the head."""
    if match := re.match(r"autoencoder\.encoder\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if name.startswith("autoencoder.") else depth + 1


def build_layerwise_optimizer(model: Classifier, optim: OptimConfig, layer_decay: float) -> torch.optim.Optimizer:
    """Build the optimizer of the settings.

    As in MAE, learning rates decrease by the factor layer_decay from layer to layer below the head.
    """
    depth = len(model.encoder)
    return build_optimizer(model, optim, lambda name: layer_decay ** (depth + 1 - layer_of(name, depth)))
