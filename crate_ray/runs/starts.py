"""The settings of each start of a run, <run>/starts/start-001.json. A resumed run may have others than before.

run.json holds the settings of the first start, and MLflow's parameters never change. So each start is recorded.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import Field, ValidationError

from crate_ray.config import FinetuneConfig, PretrainConfig, Settings
from crate_ray.config.identifiers import Count
from crate_ray.runs.planning import Run, RunConfig
from crate_ray.runs.record import read_record
from crate_ray.storage.interface import NotFound, Storage

FOLDER = "starts"
_NAME = re.compile(f"{FOLDER}/start-([0-9]{{3,9}})\\.json")
_ORDER_STAYS = ("data.memory_bytes", "data.buffer_bytes")
_MOST_SHOWN = 20


class Start(Settings):
    """One start of a run."""

    number: Count
    """1 for the first."""
    step: Count
    """Step at which it began."""
    total_steps: Count
    """Step at which the run is finished."""
    config: PretrainConfig | FinetuneConfig
    """Its settings."""
    changed: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    """Settings that differ from the start before: their values there and here."""

    @property
    def name(self) -> str:
        """Name of the record, and of the artifact in MLflow."""
        return f"start-{self.number:03d}.json"

    @property
    def changes(self) -> str:
        """The changed settings in words; empty if there are none."""
        shown = [f"{name} {_text(now)} (was {_text(was)})" for name, (was, now) in self.changed.items()]
        more = len(shown) - _MOST_SHOWN
        text = ", ".join(shown[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
        if stays := [name for name in _ORDER_STAYS if name in self.changed]:
            text += f"; {' and '.join(stays)} changes how samples are read, but not their order"
        return text


def record_start(run: Run) -> Start:
    """Record a start of a run in its folder. Needs the run's lease (see planning.driver_lease)."""
    last, before = _newest(run.storage)
    if before is None and run.first_step and (record := read_record(run.storage)):
        last, before = max(last, 1), record.config
    start = Start(
        number=last + 1,
        step=run.first_step,
        total_steps=run.total_steps,
        config=run.config,
        changed=changed_settings(before, run.config) if before else {},
    )
    run.storage.write(f"{FOLDER}/{start.name}", start.model_dump_json(indent=2).encode())
    return start


def changed_settings(before: Settings, now: Settings) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted names, with both values."""
    old, new = _leaves(before.model_dump(mode="json")), _leaves(now.model_dump(mode="json"))
    return {
        name: (old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)
    }


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _newest(storage: Storage) -> tuple[int, RunConfig | None]:
    """Number and settings of the newest start. A damaged record counts as one without settings: people read them."""
    found = [(int(match[1]), info.key) for info in storage.list(f"{FOLDER}/") if (match := _NAME.fullmatch(info.key))]
    last = max(found, default=(0, ""))[0]
    for _, key in sorted(found, reverse=True):
        try:
            return last, Start.model_validate_json(storage.read_small(key)).config
        except (NotFound, ValidationError):
            continue
    return last, None


def _text(value: Any) -> str:
    """A value as in YAML."""
    return json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, bool) else str(value)
