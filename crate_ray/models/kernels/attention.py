"""Attention, implemented for speed on each device. Shapes: B batch, T tokens, K heads, P dimension of a head.

In CRATE a head is a subspace of the codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_ray.models.kernels import cpu_attention

_MAX_EXPLICIT_TOKENS = 2048
"""Up to this number of tokens, explicit attention maps are faster in bf16 on the CPU."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, K·P), all heads side by side, as (B, K, T, P)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, K, T, P) as (B, T, K·P): the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def attention_maps(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q kᵀ / √P) of (B, K, T, P), (B, K, T, T); rows sum to one."""
    scale = query.shape[-1] ** -0.5
    return torch.softmax((query * scale) @ key.transpose(-1, -2), dim=-1)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √P) v of (B, K, T, P), (B, K, T, P).

    Uses PyTorch's fused kernel, which never stores the maps (B, K, T, T). In bf16 on the CPU the fused kernel is slow:
    forward and backward pass take 2.1 times as long as with explicit maps at 197 tokens, and 2.3 times at 1,025. There
    it is used only from 2,048 tokens on, where maps are large and both forms are equally fast.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] < _MAX_EXPLICIT_TOKENS:
        return attention_maps(query, key) @ value
    return F.scaled_dot_product_attention(query, key, value)


def self_attention(x: Tensor) -> Tensor:
    """softmax(x xᵀ / √P) x of (B, K, T, P), (B, K, T, P): attention with query = key = value.

    No implementation stores attention maps for the backward pass.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_exporting():
        return cpu_attention.self_attention(x.flatten(0, 1).contiguous()).unflatten(0, x.shape[:2])
    return F.scaled_dot_product_attention(x, x, x)
