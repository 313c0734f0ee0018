"""A training step as one CUDA graph. Plain torch: no Ray, no MLflow.

The CPU launches the kernels of a step one by one. For small models and small batches this takes longer than the kernels
themselves. A CUDA graph is captured once, and then launches all kernels of a step at once.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Step(Protocol):
    """An optimizer step, such as `train_step` with all its settings."""

    def __call__(self, images_BCHW: Tensor, given: Any, *, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of sample losses, and the norm of the gradient."""


class GraphedStep:
    """An optimizer step that is captured in a CUDA graph when it is called for the first time.

    All calls need inputs of the same shapes. Nothing outside the step may replace weights or optimizer state; writing
    into them is allowed. If the step cannot be captured, a warning is logged, and it runs without a graph.

    Args:
        step: for one worker; it neither waits for the device nor draws random numbers. It must change nothing if its
            loss is not finite, as `train_step` does.
        optimizer: the step's optimizer.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self._step, self._optimizer = step, optimizer
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False
        self._images: Tensor
        self._given: Any
        self._lr: Tensor
        self._results: tuple[Tensor, Tensor]

    def __call__(self, images_BCHW: Tensor, given: Any, *, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        """Make a step. Returns its two results, without waiting for them."""
        if self._graph is None and not self._failed:
            self._capture(images_BCHW, given)
        if self._graph is None:
            return self._step(images_BCHW, given, lr=lr)
        _map(lambda mine, new: mine.copy_(new, non_blocking=True), self._images, images_BCHW)
        _map(lambda mine, new: mine.copy_(new, non_blocking=True), self._given, given)
        self._lr.fill_(lr)
        self._graph.replay()
        loss_sum, norm = self._results
        return loss_sum.clone(), norm.clone()  # the next step overwrites them

    @property
    def is_captured(self) -> bool:
        """Whether steps run in a CUDA graph."""
        return self._graph is not None

    def _capture(self, images_BCHW: Tensor, given: Any) -> None:
        """Capture a step with copies of these inputs. No step is made."""
        self._images, self._given = images_BCHW.clone(), _map(torch.clone, given)
        self._lr = torch.zeros((), device=images_BCHW.device)
        try:
            self._warm_up()
            for group in self._optimizer.param_groups:
                group["capturable"] = True
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate memory meanwhile: the loader prepares batches.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = self._step(self._images, self._given, lr=self._lr)
        except Exception as error:  # of any kind; without a graph the step works
            self._failed = True
            for group in self._optimizer.param_groups:
                group["capturable"] = False
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step cannot be captured in a CUDA graph, training continues without (%s)", reason)
            return
        self._graph = graph

    def _warm_up(self) -> None:
        """Let libraries and the optimizer allocate what they keep, by steps that change nothing: images of NaN."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(torch.full_like(self._images, math.nan), self._given, lr=self._lr)
        current.wait_stream(side)


def _map(function: Callable[..., Tensor], given: Any, *others: Any) -> Any:
    """Apply a function to a tensor, or to all tensors of a dataclass, together with those at the same place."""
    if isinstance(given, Tensor):
        for other in others:
            assert other.shape == given.shape, "a CUDA graph needs inputs of the same shapes in each step"
        return function(given, *others)
    names = [field.name for field in dataclasses.fields(given) if getattr(given, field.name) is not None]
    return dataclasses.replace(
        given, **{name: _map(function, getattr(given, name), *(getattr(o, name) for o in others)) for name in names}
    )
