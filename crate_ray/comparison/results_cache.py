"""Stores the results of a comparison: one small file each, with the settings that it was measured with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage

_ModelT = TypeVar("_ModelT", bound=BaseModel)


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid")

    measured_with: dict[str, Any]
    """Settings by group, and digests of the data."""
    figures: dict[str, Any]


def check_unchanged(folder: Storage, name: str, measured_with: dict[str, Any]) -> None:
    """Raise UserError if the stored figures of this name were measured with other settings or data.

    Call it for everything that is trained. Otherwise the old run of this name would be continued, or count as finished.
    """
    kept = _read(folder, name)
    if kept is None or kept.measured_with == measured_with:
        return
    was, now = _flat(kept.measured_with), _flat(measured_with)
    setting = next(s for s in sorted({*was, *now}) if was.get(s) != now.get(s))
    raise UserError(
        f"{name} of {folder.uri} was measured with {setting} {was.get(setting)}, not {now.get(setting)}; give the "
        "comparison another name, or delete its folder to train it again"
    )


def once(
    folder: Storage, name: str, kind: type[_ModelT], measured_with: dict[str, Any], measure: Callable[[], _ModelT]
) -> _ModelT:
    """Return the stored result of this name if its settings and data are the same. Otherwise measure and store it."""
    kept = _read(folder, name)
    if kept is not None and kept.measured_with == measured_with:
        try:
            return kind.model_validate(kept.figures)
        except ValidationError:
            raise _unreadable(folder, name) from None
    found = measure()
    kept = _Kept(measured_with=measured_with, figures=found.model_dump(mode="json"))
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


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            out |= {f"{name}.{inner}": v for inner, v in _flat(value).items()}
        else:
            out[name] = value
    return out
