"""Triton kernels, in Triton's interpreter, against PyTorch's; and that they compile for an H100 and H200."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")

from crate_ray.models.kernels import gpu_attention  # noqa: E402
from crate_ray.models.kernels.attention import split_heads  # noqa: E402


def expected(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's self-attention in float64, and its gradient."""
    x = x.double().requires_grad_()
    out = F.scaled_dot_product_attention(x, x, x)
    out.backward(gradient.double())
    assert x.grad is not None
    return out.detach(), x.grad


@settings(max_examples=12)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 3), tokens=st.integers(1, 140), dim=st.sampled_from([3, 16, 24, 48]),
    scale=st.sampled_from([0.1, 1.0, 6.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_self_attention_and_its_gradient(
    batch: int, heads: int, tokens: int, dim: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = split_heads(scale * torch.randn(batch, tokens, heads * dim), heads)
    gradient = torch.randn(batch, tokens, heads, dim).transpose(1, 2)
    out, lse = gpu_attention.forward(x)
    x_gradient = gpu_attention.backward(gradient, x, out, lse)
    right, right_gradient = expected(x, gradient)
    torch.testing.assert_close(out.double(), right, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(x_gradient.double(), right_gradient, rtol=1e-3, atol=1e-4 * scale * max(1, dim**0.5))


def test_it_is_an_operator_with_a_gradient_in_half_precision_on_the_device() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 70, 3 * 16, device="cuda", dtype=torch.float16).requires_grad_()  # the interpreter has no bf16
    out = gpu_attention.self_attention(split_heads(x, 3))
    assert out.transpose(1, 2).is_contiguous() and out.dtype == torch.float16
    gradient = torch.randn_like(out)
    out.backward(gradient)
    right, right_gradient = expected(split_heads(x.detach().cpu(), 3), gradient.cpu())
    assert x.grad is not None
    found = split_heads(x.grad.cpu().double(), 3)
    assert (out.cpu().double() - right).abs().max() < 0.01 * right.abs().max()
    assert (found - right_gradient).abs().max() < 0.01 * right_gradient.abs().max()


def test_kernels_compile_for_hopper() -> None:
    """In a process in which Triton compiles instead of interpreting. It needs no GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == 8
    for kernel in built:
        # 64 K registers and 227 KiB of shared memory for all threads of a multiprocessor: at least two blocks fit.
        assert kernel["uses tensor cores"] and kernel["shared"] <= 113 * 1024, kernel


COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from crate_ray.models.kernels import gpu_attention as ours

for kernel in (ours._forward_kernel, ours._backward_kernel):
    for dim in (32, 48, 64, 128):
        constants = {"T": 197, "P": dim, "PADDED": ours._padded(dim), "ROWS": ours._ROWS, "COLUMNS": ours._COLUMNS}
        types = {"lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
        pointers = {"x", "out", "gradient", "x_gradient"}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*bf16" if name in pointers else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": ours._WARPS}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = built.asm["ptx"]
        found = {"uses tensor cores": "wgmma" in ptx or "mma.sync" in ptx, "shared": built.metadata.shared}
        print(json.dumps({"kernel": kernel.fn.__name__, "dim": dim, "wgmma": "wgmma" in ptx, **found}))
"""
