"""Two threads that deliver a run's spool to MLflow, and retry while the server is unavailable.

One delivers the records, the other one the files. So metrics arrive also while an artifact store does not answer.
"""

from __future__ import annotations

import logging
import posixpath
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar, get_args

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run
from mlflow.exceptions import MlflowException

from crate_ray.addresses import Address, redact
from crate_ray.errors import UserError
from crate_ray.runs.mlflow_lookup import RUN_KEY_TAG, connect, find_run, sqlite_path
from crate_ray.tracking.flavor import log_model
from crate_ray.tracking.spool import Event, FileEvent, Lane, MetricsEvent, ModelEvent, Spool, StatusEvent, TagEvent

logger = logging.getLogger(__name__)

_PARENT_TAG = "mlflow.parentRunId"
_DESCRIBED_TAG = "crate_ray.described"  # set once parameters and lineage are complete
_RETRY_SECONDS = 5.0
_METRICS_PER_REQUEST = 500  # MLflow takes at most 1000
_PARAMS_PER_REQUEST = 100
# MLflow's limits in characters
_LONGEST_PARAM, _LONGEST_NAME, _LONGEST_TAG, _LONGEST_DATASET_NAME = 6000, 250, 5000, 500
_REFUSED = "INVALID_PARAMETER_VALUE"
_PERMANENT = {_REFUSED, "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_DOES_NOT_EXIST"}
_PATIENCE_SECONDS = 10.0  # for a server that refuses connections
_SILENCE_SECONDS = 60.0  # for one that does not answer
_RecordT = TypeVar("_RecordT", Metric, Param)


@dataclass(frozen=True)
class RunDescription:
    """Description of a run in MLflow, in addition to its records."""

    experiment: str
    key: str
    """Permanent key of the run, independent of its name."""
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    datasets: Sequence[Dataset] = ()
    """Training data, for MLflow's lineage."""
    parent_key: str | None = None
    """Key of the run whose model this run started from. If MLflow has that run, it shows this run as its child."""


class Delivery:
    """Delivers events in their order, in two threads that start at once.

    Every event carries its own time, so delivering it twice changes nothing.

    Args:
        spool: where the events are.
        uri: MLflow's address.
        description: description of the run, which is created if MLflow does not have it.
    """

    def __init__(self, spool: Spool, uri: Address, description: RunDescription) -> None:
        self._spool, self._uri, self._description = spool, uri, description
        self.run_id = ""
        """MLflow's id of the run; empty until the server has answered."""
        self._client: MlflowClient | None = None
        self._problems: dict[Lane, Exception] = {}  # why the last attempt failed
        self._answered: set[Lane] = set()
        self._stop, self._give_up = threading.Event(), threading.Event()
        lanes: tuple[Lane, ...] = get_args(Lane)
        self._wakes = {lane: threading.Event() for lane in lanes}
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"mlflow {lane}", daemon=True) for lane in lanes
        ]
        for thread in self._threads:
            thread.start()

    @property
    def problem(self) -> Exception | None:
        """Why the last attempt failed."""
        return next(iter(self._problems.values()), None)

    def first_problem(self) -> tuple[Lane, Exception] | None:
        """Wait until MLflow has taken a record and a file. Returns why it does not, and which of them.

        A server that refuses connections may be starting, so there are several attempts.
        """
        began = time.monotonic()
        while missing := sorted(self._wakes.keys() - self._answered, reverse=True):
            waited = time.monotonic() - began
            for lane in missing:
                problem = self._problems.get(lane)
                if problem is not None and (_is_permanent(problem) or waited > _PATIENCE_SECONDS):
                    return lane, problem
            if waited > _SILENCE_SECONDS:
                return missing[0], TimeoutError(f"no answer within {waited:.0f} s")
            time.sleep(0.02)
        return None

    def wake(self) -> None:
        """Deliver new events now."""
        for wake in self._wakes.values():
            wake.set()

    def finish(self, seconds: float) -> None:
        """Wait at most `seconds` until all events are delivered, then end the threads."""
        deadline = time.monotonic() + seconds
        self._stop.set()
        self.wake()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._give_up.set()

    def abandon(self) -> None:
        """End the threads after their current attempt."""
        self._give_up.set()
        self._stop.set()
        self.wake()

    def _run(self, lane: Lane) -> None:
        while True:
            self._wakes[lane].wait(_RETRY_SECONDS)
            self._wakes[lane].clear()
            try:
                if lane == "records":
                    self._send_records(self._client or self._connect())
                elif self._client is not None:
                    self._send_files(self._client)
                self._problems.pop(lane, None)
                if self._client is not None:
                    self._answered.add(lane)
            except Exception as error:  # the client raises many types if the server is unavailable or fails
                if lane not in self._problems and not self._give_up.is_set():
                    cause = redact(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    logger.warning("MLflow at %s: %s; %s wait on disk", self._uri, cause, lane)
                self._problems[lane] = error
            if self._stop.is_set() and (self._give_up.is_set() or self._spool.is_sent(lane)):
                return

    def _connect(self) -> MlflowClient:
        """Find or create the run, and complete its description."""
        client, about = connect(self._uri), self._description
        experiment_id = self._experiment_id(client)
        found = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{about.key}'", max_results=1)
        run = found[0] if found else self._create_run(client, experiment_id)
        self.run_id = run_id = run.info.run_id
        if _DESCRIBED_TAG not in run.data.tags:
            known = run.data.params  # from an earlier, interrupted attempt
            params = [
                Param(name, value[:_LONGEST_PARAM])
                for name, value in mlflow_names(about.params).items()
                if name not in known
            ]
            self._in_batches(params, _PARAMS_PER_REQUEST, lambda part: client.log_batch(run_id, params=part))
            if about.datasets:
                context = [InputTag("mlflow.data.context", "training")]
                self._unless_refused(
                    lambda: client.log_inputs(run_id, [DatasetInput(_short(d), context) for d in about.datasets])
                )
            client.set_tag(run_id, _DESCRIBED_TAG, "true")
        self._client = client
        self._wakes["files"].set()
        return client

    def _create_run(self, client: MlflowClient, experiment_id: str) -> Run:
        about = self._description
        tags = {**about.tags, RUN_KEY_TAG: about.key}
        if about.parent_key and (parent := find_run(client, about.parent_key)):
            tags = {_PARENT_TAG: parent} | tags
        tags = {name: value[:_LONGEST_TAG] for name, value in tags.items()}
        return client.create_run(experiment_id, tags=tags, run_name=about.name[:_LONGEST_NAME])

    def _experiment_id(self, client: MlflowClient) -> str:
        name = self._description.experiment
        if experiment := client.get_experiment_by_name(name):
            if experiment.lifecycle_stage == LifecycleStage.DELETED:
                raise UserError(
                    f"the experiment {name!r} was deleted; restore it with mlflow experiments restore "
                    f"--experiment-id {experiment.experiment_id}, or set another tracking.experiment"
                )
            return str(experiment.experiment_id)
        # A server decides where artifacts go. With a SQLite file, MLflow would write them to the working directory.
        path = sqlite_path(self._uri)
        location = None if path is None else (path.parent / "mlartifacts").resolve().as_uri()
        # This tag selects MLflow's pages for training instead of those for language models.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException:
            if experiment := client.get_experiment_by_name(name):  # another process was faster
                return str(experiment.experiment_id)
            raise

    def _send_records(self, client: MlflowClient) -> None:
        metrics: list[Metric] = []
        reached: int | None = None
        for event, end in self._spool.undelivered("records"):
            if isinstance(event, MetricsEvent):
                metrics += [Metric(n, v, event.time, event.step) for n, v in event.values.items()]
                reached = end
                if len(metrics) < _METRICS_PER_REQUEST:
                    continue
            self._send_metrics(client, metrics)
            metrics, reached = [], None
            self._unless_refused(lambda event=event: self._send_record(client, event))  # type: ignore[misc]
            self._spool.mark_delivered("records", event, end)
        if reached is not None:
            self._send_metrics(client, metrics)
            self._spool.mark_delivered("records", None, reached)

    def _send_metrics(self, client: MlflowClient, metrics: list[Metric]) -> None:
        self._in_batches(metrics, _METRICS_PER_REQUEST, lambda part: client.log_batch(self.run_id, metrics=part))

    def _in_batches(self, records: list[_RecordT], size: int, send: Callable[[list[_RecordT]], object]) -> None:
        """Send records in batches. If MLflow refuses a batch, split it, so that only refused records are skipped."""
        for part in [records[i : i + size] for i in range(0, len(records), size)]:
            try:
                send(part)
            except MlflowException as error:
                if len(part) == 1 or error.error_code != _REFUSED:
                    self._skip_if_refused(error)
                else:
                    self._in_batches(part, (len(part) + 1) // 2, send)

    def _unless_refused(self, send: Callable[[], object]) -> None:
        try:
            send()
        except MlflowException as error:
            self._skip_if_refused(error)

    def _skip_if_refused(self, error: MlflowException) -> None:
        """Log and skip a record that MLflow refuses, because it would block all later ones. Raise other errors."""
        if error.error_code != _REFUSED:
            raise error
        logger.warning(
            "skipping a record of run %s that MLflow refuses: %s", self._description.name, redact(str(error))
        )

    def _send_record(self, client: MlflowClient, event: Event | None) -> None:
        if isinstance(event, TagEvent):
            client.set_tag(self.run_id, event.name, event.value[:_LONGEST_TAG])
        elif isinstance(event, StatusEvent) and event.status == "RUNNING":
            client.update_run(self.run_id, status="RUNNING")
        elif isinstance(event, StatusEvent):
            client.set_terminated(self.run_id, event.status, event.time)

    def _send_files(self, client: MlflowClient) -> None:
        for event, end in self._spool.undelivered("files"):
            self._unless_refused(lambda event=event: self._send_file(client, event))  # type: ignore[misc]
            self._spool.mark_delivered("files", event, end)
            self._answered.add("files")

    def _send_file(self, client: MlflowClient, event: Event | None) -> None:
        if not isinstance(event, FileEvent | ModelEvent):
            return
        path = self._spool.content_of(event)
        if path is None:
            logger.warning(
                "skipping %s/%s, which was deleted before it was sent to MLflow, or lies behind a link",
                self._spool.folder,
                event.path,
            )
        elif isinstance(event, FileEvent):
            client.log_artifact(self.run_id, path.as_posix(), event.folder)
        else:
            log_model(self._uri, self.run_id, path)


def mlflow_names(values: Mapping[str, str]) -> dict[str, str]:
    """Values under names that MLflow takes.

    A name that it refuses, such as one with an address in it, is shortened, its other characters become '_', and the
    start of its digest keeps it apart from similar names.
    """
    return {_mlflow_name(name): value for name, value in values.items()}


def _mlflow_name(name: str) -> str:
    allowed = re.sub(r"[^\w./ -]", "_", name)
    allowed = posixpath.normpath(allowed).lstrip("/")
    if allowed == name and len(name) <= _LONGEST_NAME and not name.startswith(".."):
        return name
    return f"{allowed.strip('.')[: _LONGEST_NAME - 9]}-{sha256(name.encode()).hexdigest()[:8]}"


def _short(dataset: Dataset) -> Dataset:
    fields = ("name", "digest", "source_type", "source", "schema", "profile")
    values = {field: getattr(dataset, field) for field in fields}
    return Dataset(**values | {"name": dataset.name[-_LONGEST_DATASET_NAME:]})


def _is_permanent(error: Exception) -> bool:
    return isinstance(error, UserError) or getattr(error, "error_code", None) in _PERMANENT
