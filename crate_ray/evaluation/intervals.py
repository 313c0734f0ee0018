"""Estimates with 95 % confidence intervals: shares, means over images, and statistics of whole curves."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from crate_ray.config import Record

_LEVEL = 0.95
_Z = float(norm.ppf((1 + _LEVEL) / 2))
_ONE_SIDED_Z = float(norm.ppf(_LEVEL))


class Estimate(Record):
    """A measured value and its 95 % confidence interval."""

    value: float
    """The measured value."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    count: int = Field(gt=0)
    """Number of independent samples."""


def share(successes: int, trials: int) -> Estimate:
    """A share of trials with Wilson's score interval, which stays within 0 … 1 and is accurate near both ends."""
    p = successes / trials
    interval = binomtest(successes, trials).proportion_ci(_LEVEL, method="wilson")
    # At 0 and 1, one end equals p up to rounding.
    return Estimate(value=p, low=min(p, float(interval.low)), high=max(p, float(interval.high)), count=trials)


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
    """A statistic of the mean curve of N samples, (L, N) with L values each, with its bootstrap percentile interval.

    Samples are resampled with replacement. The statistic takes R curves at once, (R, L), and returns (R,).
    """
    values = np.asarray(values_LN, np.float64)
    count = values.shape[1]
    random = np.random.default_rng(seed)
    weights_RN = random.multinomial(count, np.full(count, 1 / count), size=draws) / count
    low, high = np.quantile(statistic(weights_RN @ values.T), (0.025, 0.975))
    value = float(statistic(values.mean(1)[None])[0])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), count=count)


def paired_difference_low(better: int, worse: int, count: int) -> float:
    """Lower end of the one-sided 95 % interval of the difference of two accuracies on the same samples.

    Tango's score interval (Statistics in Medicine 17, 1998) with Edwards' continuity correction. At a difference of 0
    it is McNemar's test. It also says something if the two never differ: then it is about -4.5 / count.

    Args:
        better: samples that only the first one classifies correctly.
        worse: samples that only the second one classifies correctly.
        count: all samples.
    """

    def z_of(difference: float) -> float:
        """Standardised distance of what was counted from a true difference."""
        linear = (2 * count - better + worse) * difference - better - worse
        constant = -worse * difference * (1 - difference)
        share = (math.sqrt(max(0.0, linear**2 - 8 * count * constant)) - linear) / (4 * count)
        variance = count * (2 * share + difference * (1 - difference))
        return (better - worse - count * difference - 1) / math.sqrt(max(variance, 1e-12))

    low, high = -1 + 1e-9, (better - worse) / count
    if high <= low or z_of(low) <= _ONE_SIDED_Z:
        return -1.0
    return float(brentq(lambda difference: z_of(difference) - _ONE_SIDED_Z, low, min(high, 1 - 1e-9)))
