"""Whatever stands in a file, it is read or refused with an error of ours, within bounds of time and memory."""

from __future__ import annotations

import os
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from pydantic import ValidationError

from crate_ray.config import PretrainConfig
from crate_ray.config.values import load_yaml, validate
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.samples import decode_batch
from crate_ray.data.decode.transforms import centre_crops
from crate_ray.data.format import npy
from crate_ray.data.format.dataset import load_dataset, save_dataset
from crate_ray.data.format.index import SHARD_DTYPE, index_shard
from crate_ray.data.format.manifest import Manifest, parse_manifest
from crate_ray.data.format.samples import parse_samples, read_table
from crate_ray.data.prepare.records import ShardRecord, unfinished_plan
from crate_ray.data.prepare.statistics import BadSample, DatasetStatistics, SampleCounts
from crate_ray.data.prepare.statistics import grid_statistics as check_grid
from crate_ray.data.prepare.statistics import image_statistics as check_image
from crate_ray.data.read.shard_reader import ShardReader
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding_output import EmbeddingRecord
from crate_ray.models.exported import ModelDescription
from crate_ray.runs.commits import Commit, FileRecord
from crate_ray.storage.local import LocalStorage
from tests.fuzz.inputs import arrays, images, mutated, tars

T = TypeVar("T")

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""How long `make fuzz` searches, over all tests of this file. 0: each runs a few examples, the same ones every time."""
TESTS = 6
EXAMPLES = 200


def search(inputs: st.SearchStrategy[T], check: Callable[[T], None]) -> None:
    """Call a function with many inputs."""
    ends = time.monotonic() + SECONDS / TESTS
    settings = hypothesis.settings(
        max_examples=EXAMPLES, derandomize=not SECONDS, database=None, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip

    def example(value: T) -> None:
        check(value)

    while True:
        settings(hypothesis.given(inputs)(example))()
        if time.monotonic() >= ends:
            return


@contextmanager
def bounded(seconds: float = 3, megabytes: float = 64) -> Iterator[None]:
    """Fails if the block takes long or much of Python's memory, or raises anything but a UserError of one line."""
    tracemalloc.start()
    begun = time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 5000  # noqa: PT017 - any message
    finally:
        taken, peak = time.thread_time() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert taken < seconds and peak < megabytes * 2**20


def test_tars() -> None:
    def check(shard: bytes) -> None:
        rows: list[Any] = []
        with bounded():
            rows += read_table(shard, "x.tar").rows
        with bounded():
            parse_samples(shard, "x.tar")
        if not rows:
            return
        with bounded():
            for row in rows:
                assert row.key.isprintable() or row.key
                assert all(0 <= start <= start + size <= len(shard) for start, size in row.members.values())
            index_shard(shard, rows)

    search(mutated(st.sampled_from(tars())), check)


def test_images() -> None:
    def check(content: bytes) -> None:
        out = torch.empty(2, 3, 16, 16, dtype=torch.uint8)
        with bounded():
            rule = lambda h, w: centre_crops(h, w, (16, 16))  # noqa: E731
            errors = decode_batch([content, images()[0]], "image", rule, out, max_pixels=2**20)
            assert isinstance(errors[0], DecodeError | None) and errors[1] is None
        with bounded(), suppress(BadSample):
            check_image(content)

    search(mutated(st.sampled_from(images())), check)


def test_arrays() -> None:
    def check(content: bytes) -> None:
        out = torch.empty(1, 1, 4, 4)
        with bounded(), suppress(ValueError):
            npy.read(content)
        with bounded():
            error = decode_batch([content], "grid", lambda h, w: centre_crops(h, w, (4, 4)), out)[0]
            assert isinstance(error, DecodeError | None)
        with bounded(), suppress(BadSample):
            check_grid(content)

    search(mutated(st.sampled_from(arrays())), check)


DESCRIBED: dict[str, Any] = {
    "kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 1, "mean": (0.5,), "std": (0.25,),
    "num_measured": 1,
}  # fmt: skip
DIGEST = "a" * 64


def test_records(tmp_path: Path) -> None:
    manifest = Manifest(
        num_samples=1, num_shards=1, total_bytes=9, shard_pattern="x-{:06d}.tar", shards_sha256=DIGEST,
        index_sha256=DIGEST, **DESCRIBED,
    )  # fmt: skip
    record = ShardRecord(
        plan=DIGEST, name="x.tar", samples=1, bytes=9, table=0, sha256=DIGEST, index_sha256=DIGEST, bad=["x (bad)"],
        counts=SampleCounts(), measurement=DatasetStatistics(),
    )  # fmt: skip
    commit = Commit(step=1, directory="attempt-001/step-1", files={"a": FileRecord(size=1, sha256=DIGEST)}, time=1.5)
    embedding = EmbeddingRecord(model=DIGEST, dataset=DIGEST, feature="mean", num_samples=1, dim=4)
    description = ModelDescription.model_validate({"model": {}, "mean": (0.5,), "std": (1.0,), "kind": "image"})
    others = [record, commit, embedding, description]
    seeds = [manifest.to_json(), *(other.model_dump_json().encode() for other in others), b'{"plan": "1"}', b"[" * 9999]
    storage = LocalStorage(tmp_path)

    def check(content: bytes) -> None:
        with bounded():
            parse_manifest(content, "here")
        for other in others:
            with bounded(), suppress(ValidationError):
                type(other).model_validate_json(content)
        (tmp_path / ".packing").mkdir(exist_ok=True)
        (tmp_path / ".packing/plan.json").write_bytes(content)
        with bounded():
            assert isinstance(unfinished_plan(storage), str)

    search(mutated(st.sampled_from(seeds)), check)


def test_indexes(tmp_path: Path) -> None:
    """Files that agree with their digests, but not with the shard."""
    storage, opened = LocalStorage(tmp_path), []
    for number, shard in enumerate([tars()[0], tars()[2]]):
        (tmp_path / f"s-{number}.tar").write_bytes(shard)
        row, entries, table = index_shard(shard, read_table(shard, "s.tar").rows)
        opened.append((row, entries, table))
    names = ["s-0.tar", "s-1.tar"]
    shards = np.array([row for row, _, _ in opened], SHARD_DTYPE)
    index = np.concatenate([entries for _, entries, _ in opened])
    for name, (_, _, table) in zip(names, opened, strict=True):
        if table is not None:
            (tmp_path / f"{name}.table.npy").write_bytes(table)
    seeds = st.sampled_from([shards.tobytes(), index.tobytes()])

    def check(changed: tuple[bytes, bytes]) -> None:
        rows = np.frombuffer(changed[0][: len(changed[0]) // SHARD_DTYPE.itemsize * SHARD_DTYPE.itemsize], SHARD_DTYPE)
        entries = np.frombuffer(changed[1][: len(changed[1]) // index.itemsize * index.itemsize], index.dtype)
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        with bounded(), suppress(ValidationError):  # numbers that no manifest holds
            save_dataset(storage, names[: len(rows)] or names, rows, [entries], **DESCRIBED)
        if not storage.exists("manifest.json"):
            return
        with bounded():
            dataset = load_dataset(storage)
            reader = ShardReader(dataset)
            for first in range(0, min(dataset.manifest.num_samples, 64), 5):
                reader.num_bytes(first, 5)
                reader.read(first, 5)

    search(st.tuples(mutated(seeds), mutated(seeds)) | st.tuples(st.just(shards.tobytes()), mutated(seeds)), check)


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    seeds = [example.read_bytes() for example in sorted(Path("jobs/configs").glob("*.yaml"))]
    seeds += [b"a: &a [1, *a]\nb: {<<: {c: 1}, ? [d] : !!int 7}\n- x\n--- \n'y': 2001-12-14t21:59:43Z\n0x1F: .nan\n"]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with bounded(seconds=10):
            validate(PretrainConfig, load_yaml(path))

    search(mutated(st.sampled_from(seeds)), check)


def test_all_tests_share_the_time() -> None:
    assert TESTS == sum(name.startswith("test_") for name in globals()) - 1


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
