"""Indexes existing shards of any origin. Each shard is scanned once; nothing is copied or changed."""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

from crate_ray.config.identifiers import check_address
from crate_ray.data.decode.arrays import looks_like_hwc
from crate_ray.data.decode.errors import MAX_PIXELS
from crate_ray.data.format.dataset import check_shard_names
from crate_ray.data.format.index import index_shard
from crate_ray.data.format.manifest import MANIFEST_NAME, TABLE_SUFFIX, Manifest
from crate_ray.data.format.samples import TableRow, class_number, read_table
from crate_ray.data.format.source_names import read_source_names
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
    is_grid,
)
from crate_ray.data.prepare.tasks import Report
from crate_ray.data.read.content import NO_LABEL
from crate_ray.errors import UserError, first_few
from crate_ray.storage.interface import NotFound, Storage

logger = logging.getLogger(__name__)

_MAX_LISTED = 1000
_LABEL_BYTES = 100


class _Scan(NamedTuple):
    """Details of the work on one shard."""

    source: Storage
    """Where it is."""
    share: int
    """Number of its samples to decode for the statistics."""
    image: str | None
    """Which member holds the image or grid, if samples have several."""
    max_pixels: int
    """Larger images are bad samples."""


def index_existing(
    storage: Storage,
    *,
    shards: str = "*.tar",
    image: str | None = None,
    max_pixels: int = MAX_PIXELS,
    grid_axes: Literal["auto", "CHW", "HWC"] = "auto",
    overwrite: bool = False,
    lease_seconds: float = 30.0,
) -> Manifest:
    """Scan tar shards of any origin, and write index and manifest next to them or to another place.

    Samples without an image or grid are left out, with a warning.

    Args:
        storage: where index and manifest go. The shards are there too, unless their address is given.
        shards: the shards' names (sub-folders included) with wildcards and braces, as for `find_shards`; or whole
            addresses of shards elsewhere, which are only read: 's3://bucket/cifar10/train-{00000..00049}.tar'.
        image: which member holds the image or grid, if samples have several (`image_suffix`).
        max_pixels: larger images are bad samples.
        grid_axes: order of the axes of grids. Only CHW can be indexed; auto refuses what looks like HWC.
        overwrite: replace an existing index.
        lease_seconds: time without a heartbeat after which another process with the same task counts as dead.

    Raises:
        UserError: there are no shards or one is missing; there is a manifest already; a shard is damaged or compressed;
            grids are HWC; another process works on the dataset.
    """
    source, pattern = split_address(storage, shards)
    infos = list_shards(source, pattern)
    check_shard_names((info.key for info in infos), source.uri)
    try:
        check_address(source.uri)
    except ValueError as error:
        if source.uri != storage.uri:
            raise UserError(f"the folder of the shards, {error}; rename it") from None
    if empty := [info.key for info in infos if not info.size]:
        logger.warning(
            "%d of %d shards have 0 bytes, so they may not be complete: %s", len(empty), len(infos), first_few(empty)
        )
    share, skip = max(1, STATISTICS_SAMPLES // len(infos)), -(-len(infos) // STATISTICS_SAMPLES)

    def describe(counts: SampleCounts, statistics: DatasetStatistics, bad: list[str]) -> dict[str, object]:
        statistics.warn(source.uri)
        described = counts.describe(source.uri, image) | {"classes": known_classes(source)}
        if bad:
            logger.warning(
                "%d samples, of all classes and some images that were checked, are unusable: %s",
                len(bad),
                first_few(bad),
            )
        if not statistics.count:
            raise UserError(f"none of the samples under {source.uri} that were tried can be decoded: {first_few(bad)}")
        if described["kind"] == "grid":
            _check_axes(statistics, source.uri, grid_axes)
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
        digest=digest_of(["indexing", 4, image, source.uri, *((info.key, info.size, info.etag) for info in infos)]),
        names=[info.key for info in infos],
        packs=False,
        work=scan_shard,
        detail=lambda number: _Scan(source, share if number % skip == 0 else 0, image, max_pixels),
        describe=describe,
        note=lambda statistics: statistics.form((statistics.channels[0], *statistics.sizes[0]), "CHW"),
        samples=0,
        size=sum(info.size for info in infos),
        threads=THREADS,
    )
    return build_dataset(storage, plan, overwrite=overwrite, lease_seconds=lease_seconds)


def _check_axes(statistics: DatasetStatistics, uri: str, axes: Literal["auto", "CHW", "HWC"]) -> None:
    """Raise UserError if grids are, or seem to be, (height, width, channels). Training would take them as channels
    first."""
    shape = (statistics.channels[0], *statistics.sizes[0])
    if axes == "HWC" or (axes == "auto" and looks_like_hwc(shape)):
        raise UserError(
            f"grids under {uri}, such as one of shape {shape}, seem to be (height, width, channels), which cannot be "
            "indexed in place: pack them with --source, which stores them as (channels, height, width), or set "
            "--grid_axes CHW if they are"
        )


def scan_shard(task: ShardTask, report: Report) -> Finished:
    """Index one shard, decode some of its samples for the statistics, and write its record."""
    scan: _Scan = task.detail
    check_plan(task.storage, task.plan)
    counts, statistics = SampleCounts(), DatasetStatistics()
    bad: list[str] = []
    with open_shard(scan.source, task.name) as buffer:
        rows, unsafe = read_table(buffer, f"{scan.source.uri}/{task.name}")
        counts.add_unsafe([f"{task.name}: {name}" for name in unsafe])
        table: list[TableRow] = []
        for row in rows:
            image = image_suffix(row.members, scan.image)
            if image is None:
                counts.leave_out(row.members, f"{task.name}/{row.key}")
                continue
            table.append(row)
            start, size = row.members.get("cls", (0, 0))
            try:
                label = class_number(memoryview(buffer)[start : start + size])
            except ValueError as error:
                label = NO_LABEL
                if len(bad) < _MAX_LISTED:
                    bad.append(bad_sample(f"{task.name}/{row.key}", error))
            counts.add(row.members, label, image)
            if label is None:
                content = bytes(buffer[start : start + min(size, _LABEL_BYTES)]) if "cls" in row.members else None
                counts.add_unlabelled(f"{task.name}/{row.key}", content)
            report(counts.samples, 0)
        decoded: list[tuple[str, SampleStatistics]] = []
        for number in sorted({i * len(table) // scan.share for i in range(scan.share)} if table else ()):
            row = table[number]
            suffix = image_suffix(row.members, scan.image)
            assert suffix is not None
            start, size = row.members[suffix]
            try:
                content = bytes(buffer[start : start + checked_size(size)])
                if is_grid(suffix):
                    sample = grid_statistics(content, max_pixels=scan.max_pixels)
                else:
                    sample = image_statistics(content, max_pixels=scan.max_pixels)[1]
                decoded.append((f"{task.name}/{row.key}", sample))
            except BadSample as error:
                bad.append(bad_sample(f"{task.name}/{row.key}", error))
            report(counts.samples, len(bad))
        for name, sample in decoded:
            statistics.add(sample, weight=counts.samples / len(decoded), name=name)
        row_of_shard, entries, members = index_shard(buffer, table, whole=len(table) == len(rows))
    if _has_source_names(scan.source, task.name, row_of_shard, len(table)):
        counts.named = counts.samples
    if members is not None:
        _write_table(task, task.name + TABLE_SUFFIX, members)
    return save_record(
        task.storage, task.number, row_of_shard, entries,
        plan=task.plan, name=task.name, counts=counts, measurement=statistics, bad=bad,
    )  # fmt: skip


def _has_source_names(source: Storage, shard: str, row: tuple[Any, ...], samples: int) -> bool:
    """Whether a list beside the shard has the source names of its samples, because it was packed."""
    try:
        return len(read_source_names(source, shard, bytes(bytearray(row[3])).hex())) == samples
    except (UserError, ValueError):
        return False


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
