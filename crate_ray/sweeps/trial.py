"""One trial of a sweep: a full pretraining run, its objective and its record. The trial's id makes it resumable."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError
from ray import tune

from crate_ray.addresses import redact
from crate_ray.config import PretrainConfig, Record, SweepConfig
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.errors import UserError, invalid_value
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


class TrialRecord(Record):
    """State of a trial, stored in <sweep>/results/<trial>.json."""

    trial: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
    """Id of the trial."""
    values: dict[str, Any]
    """Sampled settings, dotted."""
    status: str = "running"
    """'running', 'finished', 'stopped early', 'failed', or 'pruned': a combination that cannot work, which was not run.
    'running' at the start of a sweep means interrupted."""
    objective: float | None = None
    """The last known objective."""
    objectives: dict[str, float] = Field(default_factory=dict)
    """Every objective by name, such as validation_loss and parameters; the first one is `objective`. Empty in records
    of earlier versions."""
    seconds: float = 0.0
    """Wall time of the trial over all its starts."""
    parameters: int = 0
    """Number of parameters of its model; 0 in records of earlier versions."""
    step: int = 0
    """Optimizer steps done at that time."""
    losses: dict[int, float] = Field(default_factory=dict)
    """Validation losses by step, as reported for early stopping."""
    cause: str = ""
    """Why it failed or was pruned; empty otherwise."""
    run_key: str = ""
    """Key of its training run in MLflow."""


def run_trial(suggested: dict[str, Any], sweep: SweepConfig, shared: dict[str, Any], parent_run: str) -> None:
    """Train with sampled values, and report validation losses and the objective. Ray Tune calls this.

    `suggested` comes from search.TrialSearch. The run of an interrupted trial resumes from its newest checkpoint.
    """
    trial, values = suggested["trial"], suggested["values"]
    record = _Record(open_storage(sweep.storage, sweep.s3).under(sweep.name), trial, values)
    try:
        config = trial_config(sweep, shared, values, f"trial-{trial}")
        reporter = _Reporter(record, sweep.objective == "validation_loss")

        def start(config: PretrainConfig) -> Run:
            run = open_pretraining(config)
            record.update(run_key=run.record.run_key)
            reporter.total_steps = run.total_steps
            return run

        def measure(run: Run, tracker: RunTracker) -> float:
            objective = _objective(sweep, config, run, reporter.last_loss)
            if sweep.objective == "probe_accuracy":
                tracker.metrics(run.total_steps, {"probe_accuracy_encoder": objective}, int(time.time() * 1000))
            return objective

        tags = {TRIAL_TAG: trial} | ({PARENT_TAG: parent_run} if parent_run else {})
        finished = run_training(
            config, PretrainTask, start, measure, listeners=[reporter], tags=tags, show_progress=False
        )
    except Exception as error:
        record.update(status="failed", cause=redact(" ".join(str(error).split()))[:500] or type(error).__name__)
        raise
    objective, step = finished.result, finished.run.total_steps
    record.update(status="finished", objective=objective, step=step)
    tune.report({"objective": objective, "step": step})


def read_records(sweep: Storage) -> list[TrialRecord]:
    """The records of all trials in a sweep's folder, by id. Raises UserError if one is damaged."""
    return sorted((_read_record(sweep, info.key) for info in sweep.list(RECORDS)), key=lambda record: record.trial)


def write_record(sweep: Storage, record: TrialRecord) -> None:
    """Write a trial's record to a sweep's folder."""
    sweep.write(_record_name(record.trial), record.model_dump_json().encode())


def _record_name(trial: str) -> str:
    return f"{RECORDS}{trial}.json"


def _read_record(sweep: Storage, name: str) -> TrialRecord:
    try:
        record = TrialRecord.model_validate_json(sweep.read_small(name))
    except ValidationError as error:
        cause = invalid_value(error)
    else:
        if name == _record_name(record.trial):
            return record
        cause = f"it is the record of trial {record.trial}"
    raise UserError(f"{sweep.uri}/{name} cannot be read ({cause}); delete it to run another trial in its place")


class _Record:
    """The trial's record, written to storage at every change. That of an interrupted trial is continued."""

    def __init__(self, sweep: Storage, trial: str, values: dict[str, Any]) -> None:
        self._sweep = sweep
        new = TrialRecord(trial=trial, values=values)
        self._record = _read_record(sweep, _record_name(trial)) if sweep.exists(_record_name(trial)) else new
        self.update()

    def update(self, **changes: Any) -> None:
        """Change fields and write the record."""
        self._record = self._record.model_copy(update=changes)
        write_record(self._sweep, self._record)

    def add_loss(self, step: int, loss: float) -> None:
        """Add a validation loss."""
        self.update(objective=loss, step=step, losses=self._record.losses | {step: loss})


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
                self._record.add_loss(step, self.last_loss)
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
