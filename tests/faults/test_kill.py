"""A run that is killed, a worker or the whole driver, ends with bitwise the weights of one that is not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import EVERY, STEPS, pretrain
from tests.jobs import end, final_weights, finish, start, wait_for_commit, workers


@pytest.mark.parametrize("seed", [1])
def test_worker_killed(seed: int, digits: str, undisturbed: str, tmp_path: Path) -> None:
    process = start(pretrain(digits), tmp_path)
    try:
        run = tmp_path / "runs" / "run"
        wait_for_commit(run, EVERY, process)
        time.sleep(random.Random(seed).uniform(0, 0.3))
        os.kill(random.Random(seed).choice(workers(process)).pid, signal.SIGKILL)
        finish(process, tmp_path)
    finally:
        if process.poll() is None:
            end(process)
    assert final_weights(run) == undisturbed
    steps = [int(path.name.split("-")[1]) for path in run.glob("commits/step-*.json")]
    assert max(steps) == STEPS


@pytest.mark.parametrize("seed", [2])
def test_driver_killed(seed: int, digits: str, undisturbed: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    process = start(pretrain(digits), tmp_path)
    wait_for_commit(run, 2 * EVERY, process)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not (run / "model").exists()
    finish(start(pretrain(digits), tmp_path), tmp_path)
    assert final_weights(run) == undisturbed
    # It went on from a checkpoint: the second attempt has none of the first steps.
    second = sorted(path.name for path in run.glob("attempt-002/step-*"))
    assert int(second[0].split("-")[1]) > EVERY
    record = json.loads((run / "run.json").read_text())
    # And in MLflow it is one run.
    import mlflow

    runs = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    assert [r.data.tags["crate_ray.run_key"] for r in runs] == [record["run_key"]]
    assert runs[0].info.status == "FINISHED"
