"""Matrix products of layers in 8-bit floating point, by torchao.

Each row of a factor has its own scale. Gradients of weights are computed in bf16: torchao's recipe
'rowwise_with_gw_hp', its most accurate one. All uses of names that torchao does not document are in this file.
tests/unit/test_float8.py fails when they change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crate_ray.errors import UserError
from crate_ray.models.kernels.linear import product_dtype

_MULTIPLE = 16  # of both dimensions of a weight, for the GPU's 8-bit product


def use_float8(layers: Iterable[nn.Module], *, emulate: bool = False) -> None:
    """Let layers compute their matrix products in float8. Parameters and their names do not change.

    Layers of CRATE have the attribute `product`, which is replaced. In other layers, torchao replaces `nn.Linear`.

    Args:
        layers: encoder and decoder layers of a model.
        emulate: round as float8 does, but multiply in the input's dtype; for devices without float8.

    Raises:
        UserError: torchao is not installed, or the sizes do not fit.
    """
    try:
        from torchao.float8 import convert_to_float8_training
        from torchao.float8.config import Float8LinearConfig
        from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig
    except ImportError as error:
        raise UserError(
            f"training.float8 needs torchao ({error}); install it with pip install 'crate-ray[float8]'"
        ) from error
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=emulate)
    fast, exact = (ScaledMMConfig(emulate, fast_accumulation, False, False) for fast_accumulation in (True, False))
    product = partial(_float8_linear, config, LinearMMConfig(fast, exact, exact))
    for layer in layers:
        for name, weight in layer.named_parameters():
            if weight.ndim == 2 and any(size % _MULTIPLE for size in weight.shape):
                raise UserError(
                    f"training.float8 needs layers whose sizes are multiples of {_MULTIPLE}, and {name} is "
                    f"{tuple(weight.shape)}; change the model's dimensions or set training.float8 to false"
                )
        own = [module for module in layer.modules() if hasattr(module, "product")]
        for module in own:
            module.product = product  # type: ignore[assignment]
        if not own:
            convert_to_float8_training(layer, config=config)


def _float8_linear(config: Any, products: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in float8: x (…, I), weight (O, I) and bias (O,) to (…, O)."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    y = matmul_with_hp_or_float8_args.apply(x.to(product_dtype(weight)), weight.t(), products, config)
    return y if bias is None else y + bias.to(y.dtype)


def supports_float8(device: torch.device) -> bool:
    """Whether a device multiplies float8 numbers with scales by row: an NVIDIA GPU since Hopper."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
