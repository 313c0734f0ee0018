"""A killed packing continues to the same bytes as an undisturbed one, and no two run at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import boto3
import pytest

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.prepare.build import LEASE_NAME
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import open_source
from crate_ray.data.prepare.validation import pack_split
from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.lease import Lease
from tests.jobs import ROOT, environment, job

LEASE = 6.0
SETTINGS: dict[str, Any] = {
    "source": "shapes",
    "num_samples": 600,
    "image_size": 160,
    "shard_samples": 30,
    "max_side": 96,
}


# On each CI run, tests/integration/test_prepare_s3.py packs in a bucket, and test_lease.py takes over leases there.
@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.daily)])
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
        time.sleep(0.005)


def content(output: Storage) -> dict[str, bytes]:
    return {info.key: output.read(info.key) for info in output.list()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a packing that was not interrupted."""
    storage = open_storage(str(tmp_path_factory.mktemp("undisturbed")), S3Config())
    pack_here(storage)
    return content(storage)


def pack_here(output: Storage) -> None:
    """The same packing in this process."""
    config = PrepareConfig(**SETTINGS, output=output.uri, lease_seconds=LEASE)
    pack(shapes_source(config.split, config.num_samples, config.image_size, config.seed), output, config)


def test_killed_packing_goes_on_and_a_second_one_is_refused(
    output: Storage, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    first = prepare(output, tmp_path)
    try:
        wait_for_records(output, 1, first)
        with pytest.raises(UserError, match=rf"^the dataset at \S+ is in use by process {first.pid} on "):
            pack_here(output)
        first.send_signal(signal.SIGKILL)
        assert first.wait(30) == -signal.SIGKILL, "it was still at work"
    finally:
        first.kill()
    names = [info.key for info in output.list()]
    assert "manifest.json" not in names
    done = finished(output)
    assert 1 <= len(done) < 20
    modified = times(output, done)

    second = prepare(output, tmp_path)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"process {first.pid} on " in errors and "which sent no heartbeat" in errors
    assert f"{len(done)} of 20 shards were finished by an earlier run" in errors
    assert times(output, done) == modified
    assert content(output) == undisturbed


@pytest.mark.daily
def test_killed_packing_with_validation_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SETTINGS, "source": str(tmp_path / "images"), "validation": 0.4, "shard_samples": 3}
    for number, item in enumerate(shapes_source("all", 120, 160, 0).items):
        path = tmp_path / "images" / f"{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.load()["jpg"])
    source = open_source(open_storage(settings["source"], S3Config()))
    undisturbed = open_storage(str(tmp_path / "undisturbed"), S3Config())
    pack_split(source, undisturbed, PrepareConfig(**settings, output="unused"))
    output = open_storage(str(tmp_path / "out"), S3Config())
    for part in ("train", "validation"):
        killed = prepare(output, tmp_path, **settings)
        try:
            wait_for_records(output.under(part), 1, killed)
            killed.send_signal(signal.SIGSTOP)  # otherwise it may finish before the kill
            killed.send_signal(signal.SIGKILL)
            assert killed.wait(30) == -signal.SIGKILL, "it was still at work"
        finally:
            killed.kill()
    with (
        Lease(output, LEASE_NAME, f"the output {output.uri}", lease_seconds=LEASE),
        pytest.raises(UserError, match=r"^the output \S+ is in use by process "),
    ):
        pack_split(source, output, PrepareConfig(**settings, output=output.uri, lease_seconds=LEASE))
    last = prepare(output, tmp_path, **settings)
    printed, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert f"pretrain.py --data {output.uri}/train --data.validation {output.uri}/validation" in printed
    assert content(output) == content(undisturbed)


def times(output: Storage, names: set[str]) -> dict[str, object]:
    """When objects were written."""
    if (path := output.local_path("")) is not None:
        return {name: (path / name).stat().st_mtime_ns for name in names}
    bucket, endpoint = output.bucket, output.config.endpoint_url  # type: ignore[attr-defined]
    client = boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")
    return {name: client.head_object(Bucket=bucket, Key=f"data/{name}")["LastModified"] for name in names}
