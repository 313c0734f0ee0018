"""Making datasets of shards that somebody else wrote: each is scanned once, and nothing of it is copied or changed."""

from __future__ import annotations

import logging
from typing import NamedTuple

from crate_ray.data.format.index import index_shard
from crate_ray.data.format.manifest import MANIFEST_NAME, TABLE_SUFFIX, Manifest
from crate_ray.data.format.samples import read_table
from crate_ray.data.prepare.build import Plan, ShardTask, make_dataset
from crate_ray.data.prepare.records import Finished, check_plan, digest_of, save_record
from crate_ray.data.prepare.sources import THREADS, known_classes, list_shards, open_shard, split_address
from crate_ray.data.prepare.statistics import (
    MEASURED_SAMPLES,
    BadSample,
    Measured,
    Measurement,
    SampleCounts,
    image_suffix,
    measure_grid,
    measure_image,
)
from crate_ray.data.prepare.tasks import Report
from crate_ray.errors import UserError, first_few
from crate_ray.storage.interface import NotFound, Storage

logger = logging.getLogger(__name__)


class _Scan(NamedTuple):
    """What is to be done with one shard."""

    source: Storage
    """Where it is."""
    share: int
    """How many of its samples to measure."""


def index_existing(
    storage: Storage, *, shards: str = "*.tar", overwrite: bool = False, lease_seconds: float = 30.0
) -> Manifest:
    """Scan tar shards, whoever wrote them, and write index and manifest beside them or elsewhere.

    Args:
        storage: where index and manifest go, and where the shards are unless their address is given.
        shards: which files are shards: names (sub-folders included) with wildcards and braces, as for `find_shards`, or
            whole addresses of shards that are elsewhere and only read, 's3://bucket/cifar10/train-{00000..00049}.tar'.
        overwrite: replace an index that is there.
        lease_seconds: after how long without a sign of life another process that does the same is taken for dead.

    Raises:
        UserError: no shards, or a missing one; a manifest is there; a shard is damaged, compressed, or cannot be read
            in ranges; another process is at work there.
    """
    source, pattern = split_address(storage, shards)
    infos = list_shards(source, pattern)
    share, skip = max(1, MEASURED_SAMPLES // len(infos)), -(-len(infos) // MEASURED_SAMPLES)
    plan = Plan(
        title="indexing",
        digest=digest_of(["indexing", 2, source.uri, *((info.key, info.size, info.etag) for info in infos)]),
        names=[info.key for info in infos],
        packs=False,
        work=scan_shard,
        detail=lambda number: _Scan(source, share if number % skip == 0 else 0),
        samples=0,
        size=sum(info.size for info in infos),
        threads=THREADS,
    )

    def describe(counts: SampleCounts, measurement: Measurement, bad: list[str]) -> dict[str, object]:
        described = counts.describe(source.uri) | {"classes": known_classes(source)}
        if bad:
            logger.warning("%d of the measured samples cannot be decoded: %s", len(bad), first_few(bad))
        if not measurement.count:
            raise UserError(f"none of the measured samples under {source.uri} can be decoded: {first_few(bad)}")
        if described["kind"] == "grid" and len(measurement.channels) > 1:
            raise UserError(
                f"grids under {source.uri} have {' and '.join(map(str, measurement.channels))} channels; "
                "a dataset needs one number of channels"
            )
        if source.uri != storage.uri:
            described["shards_uri"] = source.uri
        return described | measurement.describe()

    return make_dataset(storage, plan, describe, overwrite=overwrite, lease_seconds=lease_seconds)


def scan_shard(task: ShardTask, report: Report) -> Finished:
    """Index one shard, measure a share of its samples, and write its record."""
    scan: _Scan = task.detail
    check_plan(task.storage, task.plan)
    counts, measurement = SampleCounts(), Measurement()
    bad: list[str] = []
    with open_shard(scan.source, task.name) as buffer:
        table, unsafe = read_table(buffer, f"{scan.source.uri}/{task.name}")
        counts.add_unsafe([f"{task.name}: {name}" for name in unsafe])
        for row in table:
            start, size = row.members.get("cls", (0, 0))
            counts.add(row.members, bytes(buffer[start : start + size]) if size else None, row.key)
            report(counts.samples, 0)
        measured: list[Measured] = []
        for number in sorted({i * len(table) // scan.share for i in range(scan.share)} if table else ()):
            row = table[number]
            suffix = image_suffix(row.members)
            if suffix is None:
                continue
            start, size = row.members[suffix]
            content = bytes(buffer[start : start + size])
            try:
                measured.append(measure_grid(content) if suffix == "npy" else measure_image(content)[1])
            except BadSample as error:
                bad.append(f"{task.name}/{row.key} ({error})")
            report(counts.samples, len(bad))
        for result in measured:
            measurement.add(result, weight=counts.samples / len(measured))
        row_of_shard, entries, members = index_shard(buffer, table)
    if members is not None:
        _write_table(task, task.name + TABLE_SUFFIX, members)
    return save_record(
        task.storage, task.number, row_of_shard, entries,
        plan=task.plan, name=task.name, counts=counts, measurement=measurement, bad=bad,
    )  # fmt: skip


def _write_table(task: ShardTask, key: str, members: bytes) -> None:
    """Write a table of members, unless it is there already."""
    check_plan(task.storage, task.plan)
    try:
        if task.storage.read(key) == members:
            return
    except NotFound:
        pass
    if task.replaces:  # the old index describes another table
        task.storage.delete(MANIFEST_NAME)
    task.storage.write(key, members)
