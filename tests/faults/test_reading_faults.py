"""Batches from a real S3 server behind a proxy that injects faults: bitwise those of a quiet run, or a clear end."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import boto3.session
import numpy as np
import pytest
import torch
from botocore.config import Config
from PIL import Image

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.batch import Batch
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.storage.interface import open_storage
from tests.faults.proxy import ErrorAnswer, Fault, FaultProxy, Flip, Reset, Stall, Truncate
from tests.s3_gateway import S3Gateway

BUCKET, URI = "reading", "s3://reading/set"
SAMPLES = 240


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def surroundings(s3_gateway: S3Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in s3_gateway.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def client(s3_gateway: S3Gateway, surroundings: None) -> Iterator[Any]:
    """A fresh dataset of six shards, and a client past the proxy."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=s3_gateway.endpoint,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )
    client.create_bucket(Bucket=BUCKET)
    items = [Item(str(n), lambda n=n: {"png": picture(n)}) for n in range(SAMPLES)]  # type: ignore[misc]
    config = PrepareConfig(output=URI, shard_samples=40, overwrite=True)
    pack(Source(items), open_storage(URI, S3Config(endpoint_url=s3_gateway.endpoint)), config)
    yield client
    client.close()


@pytest.fixture
def proxy(s3_gateway: S3Gateway) -> Iterator[FaultProxy]:
    with FaultProxy(s3_gateway.endpoint) as proxy:
        yield proxy


def read(endpoint: str, steps: int = 40) -> list[Batch]:
    """Three epochs in streamed mode, in blocks of 16."""
    quick = S3Config(endpoint_url=endpoint, connect_timeout=1, read_timeout=0.5, retry_seconds=20)
    with stream(
        URI, batch_size=16, image_size=16, steps=steps, s3=quick, memory_bytes=1, block_samples=16, lanes=4,
        window_blocks=2, fetch_threads=4, decode_threads=2,
    ) as batches:  # fmt: skip
        return list(batches)


FAULTS: dict[str, Fault] = {
    "slow down": ErrorAnswer("SlowDown", 503),
    "internal error": ErrorAnswer("InternalError", 500),
    "expired token": ErrorAnswer("ExpiredToken", 400),
    "reset in the body": Reset(after=5000),
    "stall in the body": Stall(1.5, after=3000),
    "truncated body": Truncate(after=4000),
    "changed byte": Flip(at=2500),
}


@pytest.mark.parametrize("name", FAULTS)
def test_batches_are_bitwise_the_same_after_a_fault(
    client: Any, s3_gateway: S3Gateway, proxy: FaultProxy, name: str
) -> None:
    expected = read(s3_gateway.endpoint)
    proxy.plan(FAULTS[name], key=".tar", skip=2, times=5)
    batches = read(proxy.url)
    assert sum(proxy.faults.values()) == 5
    assert len(batches) == len(expected) == 40
    for batch, wanted in zip(batches, expected, strict=True):
        assert batch.keys == wanted.keys and torch.equal(batch.images, wanted.images)


def test_a_shard_that_is_replaced_stops_the_run(client: Any, s3_gateway: S3Gateway) -> None:
    config = S3Config(endpoint_url=s3_gateway.endpoint)
    key = "set/shard-000002.tar"
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    # The buffer has room for the current windows only. With more room, the next epoch would read nothing again.
    order = {"block_samples": 16, "lanes": 2, "window_blocks": 1}
    settings = {"memory_bytes": 1, "buffer_bytes": 1, "prefetch_batches": 1, **order}
    with stream(URI, batch_size=16, image_size=16, s3=config, **settings) as batches:
        steps = iter(batches)
        for _ in range(15):  # all of it, once
            next(steps)
        client.put_object(Bucket=BUCKET, Key=key, Body=content[:-1024] + b"\1" * 1024)
        with pytest.raises(UserError, match=r"shard-000002\.tar was replaced"):
            list(islice(steps, 100))


@pytest.mark.parametrize("change", [lambda content: content[512:], lambda content: content[:512] + content])
def test_a_shard_of_another_size_stops_the_run_that_has_not_read_it_yet(
    client: Any, s3_gateway: S3Gateway, change: Callable[[bytes], bytes]
) -> None:
    key = "set/shard-000003.tar"
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=change(content))
    with pytest.raises(
        UserError, match=rf"shard-000003\.tar was replaced after it was indexed, .* {len(content)} bytes"
    ):
        read(s3_gateway.endpoint)


def test_a_shard_that_is_deleted_stops_the_run(client: Any, s3_gateway: S3Gateway) -> None:
    client.delete_object(Bucket=BUCKET, Key="set/shard-000003.tar")
    with pytest.raises(UserError, match=r"set/shard-000003\.tar does not exist"):
        read(s3_gateway.endpoint)
