"""Figures of a comparison's runs, recorded while they train, because a later start may finish a run."""

from __future__ import annotations

import time
from functools import cached_property

from pydantic import BaseModel, ConfigDict, ValidationError

from crate_ray.comparison.table import PretrainFigures, settled_speed
from crate_ray.config import CompareConfig
from crate_ray.config.identifiers import Count
from crate_ray.errors import UserError, invalid_value
from crate_ray.runs import metrics
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import Run
from crate_ray.storage.interface import Storage, open_storage

_WRITE_SECONDS = 30.0

_STORED_NAMES = {metrics.VALIDATION_LOSS: "validation_loss", metrics.TOP1: "top1", metrics.TOP5: "top5"}
"""Names of the metrics in a follower's file."""


def follower_of(config: CompareConfig, run: str) -> Follower:
    """The follower of a run, with what was recorded in earlier starts."""
    return Follower(open_storage(config.storage, config.s3).under(config.name), f"figures/{run}.followed.json")


class Follower(Listener):
    """Records speed, memory and validation metrics of a run in a file, because a later start may finish the run.

    The file is read when it is first needed. By then the caller holds the run's lease.
    """

    def __init__(self, folder: Storage, name: str) -> None:
        self._folder, self._name = folder, name
        self._written = 0.0

    @cached_property
    def _kept(self) -> _Followed:
        if not self._folder.exists(self._name):
            return _Followed()
        try:
            return _Followed.model_validate_json(self._folder.read_small(self._name))
        except ValidationError as error:
            raise UserError(
                f"{self._folder.uri}/{self._name} cannot be read ({invalid_value(error)}); delete it and the run's "
                "folder to train the run again"
            ) from None

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        kept = self._kept
        if metrics.IMAGES_PER_SECOND in values:
            kept.images_per_second[step] = values[metrics.IMAGES_PER_SECOND]
            memory = values.get(metrics.GPU_MEMORY_BYTES, values.get(metrics.MEMORY_BYTES, 0.0))
            kept.memory_bytes = max(kept.memory_bytes, memory)
        if metrics.VALIDATION_LOSS in values:
            for metric, name in _STORED_NAMES.items():
                if metric in values:
                    kept.held_out.setdefault(name, {})[step] = values[metric]
        if metrics.VALIDATION_LOSS in values or time.monotonic() > self._written + _WRITE_SECONDS:
            self._written = time.monotonic()
            self._folder.write(self._name, kept.model_dump_json().encode())

    def final(self, name: str, run: Run) -> float:
        """A validation metric at the last step of a run. Raises UserError if it was not recorded."""
        found = self._kept.held_out.get(name, {}).get(run.total_steps)
        if found is None:
            raise UserError(
                f"run {run.config.name!r} is finished, but the comparison has no metrics of its last step; delete "
                f"{run.storage.uri} to train it again, or give the comparison another name"
            )
        return found

    def figures(self, run: Run) -> PretrainFigures:
        """Validation loss at the last step, median speed, peak memory. Raises as `final` does."""
        kept = self._kept
        return PretrainFigures(
            loss=self.final("validation_loss", run),
            images_per_second=settled_speed([speed for _, speed in sorted(kept.images_per_second.items())]),
            memory_bytes=kept.memory_bytes,
        )


class _Followed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    images_per_second: dict[Count, float] = {}
    memory_bytes: float = 0.0
    held_out: dict[str, dict[Count, float]] = {}
