"""Settings that a sweep tries first: the best of an earlier sweep, or those of a YAML file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from crate_ray.config import PretrainConfig, SweepConfig
from crate_ray.config.values import load_settings
from crate_ray.errors import UserError
from crate_ray.storage.interface import NotFound, open_storage
from crate_ray.sweeps.combinations import Values, in_space
from crate_ray.sweeps.trial import read_records

RECORD_FILE = "sweep.json"
"""The settings of a sweep's first start, in its folder."""


def warm_start(sweep: SweepConfig) -> list[Values]:
    """Values to try first, the best ones first. Of an earlier sweep, they are for at most a quarter of the trials.

    Raises:
        UserError: there are none, or they have no searched setting with a value in its range.
    """
    given = sweep.warm_start
    if given is None:
        return []
    is_file = given.endswith((".yaml", ".yml"))
    found = [_searched(sweep, load_settings(PretrainConfig, Path(given)))] if is_file else _best_of(sweep, given)
    values = [{name: value for name, value in one.items() if in_space(sweep.search[name], value)} for one in found]
    if not any(values):
        raise UserError(
            f"warm_start {given} has no value of {', '.join(sweep.search)} within its range; widen `search`, or leave "
            "warm_start out"
        )
    return [one for one in values if one]


def _searched(sweep: SweepConfig, settings: dict[str, Any]) -> Values:
    """The searched settings among nested ones."""
    found = {}
    for name in sweep.search:
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


def _best_of(sweep: SweepConfig, given: str) -> list[Values]:
    """Searched settings of the best trials of an earlier sweep."""
    folder = open_storage(given, sweep.s3)
    try:
        objective = json.loads(folder.read_small(RECORD_FILE))["sweep"]["objective"]
    except (NotFound, ValueError, KeyError, TypeError):
        raise UserError(
            f"warm_start {given} is neither the folder of a sweep nor a .yaml file; give <storage>/<name> of the sweep"
        ) from None
    sign = 1 if objective == "validation_loss" else -1
    records = [r for r in read_records(folder) if r.status == "finished" and r.objective is not None]
    records = [record for record in records if math.isfinite(record.objective or 0.0)]
    if not records:
        raise UserError(f"warm_start {given} has no finished trial; give another sweep, or leave warm_start out")
    records.sort(key=lambda record: sign * (record.objective or 0.0))
    chosen = records[: max(1, sweep.trials // 4)]
    return [{name: value for name, value in record.values.items() if name in sweep.search} for record in chosen]
