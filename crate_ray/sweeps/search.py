"""Which values a sweep tries next, and when it ends. It continues from the records of its trials.

Ray Tune can restore its own state, but only by unpickling it from the sweep's folder, where others may write. So a
sweep that is started again starts Ray Tune anew, and tells its search what the records say.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState, create_trial
from ray.tune.search import Searcher

from crate_ray.config import SearchSpace, SweepConfig
from crate_ray.errors import UserError
from crate_ray.sweeps.combinations import MAX_GRID, ShuffledGrid, Values, grid_size, key
from crate_ray.sweeps.trial import METRIC, TrialRecord

_DRAWS = 50
"""Repeated combinations that a sampler may draw before the grid is searched for one that is left."""
_PRUNED_IN_A_ROW = 1000


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


class TrialSearch(Searcher):
    """Suggests trials: first those that were interrupted, then warm starts, then new ones by the sweep's sampler.

    A suggestion has the sampled `values`, the id of the `trial`, which is that of an interrupted trial or Ray Tune's,
    and its `number`. No combination is suggested twice. Combinations that cannot work are recorded and not suggested.

    Args:
        sweep: the sweep.
        records: of all trials that were started.
        why_impossible: says why a combination cannot work; empty if it can.
        pruned: receives the record of each combination that cannot work.
        warm_start: values to try first, of some or all settings.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        records: Sequence[TrialRecord],
        why_impossible: Callable[[Values], str] = lambda values: "",
        pruned: Callable[[TrialRecord], None] = lambda record: None,
        warm_start: Sequence[Values] = (),
    ) -> None:
        super().__init__(metric=METRIC, mode="min" if sweep.minimizes else "max")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.ended = ""
        """Why the sweep ended before its last trial; empty if it did not."""
        self._sweep, self._why_impossible, self._pruned = sweep, why_impossible, pruned
        self._space = {name: distribution(space) for name, space in sweep.search.items()}
        records = sorted(records, key=lambda record: (record.number, record.trial))
        # With the first start's seed, the sampler would draw the values of the first trials again.
        self._study = optuna.create_study(
            directions=list(sweep.directions.values()), sampler=_sampler(sweep, sweep.seed + len(records))
        )
        self._to_resume = [record for record in records if record.status == "running"]
        self._tried = {key(record.values) for record in records}
        self._next_number = max((record.number for record in records), default=0) + 1
        self._objectives = [record.objective for record in records if record.status in ("finished", "stopped early")]
        size = grid_size(sweep)
        self._grid = ShuffledGrid(sweep) if size is not None and size <= MAX_GRID else None
        self._warm_start = list(warm_start)[len(records) :]  # each suggestion left a record
        self._suggested: dict[str, dict[str, Any]] = {}
        self._asked: dict[str, Trial] = {}
        self._began, self._earlier = time.monotonic(), sum(record.seconds for record in records)
        for record in records:
            self._tell_record(record)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Values, id and number of the next trial; FINISHED if there is none."""
        if trial_id in self._suggested:
            return self._suggested[trial_id]
        if self._to_resume:
            record = self._to_resume.pop(0)
            trial, self._asked[trial_id] = record.trial, self._ask(record.values)
            values, number = record.values, record.number
        else:
            self.ended = self._why_over()
            found = None if self.ended else self._next(trial_id)
            if found is None:
                return str(Searcher.FINISHED)
            trial, number = trial_id, self._take_number()
            values = found
        self._suggested[trial_id] = {"values": values, "trial": trial, "number": number}
        return self._suggested[trial_id]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the sampler an objective during training. Optuna cannot use it if there are several objectives."""
        if len(self._sweep.directions) == 1 and math.isfinite(result[METRIC]):
            self._asked[trial_id].report(result[METRIC], result["step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the sampler how a trial ended."""
        trial = self._asked.pop(trial_id, None)
        if trial is None:
            return
        result = result or {}
        objectives = [result.get(f"objectives/{name}", math.nan) for name in self._sweep.directions]
        if not error and all(map(math.isfinite, objectives)):
            self._study.tell(trial, objectives)
        elif not error and METRIC in result:  # stopped early
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        self._objectives.append(result[METRIC])

    def save(self, checkpoint_path: str) -> None:
        """Save nothing; the records of the trials are enough."""

    def restore(self, checkpoint_path: str) -> None:
        """Not used: see this module."""
        raise NotImplementedError

    def _next(self, trial_id: str) -> Values | None:
        """Values of a combination that can work and was not tried; None if none is left, with the reason in `ended`."""
        cause, repeated = "", 0
        for _ in range(_PRUNED_IN_A_ROW):
            trial = self._draw(repeated)
            while trial is not None and key(trial.params) in self._tried:
                self._study.tell(trial, state=TrialState.FAIL)
                repeated += 1
                trial = self._draw(repeated)
            if trial is None:
                self.ended = f"all {grid_size(self._sweep):,} combinations have been tried"
                return None
            values = trial.params
            self._tried.add(key(values))
            cause = self._why_impossible(values)
            if not cause:
                self._asked[trial_id] = trial
                return values
            self._tell_impossible(trial)
            number = self._take_number()
            self._pruned(
                TrialRecord(trial=f"pruned-{number:05d}", number=number, values=values, status="pruned", cause=cause)
            )
        raise UserError(f"{_PRUNED_IN_A_ROW:,} combinations in a row cannot work; narrow `search`: {cause}")

    def _draw(self, repeated: int) -> Trial | None:
        """The next combination: a warm start, the next one of the grid, or one of the sampler. None if none is left."""
        if self._warm_start:
            return self._ask(self._warm_start.pop(0))
        if self._grid is not None and (self._sweep.sampler == "grid" or repeated > _DRAWS):
            point = self._grid.next()
            while point is not None and key(point) in self._tried:
                point = self._grid.next()
            return None if point is None else self._ask(point)
        return self._ask({})

    def _ask(self, values: Values) -> Trial:
        """A trial of the study with these values; the sampler chooses the others."""
        if values:
            self._study.enqueue_trial(values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are lists, which only a stored study cannot keep
            return self._study.ask(self._space)

    def _tell_record(self, record: TrialRecord) -> None:
        """Add an earlier trial to the study."""
        objectives = [record.objectives.get(name) for name in self._sweep.directions]
        if len(objectives) == 1:
            objectives = [record.objective]  # records of earlier versions have no others
        values = [value for value in objectives if value is not None and math.isfinite(value)]
        stopped = record.status == "stopped early"
        if not (stopped or (record.status == "finished" and len(values) == len(objectives))):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.add_trial(
                create_trial(
                    params=record.values,
                    distributions=self._space,
                    state=TrialState.PRUNED if stopped else TrialState.COMPLETE,
                    values=None if stopped else values,
                    intermediate_values={s: v for s, v in record.losses.items() if math.isfinite(v)},
                )
            )

    def _tell_impossible(self, trial: Trial) -> None:
        """Let TPE avoid a combination. Before it knows a trial that works, it would search around this one."""
        if any(state == TrialState.COMPLETE for state in self._states()):
            trial.set_constraint("works", 1.0)
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _states(self) -> Iterator[TrialState]:
        return (trial.state for trial in self._study.get_trials(deepcopy=False))

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _why_over(self) -> str:
        """Why no new trial is to start; empty if one may."""
        sweep, objectives = self._sweep, [value for value in self._objectives if value is not None]
        hours = (self._earlier / sweep.max_concurrent + time.monotonic() - self._began) / 3600
        if sweep.hours is not None and hours >= sweep.hours:
            return f"{sweep.hours:g} hours have passed"
        if sweep.patience and len(objectives) > sweep.patience:
            sign = 1 if sweep.minimizes else -1
            losses = [sign * value for value in objectives]
            if min(losses[-sweep.patience :]) >= min(losses[: -sweep.patience]) - sweep.min_delta:
                more_than = f" by more than {sweep.min_delta:g}" if sweep.min_delta else ""
                return f"the last {sweep.patience} trials have not improved the best {sweep.objective}{more_than}"
        return ""


def _sampler(sweep: SweepConfig, seed: int) -> BaseSampler:
    if sweep.sampler != "tpe":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Optuna advises to sample the settings one by one if there are several objectives.
        return TPESampler(seed=seed, multivariate=len(sweep.directions) == 1, constant_liar=True)
