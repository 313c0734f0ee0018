"""Leases on a folder and on a real S3 gateway: one holder at a time; real processes are killed and stopped."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient

from crate_ray.config import CrateMAEConfig, FinetuneConfig, PretrainConfig, S3Config
from crate_ray.errors import UserError
from crate_ray.finetuning.run import open_finetuning
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.runs.planning import driver_lease
from crate_ray.runs.pretraining import open_run, start_from
from crate_ray.storage.interface import AlreadyExists, NotFound, Replaced, Storage, open_storage
from crate_ray.storage.lease import Lease
from crate_ray.tracking.pretraining import track

KEY = "run/driver.lease"
SECONDS = 3.0

HOLDER = """
import sys, time
from crate_ray.config import S3Config
from crate_ray.storage.lease import Lease
from crate_ray.storage.interface import open_storage
from crate_ray.errors import UserError
uri, endpoint, key, seconds = sys.argv[1:]
storage = open_storage(uri, S3Config(endpoint_url=endpoint or None))
with Lease(storage, key, "run 'x'", lease_seconds=float(seconds)) as lease:
    print("held", flush=True)
    while True:
        time.sleep(0.05)
        try:
            lease.check()
        except UserError as error:
            print(error, flush=True)
            break
"""


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path), S3Config())
    gateway = request.getfixturevalue("s3_gateway")
    for name, value in gateway.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"lease-{uuid.uuid4().hex[:12]}"
    session = boto3.session.Session()
    session.client("s3", endpoint_url=gateway.endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
    return open_storage(f"s3://{bucket}/some/prefix", S3Config(endpoint_url=gateway.endpoint))


def holder(storage: Storage) -> subprocess.Popen[str]:
    """Start a process that holds the lease."""
    endpoint = getattr(getattr(storage, "config", None), "endpoint_url", "") or ""
    command = [sys.executable, "-c", HOLDER, storage.uri, endpoint, KEY, str(SECONDS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def lease(storage: Storage, seconds: float = SECONDS) -> Lease:
    return Lease(storage, KEY, "run 'x'", lease_seconds=seconds)


def test_conditional_writes(storage: Storage) -> None:
    with pytest.raises(Replaced):
        storage.write("a", b"0", if_match="0" * 32)
    storage.write("a", b"1", if_absent=True)
    with pytest.raises(AlreadyExists):
        storage.write("a", b"2", if_absent=True)
    first = storage.read_version("a", 0, 9)[1]
    storage.write("a", b"three", if_match=first)
    with pytest.raises(Replaced):
        storage.write("a", b"4", if_match=first)
    data, etag = storage.read_version("a", 0, 9)
    assert data == b"three"
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        try:
            storage.write("a", b"by %d" % number, if_match=etag)
        except Replaced:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert storage.read("a") == b"by %d" % won.index(True)


def test_a_second_process_is_refused_and_takes_over_after_a_kill(storage: Storage) -> None:
    process = holder(storage)
    try:
        for seconds in (SECONDS, SECONDS / 10):  # however long the lease of the second one
            begun = time.monotonic()
            with (
                pytest.raises(UserError, match=rf"run 'x' is in use by process {process.pid} on .*since 20.* UTC"),
                lease(storage, seconds),
            ):
                pass
            assert time.monotonic() - begun < SECONDS * 2
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        begun = time.monotonic()
        with lease(storage) as ours:
            assert SECONDS * 0.9 < time.monotonic() - begun < SECONDS * 2
            ours.check()
        with pytest.raises(NotFound):
            storage.read(KEY)
        begun = time.monotonic()
        with lease(storage):  # it was released, so nobody waits
            assert time.monotonic() - begun < SECONDS
    finally:
        process.kill()


def test_a_process_that_was_stopped_for_too_long_loses_its_lease(storage: Storage) -> None:
    process = holder(storage)
    try:
        process.send_signal(signal.SIGSTOP)
        with lease(storage) as ours:
            process.send_signal(signal.SIGCONT)
            assert process.stdout is not None
            message = process.stdout.readline()
            assert f"run 'x' has been taken over by process {os.getpid()} on " in message
            assert process.wait(10) == 0
            time.sleep(SECONDS / 2)
            ours.check()  # the loser did not delete our lease
            assert b"run 'x'" in storage.read(KEY)
    finally:
        process.kill()


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_a_refused_driver_leaves_the_run_and_its_spool_alone(
    job: str, digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a driver with other settings. Without a checkpoint, these would start the run anew, with another key and
    other weights. Both drivers share the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    encoder = CrateMAEConfig(image_size=8, patch_size=2, channels=1, dim=16, depth=1, num_subspaces=2)
    model = build_model(encoder).eval()
    description = ModelDescription(model=encoder, mean=(0.25,), std=(0.4,), kind="image")
    export_model(tmp_path / "model", model.state_dict(), description)
    values = {
        "name": "run",
        "storage": str(tmp_path / "runs"),
        "data": {"train": digits},
        "training": {"steps": 3, "batch_size": 20},
        "scaling": {"lease_seconds": 3, "cpus_per_worker": 1},
        "tracking": {"uri": f"sqlite:///{Path(digits).parent}/mlflow.db"},
    }
    config: PretrainConfig | FinetuneConfig
    if job == "pretrain":
        config = PretrainConfig.model_validate(values | {"model": encoder, "init_from": str(tmp_path / "model")})
    else:
        config = FinetuneConfig.model_validate(values | {"model": str(tmp_path / "model")})
    main = importlib.import_module(f"crate_ray.jobs.{job}").main
    with driver_lease(config) as ours:
        if isinstance(config, PretrainConfig):
            run = start_from(open_run(config), lambda reference: model.state_dict())
        else:
            run = open_finetuning(config, lambda reference: (model, description))
        with track(run, ours) as tracker:
            assert tracker.wait_for_run()
            before = contents(tmp_path / "runs")
            for second in (config, config.model_copy(update={"seed": 1})):
                with pytest.raises(UserError, match=f"run 'run' is in use by process {os.getpid()} on"):
                    main(second)
            assert contents(tmp_path / "runs") == before and len(before) == 2
            tracker.metrics(1, {"loss": 0.5}, 1_700_000_000_000)
    recorded = MlflowClient(config.tracking.uri).get_run(tracker.run_id)
    assert (recorded.info.status, recorded.data.metrics) == ("FINISHED", {"loss": 0.5})


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder without leases and temporary files."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lease" and not p.name.startswith(".tmp-")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_one_of_many_takes_over_from_a_dead_process(storage: Storage) -> None:
    process = holder(storage)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    inside = []
    over = threading.Event()

    def contend(number: int) -> str:
        try:
            with lease(storage) as ours:
                inside.append(number)
                over.wait(20)
                ours.check()
                return "held"
        except UserError as error:
            if len(refused := [*refusals, number]) == 5:
                over.set()
            refusals[:] = refused
            return str(error)

    refusals: list[int] = []
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(contend, range(6)))
    assert answers.count("held") == 1 and len(inside) == 1
    assert all("is in use by" in answer for answer in answers if answer != "held")
