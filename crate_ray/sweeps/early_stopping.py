"""Which trials a sweep stops early: ASHA or the median rule of Ray Tune, which know the losses of earlier starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from crate_ray.config import SweepConfig
from crate_ray.sweeps.trial import METRIC, STEP, TrialRecord


def early_stopping(sweep: SweepConfig, total_steps: int, records: Sequence[TrialRecord]) -> TrialScheduler | None:
    """The sweep's scheduler, which knows the losses of the records; None if no trial is to be stopped early.

    Args:
        sweep: the sweep.
        total_steps: steps of a trial.
        records: of all trials that were started.
    """
    if sweep.early_stopping == "none":
        return None
    grace = min(sweep.grace_steps or math.ceil(total_steps / 4), total_steps)
    mode = "min" if sweep.minimizes else "max"
    scheduler: _Asha | _Median
    if sweep.early_stopping == "asha":
        scheduler = _Asha(
            time_attr=STEP,
            metric=METRIC,
            mode=mode,
            max_t=total_steps,
            grace_period=grace,
            reduction_factor=sweep.reduction_factor,
            stop_last_trials=False,  # if training.steps is searched, some trials have more
        )
    else:
        # Without a time slice, trials that cannot be judged yet go on. Ray Tune would pause them by ending them.
        scheduler = _Median(time_attr=STEP, metric=METRIC, mode=mode, grace_period=grace, min_time_slice=_FOREVER)
    for record in sorted(records, key=lambda record: (record.number, record.trial)):
        trial = _Known(record.trial, {"trial": record.trial})
        scheduler.on_trial_add(None, trial)
        for step, loss in sorted(record.losses.items()):
            scheduler.learn(trial, {STEP: step, METRIC: loss})
    return scheduler


_FOREVER: Any = math.inf


@dataclass(frozen=True)
class _Trial:
    """What the rules of Ray Tune use of a trial: something that identifies it."""

    trial_id: str


@dataclass(frozen=True)
class _Known:
    """An earlier trial, as the controller of Ray Tune passes it."""

    trial_id: str
    config: dict[str, Any]


class _ByRecord(TrialScheduler):
    """Identifies trials by the ids of their records. A trial that is resumed has a new id in Ray Tune."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _identified(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return super().on_trial_result(tune_controller, _identified(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _identified(trial), result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, _identified(trial))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _identified(trial))


class _Asha(_ByRecord, ASHAScheduler):
    def learn(self, trial: _Known, result: dict[str, Any]) -> None:
        """Add an earlier result."""
        self.on_trial_result(None, trial, result)


class _Median(_ByRecord, MedianStoppingRule):
    def learn(self, trial: _Known, result: dict[str, Any]) -> None:
        """Add an earlier result without a decision: the rule refuses further results of a trial that it stopped."""
        self.on_trial_complete(None, trial, result)


def _identified(trial: Any) -> Any:
    return _Trial(trial.config["trial"])
