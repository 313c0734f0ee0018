"""Kinds of a model's parameters that optimizers treat differently, by name and shape."""

from __future__ import annotations

import re

from torch import Tensor

_LAYER = re.compile(r"(^|\.)(encoder|decoder)\.\d+\.")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay: not biases, norms and factors (one dimension), tokens and positions."""
    return parameter.ndim > 1 and not name.endswith(("_token", "positions"))


def is_layer_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of an encoder or decoder layer.

    These are U, W, D, D′ and E of CRATE, and the maps of attention and of the MLP of ViT. Patch embedding, prediction,
    the map from encoder to decoder tokens, and a classifier's head are outside the layers.
    """
    return parameter.ndim == 2 and _LAYER.search(name) is not None
