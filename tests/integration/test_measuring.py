"""Checkpoints are measured beside training: one at a time, the newest first, and a failure is only a note."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import ray

from crate_ray.training.ray.mailbox import Mailbox
from crate_ray.training.ray.measuring import Measurements
from tests.jobs import RayCluster

pytestmark = pytest.mark.ray


def measure(config: dict[str, float], step: int) -> dict[str, float]:
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3:
        raise ValueError("no such\ndata")
    time.sleep(config["seconds"])
    return {"accuracy": step / 10}


def test_a_failed_measurement_is_a_note_and_a_late_one_gives_way(driver_here: RayCluster) -> None:
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    measurements = Measurements(measure, {"seconds": 0.3}, every=None, total_steps=9, mailbox=mailbox)

    def events(*steps: int) -> list[tuple[Any, ...]]:
        for step in steps:
            measurements.committed(step)
        while not measurements.wait(5.0):
            pass
        return [event[:3] for event in ray.get(mailbox.drain.remote())]

    try:
        assert events(1) == [("metrics", 1, {"accuracy": 0.1})]
        ((kind, step, text),) = events(2)  # its process is killed, and another one starts
        assert (kind, step) == ("note", 2) and "the features of step 2 were not measured: " in text and "\n" not in text
        assert events(3) == [("note", 3, "the features of step 3 were not measured: ValueError: no such data")]
        assert events(4) == [("metrics", 4, {"accuracy": 0.4})]
        assert events(5, 6, 7) == [("metrics", 5, {"accuracy": 0.5}), ("metrics", 7, {"accuracy": 0.7})]
    finally:
        measurements.end()
    every = Measurements(measure, {"seconds": 0.0}, every=4, total_steps=9, mailbox=mailbox)
    try:
        for step in (1, 4, 6, 8, 9):  # the last step is always measured
            every.committed(step)
            while not every.wait(5.0):
                pass
        assert [event[1] for event in ray.get(mailbox.drain.remote())] == [4, 8, 9]
    finally:
        every.end()
