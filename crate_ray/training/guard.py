"""Checks past steps: which of them were skipped because they were not finite, and where the loss jumped."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from crate_ray.errors import UserError
from crate_ray.runs import metrics

_HISTORY, _LEAST_HISTORY = 50, 20
_DEVIATIONS = 8.0
_LEAST_RISE = 0.05


class GuardReport(NamedTuple):
    """Result of checking some steps."""

    loss: float | None
    """Mean over the finite steps; None if there was none."""
    gradient_norm: float | None
    """Gradient norm of the last finite step."""
    skipped: list[int]
    """Steps that were skipped, so that they did not change the model."""
    spikes: dict[int, float]
    """Steps whose loss jumped, with the median of the losses before."""

    def metrics(self) -> dict[str, float]:
        """The report as metrics. Loss and norm are left out if no step was finite."""
        values = {
            metrics.SKIPPED_STEPS: float(len(self.skipped)),
            metrics.LOSS_SPIKES: float(len(self.spikes)),
        }
        if self.loss is not None and self.gradient_norm is not None:
            values |= {metrics.LOSS: self.loss, metrics.GRADIENT_NORM: self.gradient_norm}
        return values

    def notes(self) -> Iterator[str]:
        """The report as sentences for the user; none if nothing happened."""
        if self.skipped:
            steps = ", ".join(map(str, self.skipped))
            yield f"skipped because the loss or the gradient was not finite: step {steps}"
        for step, usual in self.spikes.items():
            yield f"the loss jumped at step {step}, from about {usual:.4g}"


class Guard:
    """Checks steps by their global losses and gradient norms. All workers get the same values, so their results agree.

    A loss is a spike when it is more than 8 robust standard deviations (median absolute deviation × 1.4826) and 5 %
    above the median of the 50 finite losses before it.

    Args:
        max_skipped: largest number of steps in a row that may be skipped.
    """

    def __init__(self, max_skipped: int) -> None:
        self._max_skipped, self._in_a_row = max_skipped, 0
        self._losses: deque[float] = deque(maxlen=_HISTORY)

    def check(self, first: int, losses: Sequence[float], norms: Sequence[float]) -> GuardReport:
        """Check consecutive steps. `first` is the number of the first one.

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
                        "and were skipped; the checkpoints hold the weights from before them: run again with a lower "
                        "optim.lr or a smaller optim.clip_norm, or raise training.max_skipped_steps"
                    )
                continue
            self._in_a_row = 0
            finite.append(loss)
            norm = gradient_norm
            if (usual := self._usual_below(loss)) is not None:
                spikes[step] = usual
            self._losses.append(loss)
        return GuardReport(statistics.fmean(finite) if finite else None, norm, skipped, spikes)

    def _usual_below(self, loss: float) -> float | None:
        """The median of the losses before if this loss is far above it, else None."""
        if len(self._losses) < _LEAST_HISTORY:
            return None
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        far = median + max(_DEVIATIONS * deviation, _LEAST_RISE * abs(median))
        return median if loss > far else None
