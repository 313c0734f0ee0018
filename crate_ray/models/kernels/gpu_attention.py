"""Self-attention with query = key = value on GPUs, in Triton. Each token block is loaded once, and the backward pass
writes one gradient.

PyTorch's fused kernels load the same tensor three times, write three gradients, and add them. Here scores are
symmetric, s_ij = w_i·w_j / √P. So one block of scores gives the attention of i to j, p = exp(s_ij − l_i), and that of
j to i, p' = exp(s_ij − l_j), where l is the logarithm of a row's sum. With the output O, its gradient G and δ_i =
G_i·O_i, the gradient of row i is

    Σ_j [p (G_i·w_j − δ_i) + p' (G_j·w_i − δ_j)] w_j / √P  +  Σ_j p' G_j:

as query, as key, and as value. So each program computes the gradient of its rows alone: no atomic additions, no
temporary tensors. Shapes: B batch, K heads, T tokens, P dimension of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _WARPS = 64, 64, 4
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward_kernel(
    x, out, lse, batch_stride, head_stride, token_stride, out_batch_stride, out_head_stride, out_token_stride,
    heads, scale,
    T: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows of one head: softmax of the scores, column block by column block."""
    block, head = tl.program_id(0), tl.program_id(1)
    base = x + (head // heads) * batch_stride + (head % heads) * head_stride
    p = tl.arange(0, PADDED)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_mask = (rows[:, None] < T) & (p[None, :] < P)
    w_rows = tl.load(base + rows[:, None] * token_stride + p[None, :], mask=row_mask, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(0, T, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = (columns[:, None] < T) & (p[None, :] < P)
        w = tl.load(base + columns[:, None] * token_stride + p[None, :], mask=mask, other=0.0)
        scores = tl.dot(w_rows, tl.trans(w), input_precision="ieee") * (scale * _LOG2_E)
        scores = tl.where(columns[None, :] < T, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - now)
        weights = tl.exp2(scores - now[:, None])
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(w.dtype), w, input_precision="ieee")
        largest = now
    out_base = out + (head // heads) * out_batch_stride + (head % heads) * out_head_stride
    tl.store(
        out_base + rows[:, None] * out_token_stride + p[None, :],
        (summed / total[:, None]).to(out.dtype.element_ty),
        mask=row_mask,
    )
    tl.store(lse + head * T + rows, largest + tl.log2(total), mask=rows < T)


@triton.jit
def _backward_kernel(
    x, gradient, lse, delta, x_gradient,
    batch_stride, head_stride, token_stride, g_batch_stride, g_head_stride, g_token_stride,
    out_batch_stride, out_head_stride, out_token_stride,
    heads, scale,
    T: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows of one head: their gradient as query, key and value."""
    block, head = tl.program_id(0), tl.program_id(1)
    batch, inner = head // heads, head % heads
    base = x + batch * batch_stride + inner * head_stride
    g_base = gradient + batch * g_batch_stride + inner * g_head_stride
    p = tl.arange(0, PADDED)
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    row_mask = inside[:, None] & (p[None, :] < P)
    w_rows = tl.load(base + rows[:, None] * token_stride + p[None, :], mask=row_mask, other=0.0)
    g_rows = tl.load(g_base + rows[:, None] * g_token_stride + p[None, :], mask=row_mask, other=0.0)
    lse_rows = tl.load(lse + head * T + rows, mask=inside, other=float("inf"))
    delta_rows = tl.load(delta + head * T + rows, mask=inside, other=0.0)
    summed = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(0, T, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = columns < T
        mask = here[:, None] & (p[None, :] < P)
        w = tl.load(base + columns[:, None] * token_stride + p[None, :], mask=mask, other=0.0)
        g = tl.load(g_base + columns[:, None] * g_token_stride + p[None, :], mask=mask, other=0.0)
        lse_columns = tl.load(lse + head * T + columns, mask=here, other=float("inf"))
        delta_columns = tl.load(delta + head * T + columns, mask=here, other=0.0)
        scores = tl.dot(w_rows, tl.trans(w), input_precision="ieee") * (scale * _LOG2_E)
        of_rows = tl.where(here[None, :], tl.exp2(scores - lse_rows[:, None]), 0.0)
        of_columns = tl.exp2(scores - lse_columns[None, :])  # 0 outside, where lse is infinite
        as_query = of_rows * (tl.dot(g_rows, tl.trans(w), input_precision="ieee") - delta_rows[:, None])
        as_key = of_columns * (tl.dot(w_rows, tl.trans(g), input_precision="ieee") - delta_columns[None, :])
        summed += tl.dot(((as_query + as_key) * scale).to(w.dtype), w, input_precision="ieee")
        summed += tl.dot(of_columns.to(w.dtype), g, input_precision="ieee")
    out_base = x_gradient + batch * out_batch_stride + inner * out_head_stride
    tl.store(
        out_base + rows[:, None] * out_token_stride + p[None, :],
        summed.to(x_gradient.dtype.element_ty),
        mask=row_mask,
    )


def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(x xᵀ / √P) x of (B, K, T, P), and log2 of the rows' sums of exp, (B, K, T) float32.

    The last dimension must be contiguous. Of the output, tokens are contiguous over all heads, (B, T, K·P).
    """
    batch, heads, tokens, dim = x.shape
    assert x.stride(3) == 1
    out = torch.empty(batch, tokens, heads, dim, device=x.device, dtype=x.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, tokens, device=x.device, dtype=torch.float32)
    _forward_kernel[triton.cdiv(tokens, _ROWS), batch * heads](
        x, out, lse, *x.stride()[:3], *out.stride()[:3], heads, dim**-0.5,
        T=tokens, P=dim, PADDED=_padded(dim), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return out, lse


def backward(gradient: Tensor, x: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Gradient of x, (B, K, T, P), from that of `forward`'s output."""
    batch, heads, tokens, dim = x.shape
    if gradient.stride(3) != 1:
        gradient = gradient.contiguous()
    delta = (gradient.float() * out.float()).sum(-1).contiguous()
    x_gradient = torch.empty(batch, tokens, heads, dim, device=x.device, dtype=x.dtype).transpose(1, 2)
    _backward_kernel[triton.cdiv(tokens, _ROWS), batch * heads](
        x, gradient, lse, delta, x_gradient,
        *x.stride()[:3], *gradient.stride()[:3], *x_gradient.stride()[:3], heads, dim**-0.5,
        T=tokens, P=dim, PADDED=_padded(dim), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return x_gradient


def _padded(dim: int) -> int:
    """A power of two, and at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(dim))


# A custom operator, so that torch.compile does not look inside.
@torch.library.custom_op("crate_ray::fused_self_attention", mutates_args=(), device_types="cuda")
def _fused(x_BKTP: Tensor) -> tuple[Tensor, Tensor]:
    return forward(x_BKTP)


@torch.library.custom_op("crate_ray::fused_self_attention_backward", mutates_args=(), device_types="cuda")
def _fused_backward(gradient_BKTP: Tensor, x_BKTP: Tensor, out_BKTP: Tensor, lse_BKT: Tensor) -> Tensor:
    return backward(gradient_BKTP, x_BKTP, out_BKTP, lse_BKT)


@_fused.register_fake
def _(x_BKTP: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = x_BKTP.shape
    out = x_BKTP.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return out, x_BKTP.new_empty(batch, heads, tokens, dtype=torch.float32)


@_fused_backward.register_fake
def _(gradient_BKTP: Tensor, x_BKTP: Tensor, out_BKTP: Tensor, lse_BKT: Tensor) -> Tensor:
    batch, heads, tokens, dim = x_BKTP.shape
    return x_BKTP.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient_BKTP: Tensor, _: Tensor) -> Tensor:
    return _fused_backward(gradient_BKTP, *ctx.saved_tensors)


_fused.register_autograd(_backward, setup_context=_setup_context)


def self_attention(x: Tensor) -> Tensor:
    """softmax(x xᵀ / √P) x of (B, K, T, P) on a GPU, (B, K, T, P), whose tokens are contiguous over all heads."""
    return _fused(x)[0]
