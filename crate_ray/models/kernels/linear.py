"""Matrix products that save no cast copies of the weights for the backward pass.

Under autocast, PyTorch saves a cast copy of every weight for the backward pass. With a small batch these copies are a
large part of the memory. Casting again in the backward pass costs less than 1 % of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[..., Tensor]
"""A function with the arguments and the result of `linear`."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias): x (…, I), weight (O, I) and bias (O,) to (…, O).

    `weight` is a parameter or the transpose of one.
    """
    dtype = product_dtype(weight)
    return F.linear(x, weight, bias) if dtype == weight.dtype else _CastLinear.apply(x.to(dtype), weight, bias)


def gram(weight: Tensor) -> Tensor:
    """weightᵀ weight, (I, I), of a parameter (O, I), with one product instead of two in the backward pass."""
    return _Gram.apply(weight, product_dtype(weight))


def product_dtype(weight: Tensor) -> torch.dtype:
    """Dtype in which products with an fp32 tensor are computed here: that of autocast, if it is on."""
    device_type = weight.device.type
    # Autocast does not cast float64, and FSDP may have cast the weight already. The meta device has no autocast.
    if weight.dtype == torch.float32 and not weight.is_meta and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        weight_gradient = (rows.t() @ x.flatten(0, -2)).to(weight.dtype)
        bias_gradient = None if ctx.bias_dtype is None else rows.sum(0).to(ctx.bias_dtype)
        return gradient @ weight.to(x.dtype), weight_gradient, bias_gradient


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, dtype: torch.dtype) -> Tensor:
        cast = weight.to(dtype)
        return cast.t() @ cast

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (weight.to(gradient.dtype) @ (gradient + gradient.t())).to(weight.dtype), None
