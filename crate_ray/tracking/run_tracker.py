"""Tracks a training run in MLflow. Everything is written to a spool on disk, and a thread delivers it.

A slow or unavailable server does not slow down training. Undelivered records stay in the spool until the next start of
the run delivers them. A full disk does not stop training: records that cannot be written are lost, with a warning.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset

from crate_ray.addresses import redact
from crate_ray.config import TrackingConfig
from crate_ray.errors import UserError
from crate_ray.runs.listener import Listener
from crate_ray.runs.mlflow_lookup import sqlite_path, tracking_uri
from crate_ray.storage.node_folders import check_kept
from crate_ray.tracking.delivery import Delivery, RunDescription
from crate_ray.tracking.flavor import MODEL_NAME
from crate_ray.tracking.spool import Spool

logger = logging.getLogger(__name__)


class RunTracker(Listener):
    """One run in MLflow, recorded from the driver.

    Args:
        tracking: MLflow's settings.
        key: permanent key of the run, independent of its name.
        name: name of a new run.
        params: parameters of a new run.
        tags: tags of a new run.
        datasets: training data, for MLflow's lineage (name, digest, source, profile).
        parent_key: key of the run whose model this run started from. If MLflow has it, it shows this run as its child.

    Raises:
        UserError: the spool's folder cannot be created, or belongs to another user.
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
        self._uri, self._deliver_seconds = tracking_uri(tracking), tracking.deliver_seconds
        if path := sqlite_path(self._uri):
            check_kept(str(path.absolute()), "tracking.uri")
        self.is_complete = False
        """Set once the run has produced all of its results."""
        self._spool = Spool(key)
        self._spool.add("status", status="RUNNING")
        description = RunDescription(tracking.experiment, key, name, params, tags, datasets, parent_key)
        self._delivery = Delivery(self._spool, self._uri, description)

    def check(self, *, is_new: bool) -> None:
        """Wait until MLflow has taken a record and a file of this run. Record a file first.

        A run that has begun before goes on without MLflow, with a warning, unless the settings are wrong.

        Raises:
            UserError: MLflow cannot record the run. Nothing of a new run is left behind.
        """
        found = self._delivery.first_problem()
        if found is None:
            return
        lane, problem = found
        cause = redact(" ".join(str(problem).split()))[:300] or type(problem).__name__
        if isinstance(problem, UserError):
            sentence = f"MLflow at {self._uri} cannot record this run: {cause}"
        elif lane == "files":
            sentence = (
                f"MLflow at {self._uri} takes metrics, but no artifacts ({cause}); let this machine write to the "
                "artifact root of its experiment, start the server with --serve-artifacts, or set another "
                "tracking.experiment"
            )
        else:
            sentence = f"MLflow at {self._uri} cannot record this run ({cause}); check tracking.uri and that it is up"
        if not is_new and not isinstance(problem, UserError):
            logger.warning("%s; the run goes on, and its records wait in %s", sentence, self._spool.folder)
            return
        if self._spool.is_new and lane == "files":
            self.finish("FAILED", timeout=5.0)  # the run exists in MLflow
        else:
            self.abandon()
        if self._spool.is_new:
            self._spool.remove()
        raise UserError(sentence)

    def tag(self, name: str, value: str) -> None:
        """Record a tag."""
        self._add("tag", name=name, value=redact(value))

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Record values measured after `step` steps, at a time in milliseconds since 1970."""
        self._add("metrics", step=step, values=values, time=time_ms)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Record a picture as the artifact <name>/step-<step>.png."""
        self._add_file(name, f"step-{step:08d}.png", png)

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Record keys and causes of unusable samples as an artifact bad_samples/<split>/step-<step>-<id>.json."""
        name = f"step-{step:08d}-{uuid.uuid4().hex[:8]}.json"
        self._add_file(f"bad_samples/{split}", name, json.dumps(causes, indent=1).encode())

    def note(self, step: int, text: str) -> None:
        """Record a sentence about an event as an artifact notes/step-<step>-<id>.txt."""
        self._add_file("notes", f"step-{step:08d}-{uuid.uuid4().hex[:8]}.txt", f"{text}\n".encode())

    def text(self, name: str, content: str, folder: str | None = None) -> None:
        """Record a text file as an artifact."""
        self._add_file(folder, name, content.encode())

    def file(self, path: str, content: bytes) -> None:
        """Record a file as the artifact <path>. It replaces an earlier one."""
        folder, _, name = path.rpartition("/")
        self._add_file(folder or None, name, content)

    def model(self, exported: Path) -> None:
        """Record an exported model (see models.exported) as an MLflow model, and its files as artifacts.

        Raises:
            OSError: the disk is full. This is an error, because a run is not complete without its model.
        """
        if not self._spool.add_model(exported, MODEL_NAME):
            assert self._spool.error is not None
            raise self._spool.error
        self._delivery.wake()

    def finish(self, status: str, timeout: float | None = None) -> bool:
        """Set the run's status and wait until everything is delivered.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout: seconds to wait; by default tracking.deliver_seconds.

        Returns:
            Whether all records were delivered. If not, the rest stays in the spool; `undelivered` says where and why.
        """
        added = self._add("status", status=status, time=int(time.time() * 1000))
        self._delivery.finish(self._deliver_seconds if timeout is None else timeout)
        if not added or not self._spool.is_delivered:
            return False
        self._spool.remove()
        return True

    def abandon(self) -> None:
        """Stop recording. Call it when another driver has taken over the run, which then also uses its spool."""
        self._delivery.abandon()

    def wait_for_run(self, timeout: float = 15.0) -> str:
        """Return the run's id as soon as MLflow has answered; empty if that takes more than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.run_id and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.run_id

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until the server has answered."""
        return self._delivery.run_id

    @property
    def where(self) -> str:
        """The run's id and MLflow's address."""
        return f"{self.run_id or 'not created yet'} at {self._uri}"

    @property
    def undelivered(self) -> str:
        """A sentence that says where the undelivered records are, and why."""
        problem = self._delivery.problem or self._spool.error
        cause = redact(" ".join(str(problem).split()))[:200] if problem else "the server is slow"
        return (
            f"MLflow at {self._uri} does not have everything ({cause}); the rest is in {self._spool.folder}, "
            "and the same command delivers it when it is started again"
        )

    def _add(self, kind: str, **values: Any) -> bool:
        added = self._spool.add(kind, **values)
        self._delivery.wake()
        return added

    def _add_file(self, folder: str | None, name: str, content: bytes) -> None:
        self._spool.add_file(folder, name, content)
        self._delivery.wake()


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, text values without passwords."""
    out: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = redact(str(value))
    return out
