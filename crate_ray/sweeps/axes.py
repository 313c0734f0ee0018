"""The values of a searched setting as numbers, for figures and statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from crate_ray.config import SearchSpace, SweepConfig
from crate_ray.sweeps.trial import TrialRecord


@dataclass(frozen=True)
class SettingAxis:
    """A searched setting as an axis.

    A choice has its position as its place. A number has itself, or its logarithm to base 10.
    """

    name: str
    """Dotted name of the setting."""
    choices: tuple[Any, ...] | None
    """The choices in the order of the axis, numbers by size; None for a range."""
    is_log: bool
    """Whether places are logarithms."""
    low: float
    """Place of the lower end."""
    high: float
    """Place of the upper end."""

    @property
    def is_ordered(self) -> bool:
        """Whether a larger place means more."""
        return self.choices is None or all(map(_is_number, self.choices))

    def place(self, value: Any) -> float:
        """Where a value is on the axis."""
        if self.choices is not None:
            return float([_key(choice) for choice in self.choices].index(_key(value)))
        return math.log10(value) if self.is_log else float(value)


def setting_axes(sweep: SweepConfig, records: Sequence[TrialRecord]) -> list[SettingAxis]:
    """The axis of every searched setting. It holds all values of its space, and those of the records."""
    return [
        _axis(name, space, [record.values[name] for record in records if name in record.values])
        for name, space in sweep.search.items()
    ]


def value_text(value: Any) -> str:
    """A value of a setting or an objective for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _axis(name: str, space: SearchSpace, tried: list[Any]) -> SettingAxis:
    if space.choice is not None:
        choices = _distinct([*space.choice, *tried])
        if all(map(_is_number, choices)):
            choices.sort()
        return SettingAxis(name, tuple(choices), False, 0.0, max(len(choices) - 1.0, 0.0))
    ends = space.integers or space.uniform or space.loguniform
    assert ends is not None  # set by the config's validation
    is_log = space.loguniform is not None
    places = [math.log10(value) if is_log else float(value) for value in (*ends, *tried)]
    return SettingAxis(name, None, is_log, min(places), max(places))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key(value: Any) -> str:
    """Equal for a choice and for the same choice read from a record, such as a tuple and a list."""
    if isinstance(value, list | tuple):
        return repr(list(map(_key, value)))
    return repr(float(value)) if _is_number(value) else repr(value)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({_key(value): value for value in reversed(list(values))}.values())[::-1]
