"""Estimates with their 95 % intervals: of shares, of means over images, and of statistics of whole curves."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from crate_ray.config import Settings

_Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


class Estimate(Settings):
    """A measured number and the 95 % confidence interval around it."""

    value: float
    """The number."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    count: int = Field(gt=0)
    """Independent samples behind it."""


def share(successes: int, trials: int) -> Estimate:
    """A share of trials with Wilson's score interval, which stays within 0 … 1 and holds near both ends."""
    p, z2 = successes / trials, _Z**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    # At 0 and 1 an end is p itself, up to rounding.
    return Estimate(value=p, low=min(p, max(0.0, centre - half)), high=max(p, min(1.0, centre + half)), count=trials)


def mean(values_N: NDArray[np.floating]) -> Estimate:
    """Mean over independent samples (N,), with the normal interval of its standard error."""
    values = np.asarray(values_N, np.float64)
    centre = float(values.mean())
    half = _Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(value=centre, low=centre - half, high=centre + half, count=len(values))


def bootstrap(
    values_LN: NDArray[np.floating],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic of the mean curve over samples of L values each, (L, N), with its percentile interval.

    Samples are drawn again with replacement: the interval says how much the statistic owes to these very samples. The
    statistic takes R curves at once, (R, L), and gives (R,).
    """
    values = np.asarray(values_LN, np.float64)
    count = values.shape[1]
    random = np.random.default_rng(seed)
    weights_RN = random.multinomial(count, np.full(count, 1 / count), size=draws) / count
    low, high = np.quantile(statistic(weights_RN @ values.T), (0.025, 0.975))
    value = float(statistic(values.mean(1)[None])[0])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), count=count)
