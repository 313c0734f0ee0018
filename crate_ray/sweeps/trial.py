"""One trial of a sweep: a full pretraining run, its objective and its record. The trial's id makes it resumable."""

from __future__ import annotations

import time
from typing import Any

import torch
from ray import tune

from crate_ray.config import PretrainConfig, Settings, SweepConfig
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.evaluation.probe import probe_encoder
from crate_ray.models.exported import Normalizer
from crate_ray.runs.listener import Listener
from crate_ray.runs.metrics import VALIDATION_LOSS
from crate_ray.runs.planning import Run
from crate_ray.runs.pretraining import open_pretraining
from crate_ray.runs.references import load_encoder
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.sweeps.space import trial_config
from crate_ray.tracking.run_tracker import RunTracker
from crate_ray.training.lifecycle import run_training
from crate_ray.training.pretraining import PretrainTask, validation_loss

PARENT_TAG, TRIAL_TAG = "mlflow.parentRunId", "crate_ray.trial"
RECORDS = "results/"


class TrialRecord(Settings):
    """State of a trial, stored in <sweep>/results/<trial>.json."""

    trial: str
    """Ray Tune's id of the trial."""
    values: dict[str, Any]
    """Sampled settings, dotted."""
    status: str = "running"
    """'running', 'finished', 'stopped early' or 'failed'."""
    objective: float | None = None
    """The last known objective."""
    step: int = 0
    """Optimizer steps done at that time."""
    cause: str = ""
    """Why it failed; empty otherwise."""
    run_key: str = ""
    """Key of its training run in MLflow."""


def run_trial(values: dict[str, Any], sweep: dict[str, Any], shared: dict[str, Any], parent_run: str) -> None:
    """Train with sampled values, and report validation losses and the objective. Ray Tune calls this."""
    settings = SweepConfig.model_validate(sweep)
    trial = str(tune.get_context().get_trial_id())
    folder = open_storage(settings.storage, settings.s3).under(settings.name)
    if (done := _finished(folder, trial)) is not None:
        # The driver was killed before Ray Tune had saved the result.
        tune.report({"objective": done.objective, "step": done.step})
        return
    record = _Record(folder, trial, values)
    try:
        config = trial_config(settings, shared, values, f"trial-{trial}")
        reporter = _Reporter(record, settings.objective == "validation_loss")

        def start(config: PretrainConfig) -> Run:
            run = open_pretraining(config)
            record.update(run_key=run.record.run_key)
            reporter.total_steps = run.total_steps
            return run

        def measure(run: Run, tracker: RunTracker) -> float:
            objective = _objective(settings, config, run, reporter.last_loss)
            if settings.objective == "probe_accuracy":
                tracker.metrics(run.total_steps, {"probe_accuracy_encoder": objective}, int(time.time() * 1000))
            return objective

        tags = {TRIAL_TAG: trial} | ({PARENT_TAG: parent_run} if parent_run else {})
        finished = run_training(
            config, PretrainTask, start, measure, listeners=[reporter], tags=tags, show_progress=False
        )
    except Exception as error:
        record.update(status="failed", cause=" ".join(str(error).split())[:500] or type(error).__name__)
        raise
    objective, step = finished.result, finished.run.total_steps
    record.update(status="finished", objective=objective, step=step)
    tune.report({"objective": objective, "step": step})


def _finished(sweep: Storage, trial: str) -> TrialRecord | None:
    name = f"{RECORDS}{trial}.json"
    record = TrialRecord.model_validate_json(sweep.read(name)) if sweep.exists(name) else None
    return record if record and record.status == "finished" else None


class _Record:
    """The trial's record, written to storage at every change."""

    def __init__(self, sweep: Storage, trial: str, values: dict[str, Any]) -> None:
        self._sweep, self._record = sweep, TrialRecord(trial=trial, values=values)
        self.update()

    def update(self, **changes: Any) -> None:
        """Change fields and write the record."""
        self._record = self._record.model_copy(update=changes)
        self._sweep.write(f"{RECORDS}{self._record.trial}.json", self._record.model_dump_json().encode())


class _Reporter(Listener):
    """Reports validation losses to Ray Tune, for early stopping."""

    def __init__(self, record: _Record, report: bool) -> None:
        self._record, self._report = record, report
        self.total_steps = 0
        self.last_loss: float | None = None

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Report a validation loss."""
        if VALIDATION_LOSS in values:
            self.last_loss = values[VALIDATION_LOSS]
            # Any report may end the trial's process. So run_trial reports the last loss, after the workers have ended.
            if self._report and step < self.total_steps:
                self._record.update(objective=self.last_loss, step=step)
                tune.report({"objective": self.last_loss, "step": step})


def _objective(settings: SweepConfig, config: PretrainConfig, run: Run, last_loss: float | None) -> float:
    if settings.objective == "validation_loss" and last_loss is not None:
        return last_loss
    model, description = load_encoder(run.storage.uri, config.tracking, config.s3)

    def dataset(uri: str) -> ShardSet:
        return load_dataset(open_storage(uri, config.s3))

    if settings.objective == "probe_accuracy" and settings.probe is not None:
        train, test = dataset(settings.probe.train), dataset(settings.probe.test)
        return probe_encoder(model, description, train, test, settings.probe).accuracy
    # The run had finished before the trial was interrupted: measure its model again.
    assert config.data.validation is not None
    normalizer = Normalizer.of(description.mean, description.std, torch.device("cpu"))
    return validation_loss(model, dataset(config.data.validation), config, normalizer, None)
