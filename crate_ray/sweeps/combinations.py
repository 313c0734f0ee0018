"""Combinations of searched values: all of a grid, and which of them are valid settings together."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from crate_ray.config import SearchSpace, SweepConfig
from crate_ray.errors import UserError

Values = dict[str, Any]
"""Values of searched settings, by dotted name."""

MAX_GRID = 1_000_000
_TRIED = 1000  # combinations that are tried at random to find a valid one


def key(values: Values) -> str:
    """A text that is the same for the same values, also after they were stored."""
    return json.dumps(values, sort_keys=True, default=str)


def finite_values(space: SearchSpace) -> Sequence[Any] | None:
    """All values of a choice or of integers, each once; None for a range of numbers."""
    if space.choice is not None:
        return list({json.dumps(value, default=str): value for value in space.choice}.values())
    return range(space.integers[0], space.integers[1] + 1) if space.integers is not None else None


def in_space(space: SearchSpace, value: Any) -> bool:
    """Whether a search may suggest a value."""
    if space.choice is not None:
        return key({"": value}) in {key({"": choice}) for choice in space.choice}
    low, high = space.integers or space.uniform or space.loguniform or (0, 0)
    is_number = isinstance(value, int if space.integers else int | float) and not isinstance(value, bool)
    return is_number and low <= value <= high


def grid_size(sweep: SweepConfig) -> int | None:
    """Number of all combinations; None if there is a range of numbers."""
    columns = [finite_values(space) for space in sweep.search.values()]
    return None if None in columns else math.prod(len(column) for column in columns if column is not None)


class ShuffledGrid:
    """All combinations in an order of the sweep's seed. Needs a grid of at most MAX_GRID combinations."""

    def __init__(self, sweep: SweepConfig) -> None:
        self._names = list(sweep.search)
        self._columns = [list(finite_values(space) or ()) for space in sweep.search.values()]
        self._numbers = list(range(math.prod(map(len, self._columns))))
        random.Random(sweep.seed).shuffle(self._numbers)

    def next(self) -> Values | None:
        """The next combination; None after the last one."""
        if not self._numbers:
            return None
        number, point = self._numbers.pop(), []
        for column in self._columns:
            number, place = divmod(number, len(column))
            point.append(column[place])
        return dict(zip(self._names, point, strict=True))


def valid_combination(sweep: SweepConfig, why_invalid: Callable[[Values], str], fixed: Values | None = None) -> Values:
    """Values that are valid settings together: none but the fixed ones if those suffice, else of all settings.

    Args:
        sweep: the sweep. Of a range of numbers, the two ends are tried.
        why_invalid: says why values cannot be used over the sweep's base; empty if they can.
        fixed: values that the combination has to have.

    Raises:
        UserError: there are none, or none was found among many.
    """
    fixed = fixed or {}
    cause = why_invalid(fixed)
    if not cause:
        return fixed
    columns = {name: _examples(space) for name, space in sweep.search.items() if name not in fixed}
    if math.prod(map(len, columns.values())) <= _TRIED:
        points: Iterator[tuple[Any, ...]] = itertools.product(*columns.values())
    else:
        draw = random.Random(0)
        points = (tuple(draw.choice(column) for column in columns.values()) for _ in range(_TRIED))
    for point in points:
        values = {**dict(zip(columns, point, strict=True)), **fixed}
        if not why_invalid(values):
            return values
    raise UserError(cause)


def _examples(space: SearchSpace) -> list[Any]:
    """Values that stand for a setting: all of a few, or some of many with both ends."""
    values = finite_values(space)
    if values is None:
        return list(space.uniform or space.loguniform or ())
    return list(values) if len(values) <= _TRIED else [*values[:: len(values) // 100], values[-1]]
