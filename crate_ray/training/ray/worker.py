"""What every Ray Train worker does around its training loop: local folders, signs of life, telling errors and
measurements."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from crate_ray.config import ScalingConfig
from crate_ray.errors import UserError
from crate_ray.storage.node_folders import process_folder
from crate_ray.training.control import WorkerControl, beat_seconds
from crate_ray.training.guard import Judgement

_RECORDED_SECONDS = 10.0  # a driver that is held up longer holds up no checkpoint
_LOOK_SECONDS = 0.1


def run_worker(payload: dict[str, Any], train: Callable[[dict[str, Any], WorkerControl, Path, Path], None]) -> None:
    """Run a training loop, seen by the driver, with temporary folders on the node's disk: this worker's, and that of
    the first one on its node. Errors that the user can mend are told to the driver at once."""
    mailbox, scaling = payload["mailbox"], ScalingConfig.model_validate(payload["config"]["scaling"])
    try:
        context = ray.train.get_context()
        start = broadcast_from_rank_zero(uuid.uuid4().hex[:12])
        names = [f"{start}-{context.get_node_rank()}-{local_rank}" for local_rank in (context.get_local_rank(), 0)]
        control = WorkerControl(
            start,
            context.get_world_rank(),
            context.get_world_size(),
            show=lambda sign: mailbox.put.remote(("alive", sign.step, sign)),
            asked_to_stop=lambda: ray.get(mailbox.is_stopping.remote()),
            beat_seconds=beat_seconds(scaling.hang_seconds),
            look_seconds=scaling.preemption_seconds,
        )
        with process_folder(names[0]) as own, control:
            train(payload, control, own, own.with_name(names[1]))
    except UserError as error:
        ray.get(mailbox.put.remote(("error", 0, str(error))))
        raise


class Reporter:
    """Sends what a rank has to tell to the driver, without waiting for it: unusable samples any rank, all else rank 0.

    Args:
        mailbox: the driver's.
        rank: of this worker.
    """

    def __init__(self, mailbox: Any, rank: int) -> None:
        self._mailbox, self._rank, self._last = mailbox, rank, None

    def flush(self) -> None:
        """Wait until the driver's mailbox has everything that this rank sent."""
        if self._last is not None:
            ray.get(self._last)

    def wait_until_recorded(self) -> None:
        """Wait until the driver has handled what its mailbox has of all ranks, so that it outlives the driver; some
        seconds at the most."""
        number, deadline = ray.get(self._mailbox.arrived.remote()), time.monotonic() + _RECORDED_SECONDS
        while ray.get(self._mailbox.handled.remote()) < number and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Send measured values."""
        self._send("metrics", step, values, int(time.time() * 1000))

    def checkpoint(self, step: int, seconds: float) -> None:
        """Send, from rank 0's thread that uploads, how long that took, and wait until it has arrived."""
        values = {"checkpoint_background_seconds": seconds}
        ray.get(self._mailbox.put.remote(("metrics", step, values, int(time.time() * 1000))))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Send a picture."""
        self._send("picture", step, name, png)

    def note(self, step: int, text: str) -> None:
        """Send a sentence for people."""
        self._send("note", step, text)

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Send keys of samples that this rank cannot use, and why."""
        self._last = self._mailbox.put.remote(("bad_samples", step, causes, split))

    def _send(self, *event: Any) -> None:
        if self._rank == 0:
            self._last = self._mailbox.put.remote(event)


def judged(judgement: Judgement) -> dict[str, float]:
    """Metrics of the steps since the last log step; loss and norm are left out where no step was finite."""
    values = {"skipped_steps": float(len(judgement.skipped)), "loss_spikes": float(len(judgement.spikes))}
    if judgement.loss is not None and judgement.gradient_norm is not None:
        values |= {"loss": judgement.loss, "gradient_norm": judgement.gradient_norm}
    return values


def notes(judgement: Judgement) -> Iterator[str]:
    """Sentences on steps that were skipped and on losses that jumped."""
    if judgement.skipped:
        steps = ", ".join(map(str, judgement.skipped))
        yield f"skipped for a loss or gradient that is not finite: step {steps}"
    for step, usual in judgement.spikes.items():
        yield f"the loss jumped at step {step}, from about {usual:.4g}"
