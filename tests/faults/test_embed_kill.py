"""An embedding job whose driver or encoder is killed, or whose storage fails, ends with each sample exactly once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import boto3.session
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from crate_ray.config import CrateMAEConfig, EmbedConfig, PrepareConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding import embed_dataset
from crate_ray.evaluation.embedding_output import LEASE_FILE, EmbeddingRecord
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model, load_any
from crate_ray.storage.interface import open_storage
from tests.faults.proxy import ErrorAnswer, FaultProxy, Reset, Stall
from tests.jobs import RayCluster, environment, job
from tests.s3_gateway import S3Gateway

MODEL = CrateMAEConfig(image_size=64, patch_size=8, dim=64, depth=4, num_subspaces=4)
SAMPLES, PART = 400, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a model, and the embeddings of an undisturbed job."""
    folder = tmp_path_factory.mktemp("embed")
    storage = open_storage(str(folder / "data"), S3Config())
    pack(shapes_source("all", SAMPLES, 64, 0), storage, PrepareConfig(output=storage.uri))
    manifest = load_dataset(storage).manifest
    torch.manual_seed(0)
    about = ModelDescription(model=MODEL, mean=manifest.mean, std=manifest.std, kind="image")
    export_model(folder / "model", build_model(MODEL).state_dict(), about)
    embed(folder, str(folder / "undisturbed"))
    return folder


def embed(folder: Path, output: str, s3: S3Config | None = None) -> EmbeddingRecord:
    given = EmbedConfig(
        data=str(folder / "data"), output=output, part_samples=PART, batch_size=PART, s3=s3 or S3Config()
    )
    return embed_dataset(given, *load_any(folder / "model"), str(folder / "model"))


def start(folder: Path, output: Path, *more: str, **variables: str) -> subprocess.Popen[str]:
    arguments = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--output", str(output)]
    arguments += ["--part-samples", str(PART), "--batch-size", str(PART), *more]
    return subprocess.Popen(
        job("embed", *arguments), cwd=folder, env=environment(folder) | variables, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(output: Path) -> dict[str, int]:
    """Parts that are recorded, with the time of their last change."""
    names = [path.name for path in output.glob("_part-*.json")]
    files = [output / re.sub(r"_(.*)\.json", r"\1.parquet", name) for name in names]
    return {path.name: path.stat().st_mtime_ns for path in files}


def wait_for_parts(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(finished(output)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def check(folder: Path, output: Path) -> None:
    """The output has each sample once, and the files of the undisturbed job."""
    wanted = {path.name for path in (folder / "undisturbed").iterdir()}
    assert {path.name for path in output.iterdir()} == wanted
    tables = [pq.read_table(path) for path in (output, folder / "undisturbed")]
    assert tables[0]["sample"].to_pylist() == list(range(SAMPLES))
    assert tables[0].drop_columns("embedding") == tables[1].drop_columns("embedding")
    found, expected = (np.stack(table["embedding"].to_numpy(zero_copy_only=False)) for table in tables)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("parts", [1, pytest.param(9, marks=pytest.mark.daily)])
def test_a_killed_driver_leaves_parts_that_the_next_one_keeps(folder: Path, tmp_path: Path, parts: int) -> None:
    output = tmp_path / "out"
    first = start(folder, output)
    try:
        wait_for_parts(output, parts, first)
        first.send_signal(signal.SIGSTOP)  # otherwise it may finish before the kill
        first.send_signal(signal.SIGKILL)
        assert first.wait(30) == -signal.SIGKILL
    finally:
        first.kill()
    kept = finished(output)
    assert parts <= len(kept) < SAMPLES // PART
    (output / LEASE_FILE).unlink()  # how a lease expires is tested in test_lease
    second = start(folder, output)
    said, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"{len(kept)} of 25 files were finished by an earlier run" in errors and f"{SAMPLES} embeddings" in said
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
    check(folder, output)


@pytest.mark.ray
@pytest.mark.daily
def test_a_killed_driver_on_ray_leaves_no_part_twice(folder: Path, tmp_path: Path, cluster: RayCluster) -> None:
    output = tmp_path / "out"
    more = ("--workers", "2")
    first = start(folder, output, *more, RAY_ADDRESS=cluster.address)
    try:
        wait_for_parts(output, 3, first)
        first.send_signal(signal.SIGKILL)
        assert first.wait(30) == -signal.SIGKILL
    finally:
        first.kill()
    (output / LEASE_FILE).unlink()
    second = start(folder, output, *more, RAY_ADDRESS=cluster.address)
    _, errors = second.communicate(timeout=180)
    assert second.returncode == 0, errors
    assert "of 25 files were finished by an earlier run" in errors
    check(folder, output)


@pytest.mark.daily
@pytest.mark.ray
@pytest.mark.slow
def test_the_part_of_a_killed_encoder_is_given_to_another_one(
    folder: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    output = tmp_path / "out"
    driver = start(folder, output, "--workers", "2", RAY_ADDRESS=cluster.address)
    try:
        wait_for_parts(output, 2, driver)
        encoders = [
            process for raylet in cluster.raylets for process in raylet.children()
            if " ".join(process.cmdline()).startswith("ray::_Encoder")
        ]  # fmt: skip
        assert encoders
        psutil.Process(encoders[0].pid).send_signal(signal.SIGKILL)
        said, errors = driver.communicate(timeout=180)
    finally:
        driver.kill()
    assert driver.returncode == 0, errors
    assert errors.count("an encoder was lost (") == 1 and "another one does its part" in errors
    assert f"{SAMPLES} embeddings of 64 numbers" in said
    check(folder, output)


@pytest.mark.daily
@pytest.mark.s3
def test_failing_storage_costs_no_part_and_makes_none_twice(
    folder: Path, s3_gateway: S3Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_gateway.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"embed-{uuid.uuid4().hex[:12]}"
    session = boto3.session.Session()
    session.client("s3", endpoint_url=s3_gateway.endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)

    def quick(endpoint: str, seconds: float) -> S3Config:
        return S3Config(endpoint_url=endpoint, connect_timeout=1, read_timeout=0.5, retry_seconds=seconds)

    uri = f"s3://{bucket}/out"
    with FaultProxy(s3_gateway.endpoint) as proxy:
        # The store writes a part, but its answer is lost; then it is busy, and does not answer in time.
        for number, fault in enumerate((Reset(), ErrorAnswer("SlowDown", 503), Stall(1.5))):
            proxy.plan(fault, method="PUT", key=f"part-{number * PART:012d}", times=2)
        proxy.plan(ErrorAnswer("InternalError", 500), method="PUT", key=f"/part-{20 * PART:012d}")  # for ever
        with pytest.raises(UserError, match=f"part-{20 * PART:012d}"):
            embed(folder, uri, quick(proxy.url, 3))
        assert sum(proxy.faults.values()) >= 7
    output = open_storage(uri, quick(s3_gateway.endpoint, 20))
    before: dict[str, Any] = {i.key: i.etag for i in output.list() if i.key.startswith("part-")}
    assert len(before) == 20
    record = embed(folder, uri, quick(s3_gateway.endpoint, 20))
    assert record.complete and record.num_rows == SAMPLES
    after = {info.key: info for info in output.list()}
    assert {key: after[key].etag for key in before} == before
    for key in after:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / key).write_bytes(output.read(key))
    check(folder, tmp_path / "out")
