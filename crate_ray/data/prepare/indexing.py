"""Indexes existing shards of any origin. Each shard is scanned once; nothing is copied or changed."""

from __future__ import annotations

import logging
from typing import NamedTuple

from crate_ray.data.format.dataset import check_shard_names
from crate_ray.data.format.index import index_shard
from crate_ray.data.format.manifest import MANIFEST_NAME, TABLE_SUFFIX, Manifest
from crate_ray.data.format.samples import class_number, read_table
from crate_ray.data.prepare.build import Plan, ShardTask, build_dataset
from crate_ray.data.prepare.records import Finished, check_plan, digest_of, save_record
from crate_ray.data.prepare.sources import THREADS, known_classes, list_shards, open_shard, split_address
from crate_ray.data.prepare.statistics import (
    STATISTICS_SAMPLES,
    BadSample,
    DatasetStatistics,
    SampleCounts,
    SampleStatistics,
    bad_sample,
    checked_size,
    grid_statistics,
    image_statistics,
    image_suffix,
)
from crate_ray.data.prepare.tasks import Report
from crate_ray.data.read.content import NO_LABEL
from crate_ray.errors import UserError, first_few
from crate_ray.storage.interface import NotFound, Storage

logger = logging.getLogger(__name__)

_MAX_LISTED = 1000


class _Scan(NamedTuple):
    """Details of the work on one shard."""

    source: Storage
    """Where it is."""
    share: int
    """Number of its samples to decode for the statistics."""


def index_existing(
    storage: Storage, *, shards: str = "*.tar", overwrite: bool = False, lease_seconds: float = 30.0
) -> Manifest:
    """Scan tar shards of any origin, and write index and manifest next to them or to another place.

    Args:
        storage: where index and manifest go. The shards are there too, unless their address is given.
        shards: the shards' names (sub-folders included) with wildcards and braces, as for `find_shards`; or whole
            addresses of shards elsewhere, which are only read: 's3://bucket/cifar10/train-{00000..00049}.tar'.
        overwrite: replace an existing index.
        lease_seconds: time without a heartbeat after which another process with the same task counts as dead.

    Raises:
        UserError: there are no shards or one is missing; there is a manifest already; a shard is damaged or compressed;
            another process works on the dataset.
    """
    source, pattern = split_address(storage, shards)
    infos = list_shards(source, pattern)
    check_shard_names((info.key for info in infos), source.uri)
    share, skip = max(1, STATISTICS_SAMPLES // len(infos)), -(-len(infos) // STATISTICS_SAMPLES)

    def describe(counts: SampleCounts, statistics: DatasetStatistics, bad: list[str]) -> dict[str, object]:
        described = counts.describe(source.uri) | {"classes": known_classes(source)}
        if bad:
            logger.warning(
                "%d samples, of all classes and some images that were checked, are unusable: %s",
                len(bad),
                first_few(bad),
            )
        if not statistics.count:
            raise UserError(f"none of the samples under {source.uri} that were tried can be decoded: {first_few(bad)}")
        if described["kind"] == "grid" and len(statistics.channels) > 1:
            raise UserError(
                f"grids under {source.uri} have {' and '.join(map(str, statistics.channels))} channels; all grids of a "
                "dataset need the same number of channels"
            )
        if source.uri != storage.uri:
            described["shards_uri"] = source.uri
        return described | statistics.describe()

    plan = Plan(
        title="indexing",
        digest=digest_of(["indexing", 3, source.uri, *((info.key, info.size, info.etag) for info in infos)]),
        names=[info.key for info in infos],
        packs=False,
        work=scan_shard,
        detail=lambda number: _Scan(source, share if number % skip == 0 else 0),
        describe=describe,
        samples=0,
        size=sum(info.size for info in infos),
        threads=THREADS,
    )
    return build_dataset(storage, plan, overwrite=overwrite, lease_seconds=lease_seconds)


def scan_shard(task: ShardTask, report: Report) -> Finished:
    """Index one shard, decode some of its samples for the statistics, and write its record."""
    scan: _Scan = task.detail
    check_plan(task.storage, task.plan)
    counts, statistics = SampleCounts(), DatasetStatistics()
    bad: list[str] = []
    with open_shard(scan.source, task.name) as buffer:
        table, unsafe = read_table(buffer, f"{scan.source.uri}/{task.name}")
        counts.add_unsafe([f"{task.name}: {name}" for name in unsafe])
        for row in table:
            start, size = row.members.get("cls", (0, 0))
            try:
                label = class_number(memoryview(buffer)[start : start + size])
            except ValueError as error:
                label = NO_LABEL
                if len(bad) < _MAX_LISTED:
                    bad.append(bad_sample(f"{task.name}/{row.key}", error))
            counts.add(row.members, label, row.key)
            report(counts.samples, 0)
        decoded: list[SampleStatistics] = []
        for number in sorted({i * len(table) // scan.share for i in range(scan.share)} if table else ()):
            row = table[number]
            suffix = image_suffix(row.members)
            if suffix is None:
                continue
            start, size = row.members[suffix]
            try:
                content = bytes(buffer[start : start + checked_size(size)])
                decoded.append(grid_statistics(content) if suffix == "npy" else image_statistics(content)[1])
            except BadSample as error:
                bad.append(bad_sample(f"{task.name}/{row.key}", error))
            report(counts.samples, len(bad))
        for sample in decoded:
            statistics.add(sample, weight=counts.samples / len(decoded))
        row_of_shard, entries, members = index_shard(buffer, table)
    if members is not None:
        _write_table(task, task.name + TABLE_SUFFIX, members)
    return save_record(
        task.storage, task.number, row_of_shard, entries,
        plan=task.plan, name=task.name, counts=counts, measurement=statistics, bad=bad,
    )  # fmt: skip


def _write_table(task: ShardTask, key: str, members: bytes) -> None:
    """Write a table of members, unless it exists."""
    check_plan(task.storage, task.plan)
    try:
        if task.storage.read(key) == members:
            return
    except NotFound:
        pass
    if task.replaces:  # the old index describes another table
        task.storage.delete(MANIFEST_NAME)
    task.storage.write(key, members)
