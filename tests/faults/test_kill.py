"""If a worker or the driver is killed, the run ends with bitwise the weights of an undisturbed run. Steps before a
committed checkpoint are not repeated."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from crate_ray.runs import metrics
from tests.faults.phases import PHASES, kill_in
from tests.faults.runs import EVERY, STEPS, Undisturbed, pretrain, run_in
from tests.jobs import RayCluster, end, final_weights, finish, newest_commit, start, wait_for_commit

pytestmark = pytest.mark.ray


def mlflow_run(digits: str, run_key: str) -> tuple[MlflowClient, Run]:
    """The only MLflow run of a key, in the database beside the data."""
    client = MlflowClient(f"sqlite:///{Path(digits).parent}/mlflow.db")
    (run,) = client.search_runs(["1"], f"tags.`crate_ray.run_key` = '{run_key}'")
    return client, run


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "phases", [("upload",), pytest.param(PHASES, marks=pytest.mark.daily)], ids=["upload", "every-phase"]
)
def test_workers_killed(
    phases: tuple[str, ...], digits: str, cluster: RayCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run, chance = run_in(tmp_path), random.Random(1)
    kills: list[tuple[float, int]] = []
    job = start(pretrain(digits, tracking__log_every=1, scaling__max_failures=len(phases)), tmp_path, cluster)
    try:
        wait_for_commit(run, EVERY, job)
        for phase in phases:
            assert kill_in(phase, job, chance, timeout=90), f"{phase} was not reached:\n{job.log[-3000:]}"
            kills.append((1000 * time.time(), newest_commit(run)))
        finish(job)
    finally:
        end(job)
    assert final_weights(run) == undisturbed.weights(2)
    assert newest_commit(run) == STEPS
    client, record = mlflow_run(digits, json.loads(run.read("run.json"))["run_key"])
    points = client.get_metric_history(record.info.run_id, metrics.LOSS)
    assert {point.step for point in points} == set(range(1, STEPS + 1))
    for (killed, committed), (later, _) in zip(kills, [*kills[1:], (float("inf"), 0)], strict=True):
        assert min((point.step for point in points if killed < point.timestamp < later), default=STEPS) > committed


@pytest.mark.daily  # on each CI run, test_stop.py resumes a run, and test_lease.py takes over from a killed process
def test_driver_killed(digits: str, cluster: RayCluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    command = pretrain(digits, 1, tracking__log_every=1)
    job = start(command, tmp_path, cluster)
    wait_for_commit(run, 2 * EVERY, job)
    time.sleep(random.Random(2).uniform(0, 0.3))
    job.send_signal(signal.SIGSTOP)  # it receives nothing more from its worker
    time.sleep(3)
    job.send_signal(signal.SIGKILL)
    assert job.wait(30) == -signal.SIGKILL
    assert not run.exists("model/model.safetensors")
    assert not cluster.held(), "the resources of its worker are free again"
    finish(start(command, tmp_path, cluster))
    assert final_weights(run) == undisturbed.weights(1)
    # It resumed from a checkpoint: the second attempt has none of the first steps.
    second = sorted(info.key for info in run.list("attempt-002/step-"))
    assert int(second[0].split("-")[2]) > EVERY
    # In MLflow it is one run, and no step is missing.
    client, record = mlflow_run(digits, json.loads(run.read("run.json"))["run_key"])
    assert record.info.status == "FINISHED"
    points = client.get_metric_history(record.info.run_id, metrics.LOSS)
    assert {point.step for point in points} == set(range(1, STEPS + 1))
