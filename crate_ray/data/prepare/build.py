"""The common part of packing and indexing: carries out a plan and writes the dataset.

Only one process at a time works on a dataset. Finished shards are not made again. If there is a manifest, it always
describes the existing files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from crate_ray.data.format.dataset import load_dataset, save_dataset
from crate_ray.data.format.index import SHARD_DTYPE
from crate_ray.data.format.manifest import MANIFEST_NAME, NAMES_NAME, TABLE_SUFFIX, DamagedDataset, Manifest
from crate_ray.data.format.source_names import SOURCE_NAMES_SUFFIX
from crate_ray.data.prepare.records import Finished, begin, load_records, remove, unfinished_plan
from crate_ray.data.prepare.sources import files_of_shards
from crate_ray.data.prepare.statistics import DatasetStatistics, SampleCounts
from crate_ray.data.prepare.tasks import Report, run_tasks, wants_cluster
from crate_ray.errors import UserError
from crate_ray.progress import CountDisplay
from crate_ray.storage.interface import Storage
from crate_ray.storage.lease import Lease

SHARD_PATTERN = "shard-{:06d}.tar"
LEASE_NAME = ".packing.lease"
_OUR_SHARD = re.compile(r"shard-\d{6,}\.tar")

Describe = Callable[[SampleCounts, DatasetStatistics, list[str]], dict[str, Any]]
"""Makes the manifest's fields from the counts, statistics and bad samples of all shards. Raises UserError if they are
not those of a valid dataset."""


class ShardTask(NamedTuple):
    """The work on one shard. It is sent to the thread or machine that does it."""

    storage: Storage
    """Storage of the new dataset."""
    plan: str
    """Digest of the plan."""
    number: int
    name: str
    """Key of the shard."""
    replaces: bool
    """Whether an older manifest may describe the file that this task replaces. If so, delete that manifest first."""
    detail: Any
    """Details of the plan for this shard."""


@dataclass(frozen=True)
class Plan:
    """All of the work, fixed before it begins."""

    title: str
    """'packing' or 'indexing', for the progress display."""
    digest: str
    """Digest of everything that determines the output."""
    names: Sequence[str]
    """Keys of the shards."""
    packs: bool
    """Whether shards are written; otherwise they are only read."""
    work: Callable[[ShardTask, Report], Finished]
    """Module-level function that does the work on one shard."""
    detail: Callable[[int], Any]
    """Returns the details that this function needs, by the shard's number."""
    describe: Describe
    note: Callable[[DatasetStatistics], str | None]
    """Makes a line for the user about the form of the samples."""
    samples: int
    """Number of samples to pack; 0 if unknown."""
    size: int
    """Approximate size of the shards in bytes."""
    threads: int
    """Number of shards that one process works on at a time."""


def build_dataset(storage: Storage, plan: Plan, *, overwrite: bool, lease_seconds: float) -> Manifest:
    """Carry out a plan, or the rest of it. Then write the index and, last, the manifest.

    Raises:
        UserError: there is a dataset, or an unfinished dataset of another plan (unless overwrite), or another process
            works on it.
    """
    refuse_existing(storage, plan, overwrite=overwrite)
    with (
        Lease(storage, LEASE_NAME, f"the dataset at {storage.uri}", lease_seconds=lease_seconds) as lease,
        CountDisplay(plan.title, plan.samples or len(plan.names)) as display,
    ):
        refuse_existing(storage, plan, overwrite=overwrite)
        has_manifest = storage.exists(MANIFEST_NAME)
        finished = _resume(storage, plan)
        if finished:
            display.say(
                f"{storage.uri}: {len(finished):,} of {len(plan.names):,} shards were finished by an earlier run; "
                "continuing"
            )
        if has_manifest:
            manifest = _complete(storage, plan, finished)
            if manifest is not None:  # the earlier run was stopped while it removed its records
                remove(storage)
                return manifest
            if not overwrite:
                raise _exists(storage, plan)

        skipped = sum(f.record.samples + len(f.record.bad) for f in finished.values())

        def show(good: int, bad: int) -> None:
            lease.check()
            display.update(skipped + good + bad if plan.samples else len(finished), good + bad, bad)

        left = [number for number in range(len(plan.names)) if number not in finished]
        tasks = _tasks(storage, plan, left, _described(storage, plan) if has_manifest else set())
        share = len(left) / len(plan.names)
        on_cluster = wants_cluster(len(left), round(plan.samples * share), round(plan.size * share))
        for order, result in run_tasks(plan.work, tasks, show, on_cluster=on_cluster, threads=plan.threads):
            finished[left[order]] = result
        good, bad = sum(f.record.samples for f in finished.values()), sum(len(f.record.bad) for f in finished.values())
        display.update(plan.samples or len(finished), good + bad - skipped, bad)
        shards = [finished[number] for number in range(len(plan.names))]
        return _conclude(storage, plan, shards, lease, display.say)


def refuse_existing(storage: Storage, plan: Plan, *, overwrite: bool) -> None:
    """Raise a UserError if the plan would replace something, unless overwrite."""
    unfinished = unfinished_plan(storage)
    if overwrite or unfinished == plan.digest:
        return
    if unfinished is not None:
        raise unfinished_error(storage)
    if storage.exists(MANIFEST_NAME):
        raise _exists(storage, plan)
    if plan.packs and next(_packed_shards(storage), None) is not None:
        raise UserError(
            f"there are shards without a manifest at {storage.uri} already; use another output, index them (without "
            "--source), or replace them with --overwrite true"
        )


def unfinished_error(storage: Storage) -> UserError:
    """The error for an unfinished dataset with other samples or settings."""
    return UserError(
        f"{storage.uri} holds an unfinished dataset with other samples or settings; finish it with the command that "
        "started it, use another output, or start over with --overwrite true"
    )


def _exists(storage: Storage, plan: Plan) -> UserError:
    if plan.packs:
        return UserError(
            f"there is a dataset at {storage.uri} already; use another output, or replace it with --overwrite true"
        )
    return UserError(f"{storage.uri} is indexed already; index it again with --overwrite true (shards do not change)")


def _tasks(storage: Storage, plan: Plan, numbers: Iterable[int], described: set[str] | None) -> Iterator[ShardTask]:
    """The tasks of some shards. An older manifest describes the shards in `described`; None means all."""
    for number in numbers:
        name = plan.names[number]
        replaces = described is None or name in described
        yield ShardTask(storage, plan.digest, number, name, replaces, plan.detail(number))


def _resume(storage: Storage, plan: Plan) -> dict[int, Finished]:
    """The finished shards of this plan. If there are none, record that the plan has begun."""
    if unfinished_plan(storage) != plan.digest:
        begin(storage, plan.digest)
        return {}
    finished = load_records(storage, plan.digest, plan.names)
    sizes = {info.key: info.size for info in storage.list()}
    return {
        number: shard
        for number, shard in sorted(finished.items())
        if (not plan.packs or not shard.record.samples or sizes.get(shard.record.name) == shard.record.bytes)
        and (not shard.record.table or shard.record.name + TABLE_SUFFIX in sizes)
        and (not plan.packs or not shard.record.samples or shard.record.name + SOURCE_NAMES_SUFFIX in sizes)
    }


def _complete(storage: Storage, plan: Plan, finished: dict[int, Finished]) -> Manifest | None:
    """The existing manifest, if the plan would make the same one."""
    if len(finished) < len(plan.names):
        return None
    try:
        dataset = load_dataset(storage)
    except DamagedDataset:
        return None
    rows = _rows(_stored(plan, [finished[number] for number in range(len(plan.names))]))
    return dataset.manifest if np.array_equal(dataset.shards, rows) else None


def _described(storage: Storage, plan: Plan) -> set[str] | None:
    """Names of the shards that the manifest describes; None, meaning all, if it cannot be read."""
    try:
        dataset = load_dataset(storage)
    except DamagedDataset:
        return None
    if plan.packs and dataset.manifest.shards_uri is not None:  # they are elsewhere
        return set()
    return {dataset.shard_name(shard) for shard in range(dataset.manifest.num_shards)}


def _conclude(
    storage: Storage, plan: Plan, finished: list[Finished], lease: Lease, say: Callable[[str], None]
) -> Manifest:
    """Remove the files of an older dataset, and save the new one."""
    counts, statistics = SampleCounts(), DatasetStatistics()
    bad: list[str] = []
    for shard in finished:
        counts.merge(shard.record.counts)
        statistics.merge(shard.record.measurement)
        bad += shard.record.bad
    try:
        described = plan.describe(counts, statistics, bad)
    except UserError:
        if not counts.samples:  # no shard was written or has samples, so there is nothing to resume
            remove(storage)
        raise
    if note := plan.note(statistics):
        say(f"{storage.uri}: {note}")
    stored = _stored(plan, finished)
    names = [shard.record.name for shard in stored]
    lease.check()
    storage.delete(MANIFEST_NAME)
    storage.delete(NAMES_NAME)
    if plan.packs:
        written = {*names, *(name + SOURCE_NAMES_SUFFIX for name in names)}
        for name in {*_packed_shards(storage), *_packed_shards(storage, SOURCE_NAMES_SUFFIX)}.difference(written):
            storage.delete(name)
    needed = {shard.record.name + TABLE_SUFFIX for shard in stored if shard.record.table}
    for name in set(files_of_shards((info.key for info in storage.list()), TABLE_SUFFIX)).difference(needed):
        storage.delete(name)
    manifest = save_dataset(storage, names, _rows(stored), [shard.entries for shard in stored], **described)
    remove(storage)
    return manifest


def _stored(plan: Plan, finished: list[Finished]) -> list[Finished]:
    """The shards that were written. Packing writes no shard if all of its samples are bad."""
    return [shard for shard in finished if shard.record.samples or not plan.packs]


def _rows(finished: Sequence[Finished]) -> np.ndarray[Any, np.dtype[np.void]]:
    return np.array([shard.row for shard in finished], SHARD_DTYPE)


def _packed_shards(storage: Storage, suffix: str = "") -> Iterator[str]:
    """Names of shards that were packed here; with a suffix, of the files that are named like them with this suffix."""
    names = (info.key for info in storage.list("shard-") if info.key.endswith(suffix))
    return (name for name in names if _OUR_SHARD.fullmatch(name.removesuffix(suffix)))
