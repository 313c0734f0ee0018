"""Attention, implemented for speed on each device. Shapes: B batch, T tokens, K heads, P dimension of a head.

In CRATE a head is a subspace of the codebook.
"""

from __future__ import annotations

from collections.abc import Callable

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
    if x.device.type == "cuda" and (x.shape[-2], x.shape[-1], x.dtype) in _fused_is_faster:
        from crate_ray.models.kernels import gpu_attention

        return gpu_attention.self_attention(x)
    return F.scaled_dot_product_attention(x, x, x)


def visible_attention(x: Tensor, visible: Tensor) -> Tensor:
    """As `self_attention`, but each token attends to the visible tokens, (B, T) bool, and to itself only."""
    allowed_BTT = _allowed(visible)[:, None]
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-2] < _MAX_EXPLICIT_TOKENS:
        return visible_maps(x, visible) @ x
    return F.scaled_dot_product_attention(x, x, x, attn_mask=allowed_BTT)


def visible_maps(x: Tensor, visible: Tensor) -> Tensor:
    """The attention maps of `visible_attention`, (B, K, T, T)."""
    scores_BKTT = (x * x.shape[-1] ** -0.5) @ x.transpose(-1, -2)
    return scores_BKTT.masked_fill(~_allowed(visible)[:, None], -torch.inf).softmax(-1)


def _allowed(visible_BT: Tensor) -> Tensor:
    tokens = visible_BT.shape[1]
    return visible_BT[:, None, :] | torch.eye(tokens, dtype=torch.bool, device=visible_BT.device)


_fused_is_faster: set[tuple[int, int, torch.dtype]] = set()
"""Tokens, dimension and dtype for which `choose_self_attention` has found the Triton kernel to be faster."""


def choose_self_attention(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> str:
    """Measure self-attention of this shape on the current GPU, and use what is faster from now on.

    The Triton kernel is used only if it gives the same numbers as PyTorch's kernel, up to rounding, and takes less
    time, forward and backward. Returns a sentence with the outcome, for the log.
    """
    try:
        from crate_ray.models.kernels import gpu_attention

        x = torch.randn(batch, tokens, heads * dim, device="cuda", dtype=dtype)
        theirs, their_gradient, their_seconds = _measure(lambda w: F.scaled_dot_product_attention(w, w, w), x, heads)
        ours, our_gradient, our_seconds = _measure(gpu_attention.self_attention, x, heads)
    except Exception as error:  # no Triton, or its kernel does not compile on this GPU: it is only an option
        return f"attention by PyTorch's kernel; the Triton kernel failed ({str(error).strip().partition(chr(10))[0]})"
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in ((ours, theirs), (our_gradient, their_gradient))
    ]
    ratio = their_seconds / our_seconds
    if max(differences) > _ROUNDING[dtype]:
        return f"attention by PyTorch's kernel; the Triton kernel differs by {max(differences):.2g}"
    if ratio <= 1:
        return f"attention by PyTorch's kernel; the Triton kernel has {ratio:.2f} times its speed"
    _fused_is_faster.add((tokens, dim, dtype))
    return f"attention by the Triton kernel, {ratio:.2f} times as fast as PyTorch's"


_ROUNDING = {torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest relative difference of two kernels that are both right."""


def _measure(kernel: Callable[[Tensor], Tensor], x_BTC: Tensor, num_heads: int) -> tuple[Tensor, Tensor, float]:
    """Output, gradient, and seconds of a forward and backward pass."""
    x_BTC = x_BTC.clone().requires_grad_()

    def both() -> Tensor:
        x_BTC.grad = None
        out_BTC = merge_heads(kernel(split_heads(x_BTC, num_heads)))
        out_BTC.backward(x_BTC.detach())
        return out_BTC

    for _ in range(3):
        out_BTC = both()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_MEASURED_PASSES):
        both()
    end.record()
    end.synchronize()
    assert x_BTC.grad is not None
    return out_BTC.detach(), x_BTC.grad, start.elapsed_time(end) / 1e3 / _MEASURED_PASSES


_MEASURED_PASSES = 10
