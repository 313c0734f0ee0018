"""Records of finished shards, kept in the output so that an interrupted packing or indexing can continue.

`.packing/` holds the digest of the plan and, for each finished shard, a JSON object and its part of the index. It is
removed once the manifest is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crate_ray.config.identifiers import Count, RelativePath, Sha256
from crate_ray.data.format import npy
from crate_ray.data.format.index import INDEX_DTYPE, INDEX_STRIDE
from crate_ray.data.format.manifest import PLAN_NAME
from crate_ray.data.prepare.statistics import DatasetStatistics, SampleCounts
from crate_ray.errors import UserError
from crate_ray.storage.interface import NotFound, Storage, TooLarge

_FOLDER = PLAN_NAME.partition("/")[0]
_RECORD = re.compile(rf"{re.escape(_FOLDER)}/([0-9]{{6,18}})\.json")
_CONCURRENCY = 16


class ShardRecord(BaseModel):
    """A finished shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Sha256
    """Digest of its plan."""
    name: RelativePath
    samples: Annotated[Count, Field(lt=2**32)]
    bytes: Count
    table: Annotated[int, Field(ge=0, lt=2**64)]
    sha256: Sha256
    """The columns of its row of SHARD_DTYPE."""
    counts: SampleCounts
    measurement: DatasetStatistics
    bad: list[str]
    """Samples that cannot be decoded, with the cause."""
    index_sha256: Sha256
    """Digest of the .npy file of its index entries."""


class Finished(NamedTuple):
    """A finished shard and its entries of the index."""

    record: ShardRecord
    entries: NDArray[np.void]

    @property
    def row(self) -> tuple[Any, ...]:
        """Its row of SHARD_DTYPE."""
        record = self.record
        return record.samples, record.bytes, record.table, np.frombuffer(bytes.fromhex(record.sha256), np.uint8)


def digest_of(parts: Iterable[object]) -> str:
    """Digest of a plan, from everything that determines what is written, in order."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(json.dumps(part).encode() + b"\n")
    return sha256.hexdigest()


def unfinished_plan(storage: Storage) -> str | None:
    """Digest of the unfinished plan under a storage; None if there is none."""
    try:
        return str(json.loads(storage.read_small(PLAN_NAME))["plan"])
    except NotFound:
        return None
    except (ValueError, TypeError, KeyError, RecursionError, TooLarge):
        return "damaged"


def begin(storage: Storage, plan: str) -> None:
    """Remove the records of any other plan, and record that this one has begun."""
    remove(storage)
    storage.write(PLAN_NAME, json.dumps({"plan": plan}).encode())


def check_plan(storage: Storage, plan: str) -> None:
    """Check on this machine that a plan is still the unfinished plan of the output.

    Raises:
        UserError: the output has another plan or none.
    """
    found = unfinished_plan(storage)
    if found is None:
        raise UserError(
            f"{storage.uri} on this node is not the folder that the job writes to; use an s3:// address, or a folder "
            "that all nodes share"
        )
    if found != plan:
        raise UserError(f"another packing has started at {storage.uri}, so this one stops")


def save_record(
    storage: Storage, number: int, row: tuple[Any, ...], entries: NDArray[np.void], **described: Any
) -> Finished:
    """Record a finished shard: its row of SHARD_DTYPE, its index entries, and the record's other fields."""
    content = npy.content_of(entries)
    samples, size, table, sha256 = row
    record = ShardRecord(
        samples=samples,
        bytes=size,
        table=table,
        sha256=bytes(bytearray(sha256)).hex(),
        index_sha256=hashlib.sha256(content).hexdigest(),
        **described,
    )
    storage.write(f"{_FOLDER}/{number:06d}.npy", content)
    storage.write(f"{_FOLDER}/{number:06d}.json", record.model_dump_json().encode())
    return Finished(record, entries)


def load_records(storage: Storage, plan: str, names: Sequence[str]) -> dict[int, Finished]:
    """The finished shards of a plan by number, without records that are damaged or belong to another plan.

    Args:
        storage: the dataset's.
        plan: digest of the plan.
        names: names of all of its shards.
    """

    def load(number: int, key: str) -> Finished | None:
        try:
            record = ShardRecord.model_validate_json(storage.read_small(key))
            data = storage.read(key.removesuffix("json") + "npy")
        except (ValidationError, NotFound, TooLarge):
            return None
        if record.plan != plan or record.name != names[number]:
            return None
        if hashlib.sha256(data).hexdigest() != record.index_sha256:
            return None
        try:
            entries: NDArray[np.void] = npy.read(data)
        except ValueError:
            return None
        whole = entries.dtype == INDEX_DTYPE and entries.shape == (-(-record.samples // INDEX_STRIDE),)
        return Finished(record, entries) if whole else None

    found = [(int(match[1]), key) for key in _keys(storage) if (match := _RECORD.fullmatch(key))]
    known = [(number, key) for number, key in found if number < len(names)]
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        loaded = pool.map(load, *zip(*known, strict=True)) if known else ()
        return {number: shard for (number, _), shard in zip(known, loaded, strict=True) if shard is not None}


def remove(storage: Storage) -> None:
    """Delete all records. The plan is deleted last, so that a remaining record always has its plan."""
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        list(pool.map(storage.delete, [key for key in _keys(storage) if key != PLAN_NAME]))
    storage.delete(PLAN_NAME)
    if (folder := storage.local_path(_FOLDER)) is not None:
        with suppress(OSError):
            folder.rmdir()


def _keys(storage: Storage) -> Iterator[str]:
    return (info.key for info in storage.list(f"{_FOLDER}/"))
