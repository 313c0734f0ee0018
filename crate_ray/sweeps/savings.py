"""What early stopping saves: ASHA replayed on the curves of trials that ran in full."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from crate_ray.config import SweepConfig
from crate_ray.sweeps.early_stopping import early_stopping
from crate_ray.sweeps.results import FINISHED, STOPPED, curve
from crate_ray.sweeps.trial import METRIC, STEP, TrialRecord


class Replay(NamedTuple):
    """What ASHA would have run and found."""

    steps: int
    """Steps of all trials together."""
    full_steps: int
    """Steps of all trials in full."""
    best: str
    """Id of the best trial among those that ASHA would have run to the end."""


def replay_asha(
    curves: Mapping[str, Mapping[int, float]],
    sweep: SweepConfig,
    total_steps: int,
    grace_steps: int | None = None,
    reduction_factor: int | None = None,
) -> Replay:
    """Run ASHA on recorded curves. The trials start in their order, `max_concurrent` at a time, and are equally fast.

    Args:
        curves: for each trial its objectives by step, the last one at `total_steps`.
        sweep: the sweep.
        total_steps: steps of a trial.
        grace_steps: steps before which no trial is stopped; by default those of the sweep.
        reduction_factor: one of this many trials goes on at each rung; by default that of the sweep.
    """
    changes = {
        "early_stopping": "asha",
        "grace_steps": grace_steps or sweep.grace_steps,
        "reduction_factor": reduction_factor or sweep.reduction_factor,
    }
    scheduler = early_stopping(sweep.model_copy(update=changes), total_steps, [])
    assert scheduler is not None
    waiting, ran = list(curves), dict.fromkeys(curves, 0)
    reports: list[tuple[int, int, str]] = []  # when, which start, which trial

    def start(now: int) -> None:
        if waiting:
            name = waiting.pop(0)
            scheduler.on_trial_add(None, _trial(name))
            heapq.heappush(reports, (now + min(curves[name]), len(curves) - len(waiting), name))

    for _ in range(sweep.max_concurrent):
        start(0)
    while reports:
        now, order, name = heapq.heappop(reports)
        step = min(step for step in curves[name] if step > ran[name])
        ran[name] = step
        decision = scheduler.on_trial_result(None, _trial(name), {STEP: step, METRIC: curves[name][step]})
        later = [other for other in curves[name] if other > step]
        if later and decision == scheduler.CONTINUE:
            heapq.heappush(reports, (now + min(later) - step, order, name))
        else:
            start(now)
    sign = 1 if sweep.minimizes else -1
    complete = [name for name in curves if ran[name] == max(curves[name])]
    best = min(complete, key=lambda name: sign * curves[name][max(curves[name])])
    return Replay(sum(ran.values()), sum(max(points) for points in curves.values()), best)


def full_curves(records: Sequence[TrialRecord]) -> tuple[dict[str, dict[int, float]], int] | None:
    """The curves of the trials and their steps, if all trials that ended ran in full; else None."""
    ended = [record for record in records if record.status == FINISHED and record.objective is not None]
    curves = {record.trial: curve(record) for record in sorted(ended, key=lambda record: record.number)}
    steps = {record.step for record in ended}
    stopped = any(record.status == STOPPED for record in records)
    if stopped or len(steps) != 1 or len(curves) < 2 or any(len(points) < 2 for points in curves.values()):
        return None
    return curves, steps.pop()


def _trial(name: str) -> Any:
    """What a scheduler reads of a trial of Ray Tune."""
    return SimpleNamespace(trial_id=name, config={"trial": name})
