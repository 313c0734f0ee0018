"""CUDA graphs on the emulated device: capturing computes nothing, replaying computes the same with new contents.

During a capture the operations run, because results are needed to continue. What they change outside the capture is
restored at its end. A replay runs them again on the same tensors, and writes results to where the capture had them. As
on a GPU, Python does not run in a replay, numbers are constants, and the host must not wait during a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Operation(NamedTuple):
    """A captured operation."""

    function: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    """Tensors that it has made, which are no views."""


class CUDAGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def replay(self) -> None:
        """Run the captured operations."""
        with torch.no_grad():
            for operation in self.operations:
                results = _tensors(operation.function(*operation.args, **operation.kwargs))
                for captured, result in zip(operation.results, results if operation.results else (), strict=True):
                    captured.copy_(result)


class Capture(TorchDispatchMode):
    """Stands in for torch.cuda.graph.

    Args:
        graph: gets the operations.
        position, waits_since: of the device's events.
    """

    running = False
    """Whether there is a capture."""
    position: Callable[[], int]
    waits_since: Callable[[int], list[Any]]

    def __init__(self, graph: CUDAGraph, capture_error_mode: str = "global") -> None:
        super().__init__()
        self.graph = graph
        self.own: dict[int, Any] = {}
        """Storages made during the capture."""
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """Other tensors that are written to, with their contents before."""

    def __enter__(self) -> Capture:
        self.start, Capture.running = type(self).position(), True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Capture.running = False
        for tensor, contents in self.before.values():
            tensor.copy_(contents)
        if (waits := type(self).waits_since(self.start)) and error[0] is None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {waits[0].detail}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    self._keep(tensor)
        out = func(*args, **kwargs)
        mutates = func._schema.is_mutable
        results = [] if func.is_view or mutates else _tensors(out)
        for tensor in results:
            self.own[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        if any(tensor.device.type == "cuda" for tensor in (*_tensors((args, kwargs)), *results)):
            # Numbers of the host are constants in a graph.
            args, kwargs = tree_map(lambda leaf: _constant(leaf), (args, kwargs))
            self.graph.operations.append(Operation(func, args, kwargs, results))
        return out

    def _keep(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.own and place not in self.before:
            # All of the storage, because another view of it may be written to later.
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            self.before[place] = (whole, whole.clone())


def _constant(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.device.type == "cpu" else leaf


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
