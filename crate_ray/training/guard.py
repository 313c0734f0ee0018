"""Judges the steps that were made: which changed nothing because they were not finite, and where the loss jumped."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from crate_ray.errors import UserError

_HISTORY, _LEAST_HISTORY = 50, 20
_DEVIATIONS = 8.0
_LEAST_RISE = 0.05


class Judgement(NamedTuple):
    """Of the steps since the last one."""

    loss: float | None
    """Mean over the finite steps; None when there was none."""
    gradient_norm: float | None
    """Of the last finite step."""
    skipped: list[int]
    """Steps that changed nothing."""
    spikes: dict[int, float]
    """Steps whose loss jumped, with the usual loss before."""


class Guard:
    """Judges steps by their global losses and gradient norms; workers that are given the same judge the same.

    A loss is a spike when it is more than 8 robust standard deviations (median absolute deviation × 1.4826) and 5 %
    above the median of the 50 finite losses before it.

    Args:
        max_skipped: so many steps in a row may change nothing.
    """

    def __init__(self, max_skipped: int) -> None:
        self._max_skipped, self._in_a_row = max_skipped, 0
        self._losses: deque[float] = deque(maxlen=_HISTORY)

    def judge(self, first: int, losses: Sequence[float], norms: Sequence[float]) -> Judgement:
        """Judge the steps from number `first` on.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        finite: list[float] = []
        norm: float | None = None
        skipped: list[int] = []
        spikes: dict[int, float] = {}
        for step, (loss, gradient_norm) in enumerate(zip(losses, norms, strict=True), first):
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                skipped.append(step)
                self._in_a_row += 1
                if self._in_a_row > self._max_skipped:
                    raise UserError(
                        f"the last {self._in_a_row} steps up to step {step} had a loss or gradient that is not finite "
                        "and were skipped; the checkpoints hold the weights from before: start again with a lower "
                        "optim.lr or a smaller optim.clip_norm, or raise training.max_skipped_steps"
                    )
                continue
            self._in_a_row = 0
            finite.append(loss)
            norm = gradient_norm
            if (usual := self._usual_below(loss)) is not None:
                spikes[step] = usual
            self._losses.append(loss)
        return Judgement(statistics.fmean(finite) if finite else None, norm, skipped, spikes)

    def _usual_below(self, loss: float) -> float | None:
        """The usual loss, where this one is far above it."""
        if len(self._losses) < _LEAST_HISTORY:
            return None
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        far = median + max(_DEVIATIONS * deviation, _LEAST_RISE * abs(median))
        return median if loss > far else None
