"""Stores the results of a comparison: one small file each, with the settings that it was measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from crate_ray.config import Settings
from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage

_ModelT = TypeVar("_ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Conditions:
    """What figures depend on: settings by group, and digests of data."""

    all: dict[str, Any]
    chosen: dict[str, Any]
    """The same without settings that have their default value."""

    @classmethod
    def of(cls, settings: Settings, without: Any = None) -> Self:
        """The settings, `without` some (pydantic's `exclude`)."""
        chosen = settings.model_dump(mode="json", exclude=without, exclude_defaults=True)
        return cls(settings.model_dump(mode="json", exclude=without), chosen)

    def extended(self, **facts: Any) -> Self:
        """With more facts by name. Conditions become a group of their own."""
        parts = {name: fact if isinstance(fact, Conditions) else Conditions(fact, fact) for name, fact in facts.items()}
        return type(self)(
            {**self.all, **{name: part.all for name, part in parts.items()}},
            {**self.chosen, **{name: part.chosen for name, part in parts.items()}},
        )

    def change(self, stored: dict[str, Any]) -> str | None:
        """The first setting that differs from stored ones, by its dotted name; None if none differs.

        A setting that an earlier version did not have does not differ while it has its default value.
        """
        was, now, chosen = flat(stored), flat(self.all), flat(self.chosen)
        changed = (n for n in sorted({*was, *now}) if was.get(n) != now.get(n) and (n in was or n in chosen))
        return next(changed, None)


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid")

    measured_with: dict[str, Any]
    """Settings by group, and digests of the data."""
    figures: dict[str, Any]


def check_unchanged(folder: Storage, name: str, measured_with: Conditions) -> None:
    """Raise UserError if the stored figures of this name were measured with other settings or data.

    Call it for everything that is trained. Otherwise the old run of this name would be continued, or count as finished.
    """
    kept = _read(folder, name)
    if kept is None or (setting := measured_with.change(kept.measured_with)) is None:
        return
    was, now = flat(kept.measured_with).get(setting), flat(measured_with.all).get(setting)
    raise UserError(
        f"{name} of {folder.uri} was measured with {setting} {was}, not {now}; give the comparison another name, or "
        "delete its folder to train it again"
    )


def once(
    folder: Storage, name: str, kind: type[_ModelT], measured_with: Conditions, measure: Callable[[], _ModelT]
) -> _ModelT:
    """Return the stored result of this name if its settings and data are the same. Otherwise measure and store it."""
    kept = _read(folder, name)
    if kept is not None and measured_with.change(kept.measured_with) is None:
        try:
            return kind.model_validate(kept.figures)
        except ValidationError:
            raise _unreadable(folder, name) from None
    found = measure()
    kept = _Kept(measured_with=measured_with.all, figures=found.model_dump(mode="json"))
    folder.write(_path(name), kept.model_dump_json(indent=1).encode())
    return found


def _path(name: str) -> str:
    return f"figures/{name}.json"


def _read(folder: Storage, name: str) -> _Kept | None:
    if not folder.exists(_path(name)):
        return None
    try:
        return _Kept.model_validate_json(folder.read_small(_path(name)))
    except ValidationError:
        raise _unreadable(folder, name) from None


def _unreadable(folder: Storage, name: str) -> UserError:
    return UserError(f"{folder.uri}/{_path(name)} cannot be read as a stored result; delete it, or choose another name")


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            out |= {f"{name}.{inner}": v for inner, v in flat(value).items()}
        else:
            out[name] = value
    return out
