"""A run that is killed, a worker or the whole driver, ends with bitwise the weights of one that is not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from crate_ray.config import PrepareConfig
from crate_ray.data.builtin import digits_source
from crate_ray.data.packing import pack
from crate_ray.data.storage import open_storage
from tests.jobs import end, final_weights, finish, job, start, wait_for_commit, workers

STEPS, EVERY = 60, 12


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", split="test", output=str(tmp_path_factory.mktemp("digits")))
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    return config.output


def pretrain(digits: str, workers: int = 2) -> list[str]:
    """Settings with all that could break equality: augmentation, accumulation, uneven batches, several epochs."""
    settings = {
        "name": "run",
        "storage": "runs",
        "data.train": digits,
        "data.crop_scale": "0.5,1",
        "model.image_size": 8,
        "model.patch_size": 2,
        "model.channels": 1,
        "model.dim": 64,
        "model.depth": 2,
        "model.num_subspaces": 4,
        "training.batch_size": 45,
        "training.micro_batch_size": 10,
        "training.steps": STEPS,
        "optim.lr": 0.003,
        "scaling.workers": workers,
        "scaling.cpus_per_worker": 1,
        "checkpoint.every_steps": EVERY,
        "tracking.uri": "sqlite:///mlflow.db",
        "tracking.picture_every": "null",
    }
    return job("pretrain", *[part for name, value in settings.items() for part in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def undisturbed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(pretrain(digits), folder), folder)
    return final_weights(folder / "runs" / "run")


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
