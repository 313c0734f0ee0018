"""Sends a worker's reports to the driver's mailbox."""

from __future__ import annotations

import time
from typing import Any

import ray

from crate_ray.runs.metrics import CHECKPOINT_BACKGROUND_SECONDS
from crate_ray.training.heartbeat import Heartbeat
from crate_ray.training.worker import StartFacts

_RECORDED_SECONDS = 10.0  # a checkpoint does not wait longer than this for a slow driver
_POLL_SECONDS = 0.1


class RayReporter:
    """Implements worker.Reporter and checkpoints.SaveEvents.

    Args:
        mailbox: the driver's mailbox.
        rank: rank of this worker.
    """

    def __init__(self, mailbox: Any, rank: int) -> None:
        self._mailbox, self._rank, self._last = mailbox, rank, None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Send metrics."""
        self._send("metrics", step, values, int(time.time() * 1000))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Send a picture."""
        self._send("picture", step, name, png)

    def started(self, step: int, facts: StartFacts) -> None:
        """Send that training starts."""
        self._send("started", step, facts._asdict())

    def first_step(self, step: int, loss: float, seconds: float) -> None:
        """Send loss and duration of a first step."""
        self._send("first_step", step, loss, seconds)

    def note(self, step: int, text: str) -> None:
        """Send a sentence for the user."""
        self._send("note", step, text)

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Send which samples this rank cannot use, and why."""
        self._last = self._mailbox.put.remote(("bad_samples", step, causes, split))

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        """Send a heartbeat of any rank."""
        self._mailbox.put.remote(("heartbeat", heartbeat.step, heartbeat))

    def stop_requested(self) -> bool:
        """Whether the driver has asked the workers to stop."""
        return bool(ray.get(self._mailbox.stop_requested.remote()))

    def flush(self) -> None:
        """Wait until the driver's mailbox has everything that this rank sent."""
        if self._last is not None:
            ray.get(self._last)

    def wait_until_recorded(self) -> None:
        """Wait until the driver has handled the events of all ranks that are in its mailbox now; 10 s at most."""
        number, deadline = ray.get(self._mailbox.num_put.remote()), time.monotonic() + _RECORDED_SECONDS
        while ray.get(self._mailbox.num_handled.remote()) < number and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def checkpoint(self, step: int, seconds: float) -> None:
        """Send how long rank 0's save took in the background, and wait until the message has arrived."""
        values = {CHECKPOINT_BACKGROUND_SECONDS: seconds}
        ray.get(self._mailbox.put.remote(("metrics", step, values, int(time.time() * 1000))))

    def _send(self, *event: Any) -> None:
        if self._rank == 0:
            self._last = self._mailbox.put.remote(event)
