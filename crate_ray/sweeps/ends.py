"""Records how trials end that cannot record it themselves, because Ray Tune or the system ended their process."""

from __future__ import annotations

from typing import Any

from ray import tune

from crate_ray.addresses import redact
from crate_ray.storage.interface import Storage
from crate_ray.sweeps.trial import TrialRecord, read_record, write_record


class RecordEnds(tune.Callback):
    """Adds to the records which trials Ray Tune stopped early, and which trials' processes died."""

    def __init__(self, sweep: Storage) -> None:
        self._sweep = sweep

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune calls this when a trial has finished or was stopped early."""
        self._end(trial, status="stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ray Tune calls this when a trial has failed."""
        lines = str(trial.get_error() or "").strip().splitlines() or ["its process died"]
        self._end(trial, status="failed", cause=redact(lines[-1]))

    def _end(self, trial: Any, **changes: str) -> None:
        # A process that died at its start has written no record.
        record = read_record(self._sweep, trial.config["trial"]) or TrialRecord.model_validate(trial.config)
        if record.status == "running":
            write_record(self._sweep, record.model_copy(update=changes))
