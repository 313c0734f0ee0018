"""One trial of a sweep: a full pretraining run, its objective and its record. The trial's id makes it resumable."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, ValidationError
from ray import tune

from crate_ray.addresses import redact
from crate_ray.config import ModelConfig, OnlineProbeConfig, PretrainConfig, Record, SweepConfig
from crate_ray.errors import UserError, invalid_value
from crate_ray.evaluation.online import measure_checkpoint
from crate_ray.ray_cluster import cluster_nodes
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import Run
from crate_ray.runs.pretraining import open_pretraining
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.sweeps.objectives import DURING_TRAINING, Followed, num_parameters, objectives
from crate_ray.sweeps.placement import trial_scaling
from crate_ray.sweeps.space import trial_config
from crate_ray.tracking.run_tracker import RunTracker
from crate_ray.training.lifecycle import run_training
from crate_ray.training.pretraining import PretrainTask

PARENT_TAG, TRIAL_TAG = "mlflow.parentRunId", "crate_ray.trial"
RECORDS = "results/"
METRIC, STEP = "objective", "step"
"""What a trial reports to Ray Tune."""


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
    number: int = 0
    """Place in the order in which trials started, from 1; 0 in records of earlier versions."""
    step: int = 0
    """Optimizer steps done at that time."""
    losses: dict[int, float] = Field(default_factory=dict)
    """Objectives during training by step, as reported for early stopping."""
    cause: str = ""
    """Why it failed or was pruned; empty otherwise."""
    run_key: str = ""
    """Key of its training run in MLflow."""


def run_trial(suggested: dict[str, Any], sweep: SweepConfig, shared: dict[str, Any], parent_run: str) -> None:
    """Train with sampled values, and report the objective, during training and at the end. Ray Tune calls this.

    `suggested` comes from search.TrialSearch. The run of an interrupted trial resumes from its newest checkpoint.
    """
    trial, values = suggested["trial"], suggested["values"]
    folder = open_storage(sweep.storage, sweep.s3).under(sweep.name)
    record = _Record(folder, TrialRecord(trial=trial, number=suggested["number"], values=values))
    try:
        config = trial_config(sweep, shared, values, f"trial-{trial}")
        scaling = trial_scaling(config.scaling, sweep.max_concurrent, cluster_nodes())
        config = config.model_copy(update={"scaling": scaling, "probe": config.probe or _online_probe(sweep, config)})
        reporter = _Reporter(sweep, record, config.model)

        def start(config: PretrainConfig) -> Run:
            run = _with_threads(open_pretraining(config))
            record.update(run_key=run.record.run_key, parameters=num_parameters(config.model))
            reporter.total_steps = run.total_steps
            return run

        def finish(run: Run, tracker: RunTracker) -> dict[str, float]:
            found = objectives(sweep, run, reporter.followed, record.now.objectives)
            if sweep.objective != "validation_loss":
                metrics = {f"{sweep.objective}_encoder": found[sweep.objective]}
                tracker.metrics(run.total_steps, metrics, int(time.time() * 1000))
            return found

        tags = {TRIAL_TAG: trial} | ({PARENT_TAG: parent_run} if parent_run else {})
        finished = run_training(
            config,
            PretrainTask,
            start,
            finish,
            listeners=[reporter],
            tags=tags,
            show_progress=False,
            must_record=False,
            measure=measure_checkpoint,
        )
    except Exception as error:
        record.update(status="failed", cause=redact(" ".join(str(error).split()))[:500] or type(error).__name__)
        raise
    found, step = finished.result or record.now.objectives, finished.run.total_steps
    objective = found[sweep.objective]
    record.update(status="finished", objective=objective, objectives=found, step=step)
    tune.report({METRIC: objective, STEP: step, "objectives": found})


def _online_probe(sweep: SweepConfig, config: PretrainConfig) -> OnlineProbeConfig | None:
    """Measures the objective during training, if early stopping needs it and it is an accuracy."""
    if sweep.early_stopping == "none" or sweep.objective == "validation_loss" or sweep.probe is None:
        return None
    given = sweep.probe.model_dump(include={"train", "test", "feature"})
    return OnlineProbeConfig(**given, every=config.training.validate_every)


def _with_threads(run: Run) -> Run:
    """The run with the CPUs per worker of its first start, on which its results depend, also if the cluster changed."""
    if not run.record.threads:
        return run
    scaling = run.config.scaling.model_copy(update={"cpus_per_worker": run.record.threads})
    return replace(run, config=run.config.model_copy(update={"scaling": scaling}))


def read_records(sweep: Storage) -> list[TrialRecord]:
    """The records of all trials in a sweep's folder, by id. Raises UserError if one is damaged."""
    return sorted((_read_record(sweep, info.key) for info in sweep.list(RECORDS)), key=lambda record: record.trial)


class RecordReader:
    """Reads the records of all trials again and again. A record is read only if it has changed.

    Args:
        sweep: the sweep's folder.
    """

    def __init__(self, sweep: Storage) -> None:
        self._sweep = sweep
        self._known: dict[str, tuple[str, TrialRecord]] = {}

    def read(self) -> list[TrialRecord]:
        """The records as `read_records` gives them."""
        for info in self._sweep.list(RECORDS):
            if self._known.get(info.key, ("",))[0] != info.etag:
                self._known[info.key] = info.etag, _read_record(self._sweep, info.key)
        return sorted((record for _, record in self._known.values()), key=lambda record: record.trial)


def read_record(sweep: Storage, trial: str) -> TrialRecord | None:
    """The record of a trial; None if there is none. Raises UserError if it is damaged."""
    name = _record_name(trial)
    return _read_record(sweep, name) if sweep.exists(name) else None


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

    def __init__(self, sweep: Storage, new: TrialRecord) -> None:
        self._sweep, self._began = sweep, time.monotonic()
        self.now = read_record(sweep, new.trial) or new
        self._earlier = self.now.seconds
        self.update()

    def update(self, **changes: Any) -> None:
        """Change fields and write the record."""
        seconds = self._earlier + time.monotonic() - self._began
        self.now = self.now.model_copy(update={"seconds": seconds, **changes})
        write_record(self._sweep, self.now)


class _Reporter(Listener):
    """Follows a trial. Reports its objective to Ray Tune during training, for early stopping."""

    def __init__(self, sweep: SweepConfig, record: _Record, model: ModelConfig) -> None:
        self._sweep, self._record, self._model = sweep, record, model
        self.followed = Followed()
        self.total_steps = 0

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Report the objective, if it is among the values."""
        self.followed.add(values)
        objective = values.get(DURING_TRAINING.get(self._sweep.objective, ""))
        # Any report may end the trial's process. So run_trial reports the last one, after the workers have ended.
        if objective is None or step >= self.total_steps:
            return
        if not math.isfinite(objective):
            raise UserError(f"{self._sweep.objective} is {objective} at step {step}; try lower learning rates")
        known = {self._sweep.objective: objective, **self.followed.against(self._sweep, self._model)}
        losses = {**self._record.now.losses, step: objective}
        self._record.update(objective=objective, objectives=known, step=step, losses=losses)
        tune.report({METRIC: objective, STEP: step})
