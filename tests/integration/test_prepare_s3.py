"""Packing and indexing against S3: a real store where CRATE_RAY_TEST_S3_ENDPOINT names one, else moto's server."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from crate_ray.config import S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.samples import parse_samples
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.storage.interface import open_storage
from tests.jobs import ROOT, call, job


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if real := os.environ.get("CRATE_RAY_TEST_S3_ENDPOINT"):
        yield real
        return
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call(job("prepare", *arguments), ROOT, dict(os.environ))


def test_pack_index_and_repack_in_a_bucket(endpoint: str, tmp_path: Path) -> None:
    bucket = f"crate-ray-{uuid.uuid4().hex[:12]}"
    base = f"s3://{bucket}/data"
    to_s3 = ("--s3.endpoint_url", endpoint)
    missing = prepare("--source", "digits", "--output", base, *to_s3)
    assert missing.returncode == 2
    assert f"bucket '{bucket}' does not exist at {endpoint}" in missing.stderr
    assert "Traceback" not in missing.stderr

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    try:
        packed = prepare("--source", "digits", "--output", f"{base}/a", "--shard_samples", "500", *to_s3)
        assert packed.returncode == 0, packed.stderr
        assert "1,797 images in 4 shards" in packed.stdout
        assert f"jobs/pretrain.py --data {base}/a --s3.endpoint-url" in packed.stdout

        dataset = load_dataset(open_storage(f"{base}/a", S3Config(endpoint_url=endpoint)))
        manifest = dataset.manifest
        found = []
        for shard in range(manifest.num_shards):
            for first in range(0, int(dataset.samples[shard]), 100):
                count = min(100, int(dataset.samples[shard]) - first)
                start, end, covered = dataset.byte_range(shard, first, count)
                samples = parse_samples(dataset.storage.read(dataset.shard_name(shard), start, end - start))
                found += [(bytes(m["png"]), bytes(m["cls"])) for _, m in samples[first - covered :][:count]]
        expected = [(sample["png"], sample["cls"]) for sample in (item.load() for item in digits_source().items)]
        assert sorted(found) == sorted(expected)

        refused = prepare("--source", "digits", "--output", f"{base}/a", *to_s3)
        assert refused.returncode == 2
        assert "there is a dataset at" in refused.stderr

        indexed = prepare("--output", f"{base}/a", "--overwrite", "true", *to_s3)
        assert indexed.returncode == 0, indexed.stderr
        again = load_dataset(dataset.storage).manifest
        assert (again.shards_sha256, again.index_sha256) == (manifest.shards_sha256, manifest.index_sha256)

        elsewhere = prepare(
            "--output", str(tmp_path / "index"), "--shards", f"{base}/a/shard-{{000001..000003}}.tar", *to_s3
        )
        assert elsewhere.returncode == 0, elsewhere.stderr
        assert "1,297 images in 3 shards" in elsewhere.stdout
        indexed_here = load_dataset(open_storage(str(tmp_path / "index"), S3Config(endpoint_url=endpoint)))
        assert (indexed_here.manifest.shards_uri, indexed_here.shard_storage.uri) == (f"{base}/a", f"{base}/a")
        start, end, _ = indexed_here.byte_range(0, 0, 16)
        data = indexed_here.shard_storage.read(indexed_here.shard_name(0), start, end - start)
        indexed_here.check(0, start, data)
        assert len(parse_samples(data)) == 16
        absent = prepare(
            "--output", str(tmp_path / "more"), "--shards", f"{base}/a/shard-{{000003..000004}}.tar", *to_s3
        )
        assert absent.returncode == 2
        assert "no shards named shard-000004.tar under" in absent.stderr

        local = prepare("--source", f"{base}/a", "--output", str(tmp_path / "local"), "--shuffle", "false", *to_s3)
        assert local.returncode == 0, local.stderr
        assert "1,797 images in 1 shard " in local.stdout
    finally:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                client.delete_object(Bucket=bucket, Key=entry["Key"])
        client.delete_bucket(Bucket=bucket)
