"""A packing that is killed and started again makes what an undisturbed one makes, and no two run at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path

import boto3
import pytest

from crate_ray.config import S3Config
from crate_ray.data.storage import Storage, open_storage
from tests.jobs import ROOT, environment, job

LEASE = 6.0
SETTINGS = {"source": "shapes", "num_samples": 1500, "image_size": 160, "shard_samples": 60, "max-side": 96}


@pytest.fixture(params=["folder", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "out"), S3Config())
    gateway = request.getfixturevalue("s3_gateway")
    for name, value in gateway.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"prepare-{uuid.uuid4().hex[:12]}"
    session = boto3.session.Session()
    session.client("s3", endpoint_url=gateway.endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
    return open_storage(f"s3://{bucket}/data", S3Config(endpoint_url=gateway.endpoint))


def prepare(output: Storage, folder: Path, **settings: object) -> subprocess.Popen[str]:
    settings = {**SETTINGS, "output": output.uri, "lease_seconds": LEASE, **settings}
    if endpoint := getattr(getattr(output, "config", None), "endpoint_url", None):
        settings["s3.endpoint_url"] = endpoint
    command = job("prepare", *[part for name, value in settings.items() for part in (f"--{name}", str(value))])
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(folder) | keys, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(output: Storage) -> set[str]:
    """Shards that have a record."""
    names = [info.key for info in output.list(".packing/")]
    return {f"shard-{name[9:15]}.tar" for name in names if re.fullmatch(r"\.packing/\d{6}\.json", name)}


def wait_for_records(output: Storage, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(finished(output)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def content(output: Storage) -> dict[str, bytes]:
    return {info.key: output.read(info.key) for info in output.list()}


def test_killed_packing_goes_on_and_a_second_one_is_refused(output: Storage, tmp_path: Path) -> None:
    undisturbed = open_storage(str(tmp_path / "undisturbed"), S3Config())
    calm = prepare(undisturbed, tmp_path)
    assert calm.wait(120) == 0, calm.communicate()[1]

    first = prepare(output, tmp_path)
    second = None
    try:
        wait_for_records(output, 1, first)
        second = prepare(output, tmp_path)
        _, errors = second.communicate(timeout=60)
        assert first.poll() is None, "the first one is still at work"
        assert second.returncode == 2
        assert re.search(rf"error: the dataset at \S+ is in use by process {first.pid} on ", errors), errors
        first.send_signal(signal.SIGKILL)
        first.wait(30)
    finally:
        first.kill()
        if second is not None:
            second.kill()
    names = [info.key for info in output.list()]
    assert "manifest.json" not in names
    done = finished(output)
    assert 1 <= len(done) < 20
    modified = times(output, done)

    third = prepare(output, tmp_path)
    _, errors = third.communicate(timeout=120)
    assert third.returncode == 0, errors
    assert f"process {first.pid} on " in errors and "gave no sign of life, its lease is taken over" in errors
    assert f"{len(done)} of 20 shards were finished by an earlier run" in errors
    assert times(output, done) == modified
    assert content(output) == content(undisturbed)


def times(output: Storage, names: set[str]) -> dict[str, object]:
    """When objects were written."""
    if (path := output.local_path("")) is not None:
        return {name: (path / name).stat().st_mtime_ns for name in names}
    bucket, endpoint = output.bucket, output.config.endpoint_url  # type: ignore[attr-defined]
    client = boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")
    return {name: client.head_object(Bucket=bucket, Key=f"data/{name}")["LastModified"] for name in names}
