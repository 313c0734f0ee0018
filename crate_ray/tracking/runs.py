"""A training run in MLflow: everything is written to a spool on disk, and a thread of our own delivers it.

A slow or absent server never slows training: what was not delivered stays in the spool and is delivered by the next
start of the run. Deliveries carry their own time, so that repeating one changes nothing. A spool without room never
stops training either: what cannot be written is lost, and a warning says so.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException

from crate_ray.config import TrackingConfig
from crate_ray.runs.listener import Listener
from crate_ray.runs.mlflow_lookup import RUN_KEY_TAG, find_run, redact, tracking_uri
from crate_ray.tracking.flavor import log_model

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
_DESCRIBED_TAG = "crate_ray.described"  # set once parameters and lineage are complete
_RETRY_SECONDS = 5.0
MODEL_FOLDER = "model"
_BATCH = 500


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, text values."""
    out: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = redact(str(value))
    return out


def spool_folder(key: str) -> Path:
    """Where a run's undelivered records are kept, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crate-ray" / key


class RunTracker(Listener):
    """One run in MLflow, fed from the driver. `run_id` is empty until the server was reached.

    Parameters: tracking settings; `key`, which identifies the run for ever, whatever it is called; its name; parameters
    and tags of a new run; what its training data is, as MLflow's dataset lineage (name, digest, source, profile); and
    the key of the run whose model it began with, under which MLflow shows it where it knows that one.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        key: str,
        name: str,
        params: dict[str, str],
        tags: dict[str, str],
        datasets: Sequence[Dataset] = (),
        parent_key: str | None = None,
    ) -> None:
        self._uri, self._experiment, self._key, self._name = tracking_uri(tracking), tracking.experiment, key, name
        self._deliver_seconds = tracking.deliver_seconds
        self._params, self._tags, self._datasets, self._parent_key = params, tags, datasets, parent_key
        self.run_id = ""
        self.is_complete = False
        """Set once the run has left all that it was started for."""
        self._folder = spool_folder(key)
        (self._folder / "files").mkdir(parents=True, exist_ok=True)
        self._events, self._sent = self._folder / "events.jsonl", self._folder / "sent"
        self._events.touch()
        self._delivered = int(self._sent.read_text()) if self._sent.exists() else 0  # bytes of the events
        self._wake, self._stop, self._give_up = threading.Event(), threading.Event(), threading.Event()
        self._problem: Exception | None = None
        self._lost: OSError | None = None  # why the spool did not take something
        self._sender = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._append({"kind": "status", "status": "RUNNING"})
        self._sender.start()

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Record measured values after so many steps, at a time in milliseconds since 1970."""
        self._append({"kind": "metrics", "step": step, "values": values, "time": time_ms})

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Record a picture as the artifact <name>/step-<step>.png."""
        self._append_file(f"{name}-{step:08d}.png", png, name, f"step-{step:08d}.png")

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Record keys and causes of unusable samples as an artifact bad_samples/<split>/step-<step>-<id>.json."""
        name = f"step-{step:08d}-{uuid.uuid4().hex[:8]}.json"
        self._append_file(f"bad-{name}", json.dumps(causes, indent=1).encode(), f"bad_samples/{split}", name)

    def note(self, step: int, text: str) -> None:
        """Record what happened as an artifact notes/step-<step>-<id>.txt."""
        name = f"step-{step:08d}-{uuid.uuid4().hex[:8]}.txt"
        self._append_file(f"note-{name}", f"{text}\n".encode(), "notes", name)

    def text(self, name: str, content: str) -> None:
        """Record a text file as an artifact."""
        self._append_file(name, content.encode(), None, name)

    def model(self, exported: Path) -> None:
        """Record an exported model (see training.export) as an MLflow model, and its files as artifacts.

        Raises OSError when the spool has no room: the run is not complete without it.
        """
        copy = self._folder / "files" / MODEL_FOLDER
        shutil.copytree(exported, copy, dirs_exist_ok=True)
        self._append({"kind": "model", "path": copy.as_posix()})

    def finish(self, status: str, timeout: float | None = None) -> bool:
        """Set the run's status (FINISHED, FAILED or KILLED) and wait until everything is delivered, or the time is up.

        The timeout is in seconds, by default tracking.deliver_seconds.
        Returns whether all was delivered. What was not stays in the spool; `undelivered` says where and why.
        """
        told = self._append({"kind": "status", "status": status, "time": int(time.time() * 1000)})
        self._stop.set()
        self._wake.set()
        self._sender.join(self._deliver_seconds if timeout is None else timeout)
        self._give_up.set()
        if not told or self._pending():
            return False
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def abandon(self) -> None:
        """Stop here, and leave the run and its spool to another driver that has taken it over."""
        self._give_up.set()
        self._stop.set()
        self._wake.set()

    def wait_for_run(self, timeout: float = 15.0) -> str:
        """The run's id as soon as the server was reached; empty when that takes longer than the timeout (seconds)."""
        deadline = time.monotonic() + timeout
        while not self.run_id and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.run_id

    @property
    def where(self) -> str:
        """The run's id and the address of MLflow."""
        return f"{self.run_id or 'not created yet'} at {redact(self._uri)}"

    @property
    def undelivered(self) -> str:
        """A sentence on where undelivered records are, and why."""
        problem = self._problem or self._lost
        cause = " ".join(str(problem).split())[:200] if problem else "the server is slow"
        return f"MLflow at {redact(self._uri)} did not take everything ({cause}); the rest waits in {self._folder}"

    def _append_file(self, spooled: str, content: bytes, folder: str | None, name: str) -> None:
        """Spool a file for the artifact <folder>/<name>."""
        path = self._folder / "files" / spooled
        self._append({"kind": "file", "path": path.as_posix(), "folder": folder, "name": name}, content)

    def _append(self, event: dict[str, Any], content: bytes | None = None) -> bool:
        """Spool an event, and first what its file holds; False where the disk does not take it."""
        size = None
        try:
            if content is not None:
                Path(event["path"]).write_bytes(content)
            size = self._events.stat().st_size
            with self._events.open("a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            with suppress(OSError):
                if size is not None:
                    os.truncate(self._events, size)  # half a line would spoil the next one
            if self._lost is None:
                logger.warning(
                    "%s cannot be written (%s): metrics and pictures for MLflow are lost until it can",
                    self._folder,
                    error,
                )
            self._lost = error
            return False
        self._wake.set()
        return True

    def _pending(self) -> bool:
        return self._events.exists() and self._delivered < self._events.stat().st_size

    def _deliver(self) -> None:
        client = None
        while True:
            self._wake.wait(_RETRY_SECONDS)
            self._wake.clear()
            try:
                client = client or self._connect()
                self._send_pending(client)
                self._problem = None
            except Exception as error:  # whatever the client raises for a server that is away or ill
                if self._problem is None:
                    cause = redact(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    logger.warning("MLflow at %s: %s; records wait on disk", redact(self._uri), cause)
                self._problem = error
            if self._stop.is_set() and (self._give_up.is_set() or not self._pending()):
                return

    def _connect(self) -> MlflowClient:
        client = MlflowClient(self._uri)
        experiment = client.get_experiment_by_name(self._experiment)
        try:
            experiment_id = experiment.experiment_id if experiment else self._create_experiment(client)
        except MlflowException:  # somebody else created it in between
            experiment = client.get_experiment_by_name(self._experiment)
            if experiment is None:
                raise
            experiment_id = experiment.experiment_id
        found = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{self._key}'", max_results=1)
        if found and _DESCRIBED_TAG in found[0].data.tags:
            self.run_id = found[0].info.run_id
            return client
        tags = {**self._tags, RUN_KEY_TAG: self._key}
        if self._parent_key and (parent := find_run(client, self._parent_key)):
            tags = {PARENT_TAG: parent} | tags
        run = found[0] if found else client.create_run(experiment_id, tags=tags, run_name=self._name)
        known = run.data.params  # of an attempt that was cut off
        params = [Param(name, value[:6000]) for name, value in self._params.items() if name not in known]
        for i in range(0, len(params), 100):
            client.log_batch(run.info.run_id, params=params[i : i + 100])
        if self._datasets:
            context = [InputTag("mlflow.data.context", "training")]
            client.log_inputs(run.info.run_id, [DatasetInput(dataset, context) for dataset in self._datasets])
        client.set_tag(run.info.run_id, _DESCRIBED_TAG, "true")
        self.run_id = run.info.run_id
        return client

    def _create_experiment(self, client: MlflowClient) -> str:
        # A server knows where artifacts belong; beside a SQLite file they would go to the working directory.
        path = self._uri.removeprefix("sqlite:///")
        location = None if path == self._uri else (Path(path).parent / "mlartifacts").resolve().as_uri()
        # MLflow's pages for training, not those for language models.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self._experiment, artifact_location=location, tags=tags))

    def _send_pending(self, client: MlflowClient) -> None:
        metrics: list[Metric] = []
        for event, end in self._events_after(self._delivered):
            if event["kind"] == "metrics":
                metrics += [Metric(n, v, event["time"], event["step"]) for n, v in event["values"].items()]
                if len(metrics) < _BATCH and end < self._events.stat().st_size:
                    continue
            if metrics:
                client.log_batch(self.run_id, metrics=metrics)
                metrics = []
            try:
                self._send(client, event)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                # Sending it again would block everything behind it.
                logger.warning("MLflow refuses a record of run %s, which is left out: %s", self._name, error)
            self._delivered = end
            with suppress(OSError):  # of a full disk; the next start sends it again
                new = self._sent.with_suffix(".new")
                new.write_text(str(end))
                new.replace(self._sent)

    def _send(self, client: MlflowClient, event: dict[str, Any]) -> None:
        if event["kind"] == "file":
            self._send_file(client, event)
        elif event["kind"] == "model":
            log_model(self._uri, self.run_id, Path(event["path"]))
        elif event["kind"] == "status":
            self._send_status(client, event)

    def _send_status(self, client: MlflowClient, event: dict[str, Any]) -> None:
        if event["status"] == "RUNNING":
            client.update_run(self.run_id, status="RUNNING")
        else:
            client.set_terminated(self.run_id, event["status"], event["time"])

    def _send_file(self, client: MlflowClient, event: dict[str, Any]) -> None:
        path = Path(event["path"])
        if not path.exists():
            return
        named = path.with_name(event["name"])
        path.rename(named)
        try:
            client.log_artifact(self.run_id, named.as_posix(), event["folder"])
        except BaseException:
            named.rename(path)
            raise
        named.unlink()

    def _events_after(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        with self._events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                try:
                    yield json.loads(line), offset
                except ValueError:
                    logger.warning("%s holds a line that was cut off; it is left out", self._events)
