"""How much each searched setting mattered: Optuna's fANOVA, with intervals, and with what chance alone gives.

fANOVA fits a random forest to the objectives of the trials. The importance of a setting is the share of the forest's
variance that this setting explains alone. A forest also finds structure in noise. So each setting is joined by a copy
whose values are shuffled among the trials: the copy's importance is what a setting without any effect gets. Everything
is repeated on bootstrap samples of the trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial

from crate_ray.sweeps.axes import SettingAxis

FEWEST_TRIALS = 6
"""With fewer trials, importances say nothing."""
_REPEATS, _TREES, _DEPTH = 100, 8, 4  # many small forests: the mean over the samples is what a large one would give
_COPY = "shuffled "

Verdict = Literal["matters", "unclear", "noise"]


@dataclass(frozen=True)
class Importance:
    """Importance of one setting, as a share of the variance between trials."""

    name: str
    """Dotted name of the setting."""
    share: float
    """Mean over the bootstrap samples."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    chance: float
    """Mean share of the shuffled copy."""
    chance_high: float
    """A share that only 5 % of the shuffled copies exceed."""

    @property
    def verdict(self) -> Verdict:
        """'matters' if the interval is above what chance gives; 'noise' if the share itself is not; else 'unclear'."""
        if self.low > self.chance:
            return "matters"
        return "unclear" if self.share > self.chance_high else "noise"


def importances(
    axes: Sequence[SettingAxis], settings: Sequence[dict[str, Any]], values: Sequence[float], seed: int = 0
) -> list[Importance]:
    """The importance of every setting, the largest first; empty if there are too few trials.

    Args:
        axes: the searched settings.
        settings: the values of the settings in each trial.
        values: the objective of each trial.
        seed: of the bootstrap samples and of the forests.
    """
    if len(values) < FEWEST_TRIALS or min(values) == max(values):
        return []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    random = np.random.default_rng(seed)
    places = {axis.name: np.array([axis.place(trial[axis.name]) for trial in settings]) for axis in axes}
    found, by_chance = np.zeros((_REPEATS, len(axes))), np.zeros((_REPEATS, len(axes)))
    for repeat in range(_REPEATS):
        # Shuffled before the draw: a trial that is drawn twice is twice the same, in the copies too.
        copies = {_COPY + name: random.permutation(column) for name, column in places.items()}
        drawn = random.integers(0, len(values), len(values))
        shares = _fanova(axes, places | copies, values, drawn, seed + repeat)
        found[repeat] = [shares[axis.name] for axis in axes]
        by_chance[repeat] = [shares[_COPY + axis.name] for axis in axes]
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    numbers = zip(found.mean(0), low, high, by_chance.mean(0), np.quantile(by_chance, 0.95, axis=0), strict=True)
    out = [Importance(axis.name, *map(float, row)) for axis, row in zip(axes, numbers, strict=True)]
    return sorted(out, key=lambda one: -one.share)


def _fanova(
    axes: Sequence[SettingAxis],
    places: dict[str, NDArray[np.float64]],
    values: Sequence[float],
    drawn: NDArray[np.int64],
    seed: int,
) -> dict[str, float]:
    """Shares of the settings and of their copies, on the trials that were drawn."""
    distributions = {prefix + axis.name: _distribution(axis) for axis in axes for prefix in ("", _COPY)}
    study = optuna.create_study()
    study.add_trials(
        [
            create_trial(
                params={name: distributions[name].to_external_repr(column[i]) for name, column in places.items()},
                distributions=distributions,
                value=values[i],
            )
            for i in drawn
        ]
    )
    return FanovaImportanceEvaluator(n_trees=_TREES, max_depth=_DEPTH, seed=seed).evaluate(study)


def _distribution(axis: SettingAxis) -> BaseDistribution:
    if axis.is_ordered:  # in places, so that a logarithmic range is uniform
        return FloatDistribution(axis.low, axis.high)
    return CategoricalDistribution([str(place) for place in range(len(axis.choices or ()))])
