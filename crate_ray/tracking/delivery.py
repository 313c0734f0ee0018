"""A thread that delivers a run's spool to MLflow, and retries while the server is unavailable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException

from crate_ray.addresses import Address, redact
from crate_ray.runs.mlflow_lookup import RUN_KEY_TAG, find_run, login, sqlite_path
from crate_ray.tracking.flavor import log_model
from crate_ray.tracking.spool import Event, FileEvent, MetricsEvent, Spool, StatusEvent

logger = logging.getLogger(__name__)

_PARENT_TAG = "mlflow.parentRunId"
_DESCRIBED_TAG = "crate_ray.described"  # set once parameters and lineage are complete
_RETRY_SECONDS = 5.0
_METRICS_PER_REQUEST = 500  # MLflow takes at most 1000
_PARAMS_PER_REQUEST = 100
_LONGEST_PARAM = 6000  # characters, MLflow's limit
_REFUSED = "INVALID_PARAMETER_VALUE"


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
    """Delivers events in their order, in a thread that starts at once.

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
        self.problem: Exception | None = None
        """Why the last attempt failed."""
        self._wake, self._stop, self._give_up = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Deliver new events now."""
        self._wake.set()

    def finish(self, seconds: float) -> None:
        """Wait at most `seconds` until all events are delivered, then end the thread."""
        self._stop.set()
        self._wake.set()
        self._thread.join(seconds)
        self._give_up.set()

    def abandon(self) -> None:
        """End the thread after its current attempt."""
        self._give_up.set()
        self._stop.set()
        self._wake.set()

    def _run(self) -> None:
        client = None
        while True:
            self._wake.wait(_RETRY_SECONDS)
            self._wake.clear()
            try:
                client = client or self._connect()
                self._send_all(client)
                self.problem = None
            except Exception as error:  # the client raises many types if the server is unavailable or fails
                if self.problem is None:
                    cause = redact(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    logger.warning("MLflow at %s: %s; records wait on disk", self._uri, cause)
                self.problem = error
            if self._stop.is_set() and (self._give_up.is_set() or self._spool.is_delivered):
                return

    def _connect(self) -> MlflowClient:
        """Find or create the run, and complete its description."""
        client, about = MlflowClient(login(self._uri)), self._description
        experiment_id = self._experiment_id(client)
        found = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{about.key}'", max_results=1)
        run = found[0] if found else self._create_run(client, experiment_id)
        if _DESCRIBED_TAG not in run.data.tags:
            known = run.data.params  # from an earlier, interrupted attempt
            params = [Param(name, value[:_LONGEST_PARAM]) for name, value in about.params.items() if name not in known]
            for i in range(0, len(params), _PARAMS_PER_REQUEST):
                client.log_batch(run.info.run_id, params=params[i : i + _PARAMS_PER_REQUEST])
            if about.datasets:
                context = [InputTag("mlflow.data.context", "training")]
                client.log_inputs(run.info.run_id, [DatasetInput(dataset, context) for dataset in about.datasets])
            client.set_tag(run.info.run_id, _DESCRIBED_TAG, "true")
        self.run_id = run.info.run_id
        return client

    def _create_run(self, client: MlflowClient, experiment_id: str) -> Run:
        about = self._description
        tags = {**about.tags, RUN_KEY_TAG: about.key}
        if about.parent_key and (parent := find_run(client, about.parent_key)):
            tags = {_PARENT_TAG: parent} | tags
        return client.create_run(experiment_id, tags=tags, run_name=about.name)

    def _experiment_id(self, client: MlflowClient) -> str:
        name = self._description.experiment
        if experiment := client.get_experiment_by_name(name):
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

    def _send_all(self, client: MlflowClient) -> None:
        metrics: list[Metric] = []
        for event, end in self._spool.undelivered():
            if isinstance(event, MetricsEvent):
                metrics += [Metric(n, v, event.time, event.step) for n, v in event.values.items()]
                if len(metrics) < _METRICS_PER_REQUEST and end < self._spool.size:
                    continue
            self._send_metrics(client, metrics)
            metrics = []
            try:
                self._send(client, event)
            except MlflowException as error:
                self._skip_if_refused(error)
            self._spool.mark_delivered(event, end)

    def _send_metrics(self, client: MlflowClient, metrics: list[Metric]) -> None:
        """Send metrics in batches. If MLflow refuses a batch, split it, so that only refused metrics are skipped."""
        size = _METRICS_PER_REQUEST
        for part in [metrics[i : i + size] for i in range(0, len(metrics), size)]:
            try:
                client.log_batch(self.run_id, metrics=part)
            except MlflowException as error:
                if len(part) == 1 or error.error_code != _REFUSED:
                    self._skip_if_refused(error)
                else:
                    self._send_metrics(client, part[: len(part) // 2])
                    self._send_metrics(client, part[len(part) // 2 :])

    def _skip_if_refused(self, error: MlflowException) -> None:
        """Log and skip a record that MLflow refuses, because it would block all later ones. Raise other errors."""
        if error.error_code != _REFUSED:
            raise error
        logger.warning(
            "skipping a record of run %s that MLflow refuses: %s", self._description.name, redact(str(error))
        )

    def _send(self, client: MlflowClient, event: Event) -> None:
        if isinstance(event, StatusEvent):
            if event.status == "RUNNING":
                client.update_run(self.run_id, status="RUNNING")
            else:
                client.set_terminated(self.run_id, event.status, event.time)
            return
        if isinstance(event, MetricsEvent):
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
