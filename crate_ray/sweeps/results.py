"""What the records of a sweep say: the best trial, the best trade-offs, and which trials can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import optuna
from optuna.trial import create_trial

from crate_ray.config import SweepConfig
from crate_ray.sweeps.trial import TrialRecord

FINISHED, STOPPED, PRUNED, RUNNING = "finished", "stopped early", "pruned", "running"


class Comparison(NamedTuple):
    """Trials that were measured in the same way, and their objectives."""

    trials: list[TrialRecord]
    values: list[float]
    step: int | None
    """The step at which the objectives were measured; None if that is the end of each trial."""


def best_trial(records: Sequence[TrialRecord], sweep: SweepConfig) -> TrialRecord | None:
    """The finished trial with the best first objective; None when none finished."""
    sign = 1 if sweep.minimizes else -1
    return min(_finished(records), key=lambda record: sign * (record.objective or 0.0), default=None)


def ended(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials that ran and ended. A combination that cannot work is none of them, because it did not run."""
    return [record for record in records if record.status not in (RUNNING, PRUNED)]


def curve(record: TrialRecord) -> dict[int, float]:
    """Finite objectives of a trial by step, the last one included."""
    points = dict(record.losses)
    if record.objective is not None and record.step:
        points[record.step] = record.objective
    return {step: value for step, value in sorted(points.items()) if math.isfinite(value)}


def comparable(records: Sequence[TrialRecord], sweep: SweepConfig) -> Comparison:
    """Trials whose objectives may be compared.

    A trial that was stopped early has a worse objective only because it trained for fewer steps. So if there are such
    trials, all are compared at the last step that all of them reached. Failed trials are left out.
    """
    finished = _finished(records)
    candidates = [*finished, *(r for r in records if r.status == STOPPED and curve(r))]
    if len(candidates) > len(finished):
        curves = [curve(record) for record in candidates]
        if common := set.intersection(*(set(points) for points in curves)):
            return Comparison(candidates, [points[max(common)] for points in curves], max(common))
    return Comparison(finished, [float(record.objective or 0.0) for record in finished], None)


def latest(records: Sequence[TrialRecord]) -> Comparison:
    """Trials with their last objectives, those that were stopped early included."""
    trials = [*_finished(records), *(record for record in records if record.status == STOPPED and curve(record))]
    return Comparison(trials, [float(record.objective or 0.0) for record in trials], None)


def without_outliers(values: Sequence[float], sweep: SweepConfig) -> list[float]:
    """Objectives in which very bad ones are replaced by a bound. One diverged trial would hide all other differences.

    The bound is twice as far from the median as the best value, on the other side.
    """
    if not values:
        return []
    middle, best = float(np.median(values)), min(values) if sweep.minimizes else max(values)
    bound = middle + 2 * (middle - best)
    return [min(value, bound) if sweep.minimizes else max(value, bound) for value in values]


def front(records: Sequence[TrialRecord], sweep: SweepConfig) -> list[TrialRecord]:
    """The finished trials that no other trial beats in both objectives, by the first one; empty without `against`."""
    names = list(sweep.directions)
    candidates = [r for r in _finished(records) if all(math.isfinite(r.objectives.get(n, math.nan)) for n in names)]
    if len(names) < 2 or not candidates:
        return []
    study = optuna.create_study(directions=list(sweep.directions.values()))
    study.add_trials([create_trial(values=[record.objectives[name] for name in names]) for record in candidates])
    chosen = [candidates[trial.number] for trial in study.best_trials]
    return sorted(chosen, key=lambda record: record.objectives[names[0]], reverse=not sweep.minimizes)


def _finished(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [r for r in records if r.status == FINISHED and r.objective is not None and math.isfinite(r.objective)]
