"""Runs that are asked to stop, started twice, or hang."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import torch
from mlflow import MlflowClient

from crate_ray.tracking.runs import find_run
from crate_ray.training.step import autocast_dtype
from tests.faults.runs import EVERY, STEPS, Undisturbed, pretrain, run_in
from tests.jobs import RayCluster, end, final_weights, finish, free_port, newest_commit, start, wait_for_commit


def test_a_stopped_run_saves_a_checkpoint_and_goes_on(
    digits: str, cluster: RayCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """With an MLflow server that is away for ever, which neither stops it nor is told to be the cause. And it does not
    go on in another precision."""
    run, reached = run_in(tmp_path), 0
    command = pretrain(digits, tracking__uri=f"http://127.0.0.1:{free_port()}", tracking__deliver_seconds=1)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        job = start(command, tmp_path, cluster)
        try:
            wait_for_commit(run, reached + 1, job)
            began = newest_commit(run)
            job.send_signal(number)
            assert job.wait(60) == code, job.log[-3000:]
        finally:
            end(job)
        assert reached < began <= newest_commit(run) < STEPS
        reached = newest_commit(run)
        assert not run.exists("driver.lease")  # nobody has to wait for it
    native = autocast_dtype("auto", torch.device("cpu"))
    other = start([*command, "--training.precision", "bf16" if native is None else "fp32"], tmp_path, cluster)
    assert other.wait(120) == 2 and f"the checkpoint of step {reached} comes from eager layers in" in other.log
    last = start(command, tmp_path, cluster)
    finish(last)
    assert final_weights(run) == undisturbed.weights(2)
    spool = tmp_path / "cache" / "crate-ray" / json.loads(run.read("run.json"))["run_key"]
    assert last.log.count(f"the rest waits in {spool}") == 4
    assert f'"step": {STEPS}' in (spool / "events.jsonl").read_text()


def test_a_run_whose_workers_cannot_start_stops_when_asked(digits: str, cluster: RayCluster, tmp_path: Path) -> None:
    job = start(pretrain(digits, scaling__cpus_per_worker=1000), tmp_path, cluster)
    try:
        deadline = time.monotonic() + 60
        while not run_in(tmp_path).exists("run.json"):
            assert job.returncode is None and time.monotonic() < deadline, job.log[-3000:]
            time.sleep(0.05)
        time.sleep(1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 143, job.log[-3000:]
    finally:
        end(job)


def test_a_second_driver_is_refused_and_a_rank_that_hangs_is_named(
    digits: str, cluster: RayCluster, tmp_path: Path
) -> None:
    """Both share the user's cache, and in it the spool of what MLflow is still to be told."""
    command = pretrain(digits, training__steps=100_000, tracking__log_every=1, scaling__hang_seconds=10)
    first, second = start(command, tmp_path, cluster), None
    try:
        run = run_in(tmp_path)
        wait_for_commit(run, EVERY, first)
        second = start(command, tmp_path, cluster)
        assert second.wait(120) == 2
        assert f"run 'run' is in use by process {first.pid} on" in second.log
        wait_for_commit(run, newest_commit(run) + 2 * EVERY, first)  # it goes on, whatever it writes into the spool
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
    assert "error: no step was made for 10 s: rank" in first.log and "gives no sign of life" in first.log
    assert client.get_run(run_id).info.status == "FAILED"
