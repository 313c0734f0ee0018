"""A run survives a full disk, a failing storage and an MLflow server that comes and goes. Its final weights are bitwise
those of an undisturbed run, and nothing that was committed or recorded is lost."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import boto3.session
import pytest
from mlflow import MlflowClient

from crate_ray.config import S3Config
from crate_ray.runs.metrics import LOSS
from crate_ray.storage.interface import open_storage
from tests.faults.proxy import ErrorAnswer, FaultProxy, Reset, Rule
from tests.faults.runs import EVERY, STEPS, Undisturbed, pretrain, run_in
from tests.faults.services import full_disk, give_keys, mlflow_server
from tests.jobs import (
    Job,
    RayCluster,
    end,
    final_weights,
    finish,
    free_port,
    newest_commit,
    start,
    wait_for_commit,
    wait_for_workers,
)
from tests.s3_gateway import S3Gateway

pytestmark = pytest.mark.ray


def wait_for_log(job: Job, text: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while text not in job.log:
        assert job.returncode is None, f"the job ended:\n{job.log[-3000:]}"
        assert time.monotonic() < deadline, f"no {text!r} within {timeout} s:\n{job.log[-3000:]}"
        time.sleep(0.02)


@pytest.mark.daily
@pytest.mark.timeout(900)
def test_a_disk_that_is_full_and_an_mlflow_server_that_comes_and_goes(
    digits: str, cluster: RayCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run, port, server = run_in(tmp_path), free_port(), tmp_path / "server"
    server.mkdir()
    command = pretrain(digits, tracking__uri=f"http://127.0.0.1:{port}", scaling__max_failures=0)
    # A new run that MLflow cannot record does not train.
    refused = start(command, tmp_path, cluster)
    assert refused.wait(120) == 2 and f"MLflow at http://127.0.0.1:{port} cannot record this run" in refused.log
    with mlflow_server(server, port):
        job = start(command, tmp_path, cluster)
        try:
            workers = wait_for_workers(job, 2)
        except BaseException:
            end(job)
            raise
    try:  # and without MLflow from here
        wait_for_commit(run, EVERY, job)
        # For some seconds (its log cannot grow either): the upload is repeated, by the same workers.
        with full_disk(workers[0]):
            time.sleep(1)
            committed = newest_commit(run)
            time.sleep(2)
            assert newest_commit(run) == committed < STEPS
        wait_for_commit(run, committed + 1, job)
        assert job.workers() == workers
        # For ever: one sentence.
        with full_disk(workers[0]), full_disk(workers[1]):
            committed = newest_commit(run)
            assert job.wait(120) == 2, job.log[-3000:]
    finally:
        end(job)
    assert re.search(
        r"^error: rank \d cannot continue: .*File too large.*; fix that and run the same command again", job.log, re.M
    )
    assert committed <= newest_commit(run) < STEPS
    # MLflow went away, which stopped nothing.
    spool = tmp_path / "cache" / "crate-ray" / "spool" / json.loads(run.read("run.json"))["run_key"]
    assert f"the rest is in {spool}" in job.log

    with ExitStack() as stack:
        with mlflow_server(server, port):
            job = start(command, tmp_path, cluster)
            stack.callback(end, job)
            wait_for_commit(run, newest_commit(run) + 1, job)
        wait_for_log(job, "records wait on disk")
        uri = stack.enter_context(mlflow_server(server, port))
        finish(job)
        assert final_weights(run) == undisturbed.weights(2)
        client = MlflowClient(uri)
        (record,) = client.search_runs(["1"])
        losses = client.get_metric_history(record.info.run_id, LOSS)
        assert {point.step for point in losses} == set(range(10, STEPS + 1, 10))
        assert record.info.status == "FINISHED"
        assert not spool.exists()


@pytest.mark.daily
@pytest.mark.timeout(900)
def test_a_store_that_fails_during_uploads(
    s3_gateway: S3Gateway,
    digits: str,
    cluster: RayCluster,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give_keys(s3_gateway, cluster)
    for name, value in s3_gateway.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"faults-{uuid.uuid4().hex[:12]}"
    client = boto3.session.Session().client("s3", endpoint_url=s3_gateway.endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    run = open_storage(f"s3://{bucket}/run", S3Config(endpoint_url=s3_gateway.endpoint))
    with FaultProxy(s3_gateway.endpoint) as proxy:
        part = {"method": "PUT", "key": "/step-"}

        def parts(fault: ErrorAnswer | Reset, seed: int) -> Rule:
            return proxy.plan(fault, **part, probability=0.3, seed=seed)  # type: ignore[arg-type]

        busy = [parts(ErrorAnswer("SlowDown", 503), 1), parts(Reset(forward=False), 2), parts(Reset(), 3)]
        job = start(
            pretrain(digits, 3, storage=f"s3://{bucket}", s3__endpoint_url=proxy.url, scaling__max_failures=1),
            tmp_path,
            cluster,
        )
        try:
            worker = wait_for_workers(job, 3)[0]
            wait_for_commit(run, EVERY, job)
            assert sum(rule.struck for rule in busy) > 0
            proxy.clear()
            # It is gone in the middle of an upload.
            away: list[float] = []
            proxy.plan(Reset(forward=False), **part, times=1, then=lambda: away.append(time.monotonic()))  # type: ignore[arg-type]
            gone = proxy.plan(Reset(forward=False), method=None, when=lambda _: bool(away))
            while not (away and time.monotonic() > away[0] + 8):
                assert job.returncode is None, job.log[-3000:]
                time.sleep(0.05)
            committed = newest_commit(run)
            proxy.clear()
            assert gone.struck > 3
            wait_for_commit(run, committed + 1, job)
            # A worker is killed while its part is on its way.
            killed = proxy.plan(Reset(), **part, times=1, then=lambda: os.kill(worker.pid, 9))  # type: ignore[arg-type]
            finish(job)
            assert killed.struck == 1
        finally:
            end(job)
    assert final_weights(run) == undisturbed.weights(3)
