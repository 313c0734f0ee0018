"""Which values a sweep tries next, and which trials it stops early. Both continue from the records of its trials.

Ray Tune can restore its own state, but only by unpickling it from the sweep's folder, where others may write. So a
sweep that is started again starts Ray Tune anew, and tells its search and its scheduler what the records say.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from crate_ray.config import SearchSpace, SweepConfig
from crate_ray.sweeps.trial import TrialRecord

METRIC, STEP = "objective", "step"


def distribution(space: SearchSpace) -> BaseDistribution:
    """Optuna's form of a search space."""
    if space.choice is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lists, which only a stored study cannot keep
            return CategoricalDistribution(list(space.choice))
    if space.integers is not None:
        return IntDistribution(*space.integers)
    if space.uniform is not None:
        return FloatDistribution(*space.uniform)
    assert space.loguniform is not None  # set by the config's validation
    return FloatDistribution(*space.loguniform, log=True)


class TrialSearch(OptunaSearch):
    """Suggests trials: first those that were interrupted, then new ones, by Optuna's TPE from all results so far.

    A suggestion has the sampled `values`, and the id of the `trial`: that of an interrupted trial, or Ray Tune's.

    Args:
        sweep: the sweep.
        records: of all trials that were started.
    """

    def __init__(self, sweep: SweepConfig, records: Sequence[TrialRecord]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        interrupted = [record for record in records if record.status == "running"]
        super().__init__(
            space={name: distribution(space) for name, space in sweep.search.items()},
            metric=METRIC,
            mode="min" if sweep.minimizes else "max",
            # With the first start's seed, the sampler would draw the values of the first trials again.
            seed=sweep.seed + len(records),
            points_to_evaluate=[record.values for record in interrupted],
        )
        self._to_resume = [record.trial for record in interrupted]
        self._ids: dict[str, str] = {}
        for record in records:
            if record.status != "running" and record.objective is not None and math.isfinite(record.objective):
                self.add_evaluated_point(record.values, record.objective)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Values and id of the next trial."""
        values = super().suggest(trial_id)
        if values is None:
            return None
        if trial_id not in self._ids:
            self._ids[trial_id] = self._to_resume.pop(0) if self._to_resume else trial_id
        return {"values": values, "trial": self._ids[trial_id]}


def early_stopping(sweep: SweepConfig, total_steps: int, records: Sequence[TrialRecord]) -> ASHAScheduler | None:
    """ASHA on the validation losses, if the sweep asks for it; it knows the losses of the records."""
    if not sweep.grace_steps:
        return None
    scheduler = ASHAScheduler(
        time_attr=STEP,
        metric=METRIC,
        mode="min",  # early stopping needs a validation loss
        max_t=total_steps,
        grace_period=min(sweep.grace_steps, total_steps),
        reduction_factor=sweep.reduction_factor,
    )
    for record in records:
        trial: Any = SimpleNamespace(trial_id=record.trial)
        scheduler.on_trial_add(None, trial)
        for step, loss in sorted(record.losses.items()):
            scheduler.on_trial_result(None, trial, {STEP: step, METRIC: loss})
    return scheduler
