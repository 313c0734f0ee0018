"""Logistic regression in torch with scikit-learn's objective, for features that do not fit in memory.

Each evaluation of the objective is one pass over batches of the (memory-mapped) features, on any device. Only one batch
is in memory. To use some of the rows, pass their numbers: features[rows] would copy them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_BATCH_BYTES = 2**26


class LinearProbe(NamedTuple):
    """A fitted linear classifier of standardised features, with D features and C classes."""

    weight: Tensor
    """(C, D)"""
    bias: Tensor
    """(C,)"""
    mean: Tensor
    """(D,) mean of the training features."""
    std: Tensor
    """(D,) standard deviation of the training features; 1 instead of 0."""

    def predict(self, x_ND: NDArray[np.float32], rows_M: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Predicted classes of some rows, (M,), by default of all."""
        device = self.weight.device
        parts = [
            F.linear((part.to(device) - self.mean) / self.std, self.weight, self.bias).argmax(1).cpu()
            for part, _ in _batches(x_ND, _numbers(x_ND, rows_M))
        ]
        return torch.cat(parts).numpy() if parts else np.empty(0, np.int64)


def fit_path(
    x_ND: NDArray[np.float32],
    y_N: NDArray[np.int64],
    strengths: Sequence[float],
    *,
    num_classes: int,
    rows_M: NDArray[np.int64] | None = None,
    max_iterations: int = 150,
    device: torch.device | str = "cpu",
) -> Iterator[LinearProbe]:
    """Fit one probe for each inverse L2 strength C, in increasing order; each starts from the one before.

    Minimises C Σ_n cross-entropy + ½ ‖W‖² (scikit-learn's objective; the bias is not penalised), divided by C M, with
    full-batch L-BFGS: the result depends on no learning rate and no seed.

    Args:
        x_ND, y_N: features and labels.
        strengths: values of C, increasing.
        num_classes: number of classes.
        rows_M: numbers of the rows to fit on; all by default.
        max_iterations: limit of L-BFGS iterations per strength.
        device: where to compute.
    """
    rows_M = _numbers(x_ND, rows_M)
    mean_D, std_D = (value.to(device) for value in _statistics(x_ND, rows_M))
    batches = _DeviceBatches(x_ND, y_N, rows_M, mean_D, std_D)
    weight_CD = torch.zeros(num_classes, x_ND.shape[1], device=device, requires_grad=True)
    bias_C = torch.zeros(num_classes, device=device, requires_grad=True)
    count = len(rows_M)
    for strength in strengths:
        optimizer = torch.optim.LBFGS(
            [weight_CD, bias_C],
            max_iter=max_iterations,
            tolerance_grad=1e-5,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        def objective(optimizer: torch.optim.LBFGS = optimizer, strength: float = strength) -> Tensor:
            optimizer.zero_grad()
            total = weight_CD.square().sum() / (2 * strength * count)
            total.backward()
            total = total.detach()
            for part_BD, labels_B in batches:
                logits = F.linear(part_BD, weight_CD, bias_C)
                loss = F.cross_entropy(logits, labels_B, reduction="sum") / count
                loss.backward()
                total += loss.detach()
            return total

        optimizer.step(objective)
        yield LinearProbe(weight_CD.detach().clone(), bias_C.detach().clone(), mean_D, std_D)


class _DeviceBatches:
    """Batches of standardised features with their labels, on a device.

    They stay there if they fit into half of a GPU's free memory. Otherwise each iteration computes them again.
    """

    def __init__(
        self,
        x_ND: NDArray[np.float32],
        y_N: NDArray[np.int64],
        rows_M: NDArray[np.int64],
        mean_D: Tensor,
        std_D: Tensor,
    ) -> None:
        self._x_ND, self._y_N, self._rows_M = x_ND, y_N, rows_M
        self._mean_D, self._std_D = mean_D, std_D
        self._resident: list[tuple[Tensor, Tensor]] | None = None
        if mean_D.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(mean_D.device)
            if 4 * len(rows_M) * x_ND.shape[1] <= free // 2:
                self._resident = list(self)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._resident is not None:
            yield from self._resident
            return
        device = self._mean_D.device
        for part, rows in _batches(self._x_ND, self._rows_M):
            yield (part.to(device) - self._mean_D) / self._std_D, torch.from_numpy(self._y_N[rows]).to(device)


def _numbers(x_ND: NDArray[np.float32], rows_M: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return np.arange(len(x_ND)) if rows_M is None else rows_M


def _batches(x_ND: NDArray[np.float32], rows_M: NDArray[np.int64]) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Batches of features, and the numbers of their rows."""
    size = max(1, _BATCH_BYTES // (4 * max(1, x_ND.shape[1])))
    for start in range(0, len(rows_M), size):
        rows = rows_M[start : start + size]
        # Indexing copies, which is needed: torch does not accept read-only memory maps.
        yield torch.from_numpy(np.asarray(x_ND[rows], np.float32)), rows


def _statistics(x_ND: NDArray[np.float32], rows_M: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    total = torch.zeros(x_ND.shape[1], dtype=torch.float64)
    for part, _ in _batches(x_ND, rows_M):
        total += part.double().sum(0)
    mean_D = total / len(rows_M)
    squares = torch.zeros_like(total)
    for part, _ in _batches(x_ND, rows_M):
        squares += (part.double() - mean_D).square().sum(0)
    std_D = (squares / len(rows_M)).sqrt()
    return mean_D.float(), torch.where(std_D > 0, std_D, 1).float()
