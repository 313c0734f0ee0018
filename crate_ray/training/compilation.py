"""Compiles the layers of a model, and falls back to eager layers where that fails.

All uses of private names of the compiler are in this file. tests/unit/test_compilation.py fails when they change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crate_ray.config.training import Compile
from crate_ray.errors import UserError
from crate_ray.training.step import discard_step

logger = logging.getLogger(__name__)


def should_compile(choice: Compile, device: torch.device) -> bool:
    """Whether to compile layers on a device, for a value of training.compile."""
    return choice in ("layers", "autotune") or (choice == "auto" and device.type == "cuda")


def compile_layers(
    model: nn.Module,
    layers: Sequence[nn.Module],
    inputs: tuple[Tensor, Any],
    autocast: torch.dtype | None = None,
    *,
    required: bool = False,
    autotune: bool = False,
) -> bool:
    """Compile layers of a model in place. Returns whether this worked.

    With `autotune`, Inductor measures several kernels for each matrix product. Kernels of its own do the operations
    after the product before they write the result.

    If it fails, a warning is logged and the model does not change, or UserError is raised if compiling is `required`.

    Layers of one kind share one program. It is compiled here, by a discarded step on the inputs, which have as many
    samples as the largest micro-batch. The program for another number of samples is compiled when it first occurs. If
    that fails for a layer, the layer continues without compilation. Passes without gradients, as in validation, are not
    compiled. Call this before the model is wrapped in DDP. A sharded model (FSDP2) is compiled after it was sharded.
    It cannot be restored after a failure, so compiling is required then. The names of parameters do not change.
    """
    # Here, because they take a second and most processes do not compile.
    import torch._dynamo.exc
    import torch._functorch.config

    # Otherwise the backward half is compiled in the first backward pass, when it is too late to fall back to eager.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    compilation = _Compilation()
    for layer in layers:
        _compile_in_training(layer, compilation, "max-autotune-no-cudagraphs" if autotune else None)
    try:
        discard_step(model, *inputs, autocast)
    except Exception as error:  # of any kind: no compiler, out of memory, an error in the compiler
        for layer in layers:
            del layer.forward
        model.zero_grad(set_to_none=True)
        if required:
            raise UserError(f"layers cannot be compiled ({_described(error)}); set training.compile to off") from error
        logger.warning("layers cannot be compiled, training continues without compilation (%s)", _described(error))
        return False
    compilation.has_worked = True
    return True


@contextmanager
def eager_layers(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Context manager in which layers run without compilation, also in passes with gradients.

    Their programs stay as they are. Otherwise an odd number of images would be compiled anew.
    """
    compiled = {layer: vars(layer).pop("forward") for layer in layers if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in compiled.items():
            layer.forward = forward


@dataclass
class _Compilation:
    """State that the compiled layers of a model share."""

    has_worked: bool = False
    """Compiling has worked for the first number of samples."""
    has_failed: bool = False
    """Compiling has failed for another number, and a warning was logged."""


def _compile_in_training(layer: nn.Module, compilation: _Compilation, mode: str | None) -> None:
    eager = layer.forward
    compiled = torch.compile(eager, dynamic=False, mode=mode)

    def forward(*inputs: Tensor, **masked: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return eager(*inputs, **masked)
        try:
            return compiled(*inputs, **masked)
        except torch._dynamo.exc.TorchDynamoException as error:  # compiling failed, before anything was computed
            if not compilation.has_worked:
                raise
            if not compilation.has_failed:
                shape, compilation.has_failed = list(inputs[0].shape), True
                logger.warning(
                    "layers cannot be compiled for tokens of shape %s, training continues with them uncompiled (%s)",
                    shape,
                    _described(error),
                )
        # Only for this layer. With activation checkpointing, the layers before it are computed again in this pass, and
        # this has to be done in the same way.
        del layer.forward
        return eager(*inputs, **masked)

    # Replace only `forward`, so that the layer's hooks, such as FSDP's, are not compiled.
    layer.forward = forward


def _described(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)  # Dynamo's exception wraps that of the compiler
    reason = str(cause).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {reason}"
