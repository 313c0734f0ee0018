"""Checks the values of a search space before a sweep starts: the ends of a range, and what lies between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from crate_ray.config import SearchSpace
from crate_ray.errors import UserError, first_few

_CHECKED = 64
"""Most values of a range of integers that are checked."""
_BETWEEN = (math.sqrt(5) - 1) / 2
"""Place of the number between the ends of a range that is checked. No range of whole numbers has a whole one there."""


def check_space(name: str, space: SearchSpace, why_invalid: Callable[[Any], str]) -> None:
    """Check a search space.

    Args:
        name: the setting that is searched.
        space: its values.
        why_invalid: says why a value cannot be used; empty if it can.

    Raises:
        UserError: a value cannot be used. The message says what to write instead.
    """
    for value in candidates(space):
        if why := why_invalid(value):
            raise UserError(f"sweep over {name!r}, value {value!r}: {why}{_advice(space, why_invalid)}")


def candidates(space: SearchSpace) -> list[Any]:
    """Values to check: all choices; all integers, or some of many with both ends; the ends of a range, one between."""
    if space.choice is not None:
        return list(space.choice)
    if space.integers is not None:
        first, last = space.integers
        steps = min(last - first, _CHECKED - 1)
        return [first + (last - first) * step // steps for step in range(steps + 1)]
    if space.uniform is not None:
        low, high = space.uniform
        return [low + (high - low) * _BETWEEN, low, high]
    assert space.loguniform is not None  # set by the config's validation
    low, high = space.loguniform
    return [low * (high / low) ** _BETWEEN, low, high]


def _advice(space: SearchSpace, why_invalid: Callable[[Any], str]) -> str:
    """What to write instead of a range that holds values which cannot be used; empty if there is nothing."""
    if space.choice is not None:
        return ""
    if space.integers is not None:
        good = [str(value) for value in candidates(space) if not why_invalid(value)]
        return f"; give the values that can be used, such as choice: [{first_few(good)}]" if good else ""
    low, high = space.uniform or space.loguniform or (0.0, 0.0)
    first, last = math.ceil(low), math.floor(high)
    whole = first < last and not why_invalid(first) and not why_invalid(last)
    return f"; for whole numbers, give integers: [{first}, {last}]" if whole else ""
