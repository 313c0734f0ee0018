"""What a packing or indexing has finished so far: small records in the output, so that it can go on after a crash.

`.packing/` holds the plan's digest and, per finished shard, a JSON object and the shard's part of the index; it is
there only until the manifest is.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from crate_ray.data.format import npy
from crate_ray.data.format.index import INDEX_DTYPE
from crate_ray.data.prepare.statistics import Measurement, SampleCounts
from crate_ray.errors import UserError
from crate_ray.storage.interface import NotFound, Storage

_FOLDER = ".packing"
_PLAN = f"{_FOLDER}/plan.json"
_READERS = 16


class ShardRecord(BaseModel):
    """A finished shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    """Digest of the plan that it belongs to."""
    name: str
    samples: int
    bytes: int
    table: int
    sha256: str
    """The columns of its row of SHARD_DTYPE."""
    counts: SampleCounts
    measurement: Measurement
    bad: list[str]
    """Samples that cannot be decoded, and why."""
    index_sha256: str
    """Of its index entries' .npy file."""


class Finished(NamedTuple):
    """A finished shard and its entries of the index."""

    record: ShardRecord
    entries: NDArray[np.void]

    @property
    def row(self) -> tuple[Any, ...]:
        """The row of SHARD_DTYPE."""
        record = self.record
        return record.samples, record.bytes, record.table, np.frombuffer(bytes.fromhex(record.sha256), np.uint8)


def digest_of(parts: Iterable[object]) -> str:
    """Digest of a plan: of all that decides what is written, in order."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(json.dumps(part).encode() + b"\n")
    return sha256.hexdigest()


def unfinished_plan(storage: Storage) -> str | None:
    """Digest of the plan that was begun under a storage and not finished; None if there is none."""
    try:
        return str(json.loads(storage.read(_PLAN))["plan"])
    except NotFound:
        return None
    except (ValueError, TypeError, KeyError):
        return "damaged"


def begin(storage: Storage, plan: str) -> None:
    """Forget what another plan has finished, and note that this one is under way."""
    remove(storage)
    storage.write(_PLAN, json.dumps({"plan": plan}).encode())


def check_plan(storage: Storage, plan: str) -> None:
    """Make sure that a plan is still under way, seen from where this is called.

    Raises:
        UserError: it is not.
    """
    found = unfinished_plan(storage)
    if found is None:
        raise UserError(
            f"{storage.uri} is not what it is on the machine that runs the job; give an s3:// address, or a folder "
            "that all nodes of the cluster share"
        )
    if found != plan:
        raise UserError(f"another packing has begun at {storage.uri}, this one must not go on")


def save_record(
    storage: Storage, number: int, row: tuple[Any, ...], entries: NDArray[np.void], **described: Any
) -> Finished:
    """Note that a shard is finished: its row of SHARD_DTYPE, its index entries, the record's other fields."""
    file = io.BytesIO()
    np.save(file, entries, allow_pickle=False)
    samples, size, table, sha256 = row
    record = ShardRecord(
        samples=samples,
        bytes=size,
        table=table,
        sha256=bytes(bytearray(sha256)).hex(),
        index_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
        **described,
    )
    storage.write(f"{_FOLDER}/{number:06d}.npy", file.getvalue())
    storage.write(f"{_FOLDER}/{number:06d}.json", record.model_dump_json().encode())
    return Finished(record, entries)


def load_records(storage: Storage, plan: str) -> dict[int, Finished]:
    """The finished shards of a plan by number; records that are damaged, or another plan's, do not count."""

    def load(key: str) -> Finished | None:
        try:
            record = ShardRecord.model_validate_json(storage.read(key))
            data = storage.read(key.removesuffix("json") + "npy")
        except (ValidationError, NotFound):
            return None
        if record.plan != plan or hashlib.sha256(data).hexdigest() != record.index_sha256:
            return None
        entries: NDArray[np.void] = npy.read(data)
        return Finished(record, entries) if entries.dtype == INDEX_DTYPE else None

    keys = [key for key in _keys(storage) if key.endswith(".json") and key != _PLAN]
    with ThreadPoolExecutor(_READERS) as pool:
        loaded = zip(keys, pool.map(load, keys), strict=True)
        return {
            int(number): finished
            for key, finished in loaded
            if finished is not None and (number := key.removeprefix(f"{_FOLDER}/").removesuffix(".json")).isdigit()
        }


def remove(storage: Storage) -> None:
    """Delete all records; the plan last, so that none is taken for another plan's."""
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(storage.delete, [key for key in _keys(storage) if key != _PLAN]))
    storage.delete(_PLAN)
    if (folder := storage.local_path(_FOLDER)) is not None:
        with suppress(OSError):
            folder.rmdir()


def _keys(storage: Storage) -> Iterator[str]:
    return (info.key for info in storage.list(f"{_FOLDER}/"))
