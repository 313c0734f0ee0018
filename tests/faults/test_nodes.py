"""A run whose node is about to be taken away saves a checkpoint in time and continues on another node. A run also
recovers when a node dies without notice, and when workers die before they train."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil
import pytest

from crate_ray.storage.interface import Storage
from tests.faults.phases import SET_UP, kill_in
from tests.faults.runs import EVERY, STEPS, Undisturbed, pretrain, run_in
from tests.jobs import (
    Job,
    end,
    final_weights,
    finish,
    kill_node,
    newest_commit,
    running_ray,
    start,
    wait_for_commit,
    wait_for_workers,
)

pytestmark = pytest.mark.ray


def node_of(workers: list[psutil.Process]) -> psutil.Process:
    """Raylet of the node on which all workers are."""
    (raylet,) = {worker.parent() for worker in workers}
    assert raylet
    return raylet


@pytest.mark.daily
@pytest.mark.timeout(900)
def test_an_announced_preemption_a_failed_start_and_a_dead_node(
    digits: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run = run_in(tmp_path)
    with running_ray(0) as cluster:  # the head has room for the driver only
        for _ in range(2):
            cluster.add_node(2)
        # A preemption does not count as a failure.
        job = start(pretrain(digits, scaling__preemption_seconds=0.1, scaling__max_failures=1), tmp_path, cluster)
        try:
            workers = wait_for_workers(job, 2)
            first = node_of(workers)
            wait_for_commit(run, EVERY, job)
            # The notice comes during a long step: a checkpoint is saved before the next step.
            for worker in workers:
                worker.suspend()
            cluster.announce_loss(first, seconds=60)
            time.sleep(1)
            before = newest_commit(run)
            for worker in workers:
                worker.resume()
            rescued = wait_for_rescue(run, before, job)
            kill_node(first)
            # A failed start must not leave anything behind: there is no room for it now.
            assert kill_in(SET_UP, job, random.Random(4))
            second = node_of(wait_for_workers(job, 2))
            assert second != first
            wait_for_commit(run, rescued + 1, job)
            cluster.add_node(2)
            time.sleep(random.Random(3).uniform(0, 0.2))
            kill_node(second)
            finish(job)
        finally:
            end(job)
    assert final_weights(run) == undisturbed.weights(2)
    assert newest_commit(run) == STEPS


def wait_for_rescue(run: Storage, after: int, job: Job) -> int:
    """Step of the first checkpoint outside the regular ones from a step on."""
    deadline = time.monotonic() + 30
    while True:
        steps = [int(info.key.split("-")[1]) for info in run.list("commits/step-")]
        if rescued := [step for step in steps if step >= after and step % EVERY]:
            return rescued[0]
        assert job.returncode is None and time.monotonic() < deadline, f"only {steps}:\n{job.log[-3000:]}"
        time.sleep(0.02)
