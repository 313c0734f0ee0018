"""Runs that are stopped, started twice, or hang."""

from __future__ import annotations

import gzip
import json
import signal
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from crate_ray.runs.metrics import SKIPPED_STEPS
from crate_ray.runs.mlflow_lookup import find_run
from crate_ray.storage.interface import Storage
from tests.faults.runs import EVERY, STEPS, Undisturbed, pretrain, run_in
from tests.jobs import RayCluster, end, final_weights, finish, free_port, newest_commit, start, wait_for_commit

pytestmark = pytest.mark.ray


def test_a_stopped_run_saves_a_checkpoint_and_resumes(
    digits: str, cluster: RayCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """With activation checkpointing, and resumed with an MLflow server that never answers, which does not stop it."""
    run = run_in(tmp_path)
    settings = {"training__activation_checkpointing": "true", "training__profile_steps": "4,6"}
    silent = {"tracking__uri": f"http://127.0.0.1:{free_port()}", "tracking__deliver_seconds": 1, **settings}

    first = start(pretrain(digits, **settings), tmp_path, cluster)
    try:
        wait_for_commit(run, 1, first)
        began = newest_commit(run)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143, first.log[-3000:]
    finally:
        end(first)
    good = newest_commit(run)
    assert began <= good < STEPS
    assert not run.exists("driver.lease")  # the next start does not have to wait for it
    assert operators(run, "profile/steps-4-6-rank-0") == {
        # Two per layer and two outside; the backward pass computes the layers' again. 3 steps of 3 micro-batches.
        "aten::native_layer_norm": 9 * (2 * 8 + 2),
        "aten::native_layer_norm_backward": 9 * (8 + 2),
        "aten::_fused_adamw_": 3 * 2,  # with weight decay and without
    }
    last = start(pretrain(digits, **silent), tmp_path, cluster)
    finish(last)
    assert final_weights(run) == undisturbed.weights(2)
    spool = tmp_path / "cache" / "crate-ray" / "spool" / json.loads(run.read("run.json"))["run_key"]
    assert last.log.count(f"the rest is in {spool}") == 1
    events = [json.loads(line) for line in (spool / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "metrics"][-1] == STEPS


@pytest.mark.daily
def test_a_learning_rate_that_ruins_the_weights_stops_the_run_before_a_checkpoint_is_saved(
    digits: str, cluster: RayCluster, tmp_path: Path
) -> None:
    run = run_in(tmp_path)
    absurd = {
        "optim__lr": 1e30, "training__max_skipped_steps": 2, "tracking__log_every": 1, "checkpoint__every_steps": 99,
    }  # fmt: skip
    job = start(pretrain(digits, **absurd), tmp_path, cluster)
    try:
        assert job.wait(120) == 2, job.log[-3000:]
    finally:
        end(job)
    (error,) = [line for line in job.log.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the last 3 steps up to step 4 had a loss or gradient that is not finite")
    assert newest_commit(run) == 0
    client = MlflowClient(f"sqlite:///{Path(digits).parent}/mlflow.db")
    run_id = find_run(client, json.loads(run.read("run.json"))["run_key"])
    assert run_id is not None
    skipped = {point.step: point.value for point in client.get_metric_history(run_id, SKIPPED_STEPS) if point.value}
    assert skipped == {2: 1, 3: 1}


def operators(run: Storage, profile: str) -> dict[str, int]:
    """Number of calls of some operators, from the trace of a profile."""
    assert b"Self CPU" in (table := run.read(f"{profile}.txt")) and b"aten::" in table
    trace = json.loads(gzip.decompress(run.read(f"{profile}.json.gz")))
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    return {name: names.count(name) for name in names if "native_layer_norm" in name or "fused_adamw" in name}


@pytest.mark.daily
def test_a_run_whose_workers_cannot_start_stops_on_request(digits: str, cluster: RayCluster, tmp_path: Path) -> None:
    job = start(pretrain(digits, scaling__cpus_per_worker=1000), tmp_path, cluster)
    try:
        deadline = time.monotonic() + 60
        while not run_in(tmp_path).exists("run.json"):
            assert job.returncode is None and time.monotonic() < deadline, job.log[-3000:]
            time.sleep(0.05)
        time.sleep(1)
        job.send_signal(signal.SIGINT)
        assert job.wait(30) == 130, job.log[-3000:]
    finally:
        end(job)


@pytest.mark.daily  # tests/faults/test_lease.py refuses a second process on each CI run
def test_a_second_driver_is_refused_and_a_rank_that_hangs_is_named(
    digits: str, cluster: RayCluster, tmp_path: Path
) -> None:
    """Both share the user's cache, and in it the spool of records for MLflow."""
    command = pretrain(digits, training__steps=100_000, tracking__log_every=1, scaling__hang_seconds=10)
    first, second = start(command, tmp_path, cluster), None
    try:
        run = run_in(tmp_path)
        wait_for_commit(run, EVERY, first)
        second = start(command, tmp_path, cluster)
        assert second.wait(120) == 2
        assert f"run 'run' is in use by process {first.pid} on" in second.log
        wait_for_commit(run, newest_commit(run) + 2 * EVERY, first)  # the second driver has not disturbed its spool
        client = MlflowClient(f"sqlite:///{Path(digits).parent}/mlflow.db")
        run_id = find_run(client, json.loads(run.read("run.json"))["run_key"])
        assert run_id is not None and client.get_run(run_id).info.status == "RUNNING"
        first.workers()[0].suspend()
        began = time.monotonic()
        assert first.wait(120) == 2
        assert time.monotonic() - began < 90
    finally:
        for job in (first, second):
            if job:
                end(job)
    assert "error: no step was made for 10 s: rank" in first.log and "has sent no heartbeat" in first.log
    assert client.get_run(run_id).info.status == "FAILED"
