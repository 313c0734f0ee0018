"""From a plan to a dataset: what packing and indexing have in common.

One process at a time; finished shards are not made again; and a manifest never describes other bytes than those there.
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
from crate_ray.data.prepare.records import Finished, begin, load_records, remove, unfinished_plan
from crate_ray.data.prepare.sources import tables
from crate_ray.data.prepare.statistics import Measurement, SampleCounts
from crate_ray.data.prepare.tasks import Report, run_tasks, wants_cluster
from crate_ray.errors import UserError
from crate_ray.progress import CountDisplay
from crate_ray.storage.interface import Storage
from crate_ray.storage.lease import Lease

SHARD_PATTERN = "shard-{:06d}.tar"
_OUR_SHARD = re.compile(r"shard-\d{6,}\.tar")
_LEASE = ".packing.lease"


class ShardTask(NamedTuple):
    """The work on one shard, as it is sent to where it is done."""

    storage: Storage
    """Where the dataset is made."""
    plan: str
    """Digest of the plan."""
    number: int
    name: str
    """Key of the shard."""
    replaces: bool
    """Whether an older manifest may describe what is replaced; it must be deleted first."""
    detail: Any
    """What the plan says of this shard."""


@dataclass(frozen=True)
class Plan:
    """All that is to be done, before anything is."""

    title: str
    """'packing' or 'indexing', for progress."""
    digest: str
    """Of all that decides what is written."""
    names: Sequence[str]
    """Keys of the shards."""
    packs: bool
    """The shards are written, rather than read."""
    work: Callable[[ShardTask, Report], Finished]
    """A module's function that does what is to be done for one shard."""
    detail: Callable[[int], Any]
    """What it needs to know, by the shard's number."""
    samples: int
    """Samples to pack; 0 if not known."""
    size: int
    """Bytes of the shards, about."""
    threads: int
    """Shards that are worked on at a time by one process."""


Describe = Callable[[SampleCounts, Measurement, list[str]], dict[str, Any]]
"""Fields of the manifest, from what all shards have and their bad samples. Raises UserError if that is no dataset."""


def make_dataset(
    storage: Storage, plan: Plan, describe: Describe, *, overwrite: bool, lease_seconds: float
) -> Manifest:
    """Carry out a plan, or what is left of it, and write index and, last, manifest.

    Raises:
        UserError: there is a dataset or another unfinished plan (unless overwrite); another process is at work there.
    """
    _refuse(storage, plan, overwrite=overwrite)
    what = f"the dataset at {storage.uri}"
    with (
        Lease(storage, _LEASE, what, lease_seconds=lease_seconds) as lease,
        CountDisplay(plan.title, plan.samples or len(plan.names)) as display,
    ):
        _refuse(storage, plan, overwrite=overwrite)
        has_manifest = storage.exists(MANIFEST_NAME)
        finished = _resume(storage, plan)
        if finished:
            done = f"{len(finished):,} of {len(plan.names):,} shards"
            display.say(f"{storage.uri}: {done} were finished by an earlier run; going on with the rest")
        if has_manifest:
            manifest = _complete(storage, plan, finished)
            if manifest is not None:  # only the records were left to be removed
                remove(storage)
                return manifest
            if not overwrite:
                raise _taken(storage, plan)

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
        return _conclude(storage, plan, [finished[number] for number in range(len(plan.names))], describe, lease)


def _tasks(storage: Storage, plan: Plan, numbers: Iterable[int], described: set[str] | None) -> Iterator[ShardTask]:
    """The tasks of some shards; described are the shards of an older manifest, None for all."""
    for number in numbers:
        name = plan.names[number]
        replaces = described is None or name in described
        yield ShardTask(storage, plan.digest, number, name, replaces, plan.detail(number))


def _refuse(storage: Storage, plan: Plan, *, overwrite: bool) -> None:
    """Raise a UserError where something is that may not be overwritten."""
    unfinished = unfinished_plan(storage)
    if overwrite or unfinished == plan.digest:
        return
    if unfinished is not None:
        raise UserError(
            f"at {storage.uri} is a dataset that was not finished, of other samples or with other settings; finish it "
            "by the command that began it, use another output, or --overwrite true to begin anew"
        )
    if storage.exists(MANIFEST_NAME):
        raise _taken(storage, plan)
    if plan.packs and next(_packed_shards(storage), None) is not None:
        raise UserError(
            f"there are shards without a manifest at {storage.uri} already; use another output, index them (without "
            "--source), or --overwrite true to replace them"
        )


def _taken(storage: Storage, plan: Plan) -> UserError:
    if plan.packs:
        return UserError(
            f"there is a dataset at {storage.uri} already; use another output, or --overwrite true to replace it"
        )
    return UserError(f"{storage.uri} is indexed already; --overwrite true indexes it again")


def _resume(storage: Storage, plan: Plan) -> dict[int, Finished]:
    """What is finished already, of this plan; else begin it."""
    if unfinished_plan(storage) != plan.digest:
        begin(storage, plan.digest)
        return {}
    finished = load_records(storage, plan.digest)
    sizes = {info.key: info.size for info in storage.list()}
    return {
        number: shard
        for number, shard in sorted(finished.items())
        if (not plan.packs or not shard.record.samples or sizes.get(shard.record.name) == shard.record.bytes)
        and (not shard.record.table or shard.record.name + TABLE_SUFFIX in sizes)
    }


def _complete(storage: Storage, plan: Plan, finished: dict[int, Finished]) -> Manifest | None:
    """The manifest that is there, if it is the one that the plan makes."""
    if len(finished) < len(plan.names):
        return None
    try:
        dataset = load_dataset(storage)
    except DamagedDataset:
        return None
    rows = _rows(_kept(plan, [finished[number] for number in range(len(plan.names))]))
    return dataset.manifest if np.array_equal(dataset.shards, rows) else None


def _described(storage: Storage, plan: Plan) -> set[str] | None:
    """Names of the shards that the manifest describes; None, for all, if it cannot be read."""
    try:
        dataset = load_dataset(storage)
    except DamagedDataset:
        return None
    if plan.packs and dataset.manifest.shards_uri is not None:  # they are elsewhere
        return set()
    return {dataset.shard_name(shard) for shard in range(dataset.manifest.num_shards)}


def _conclude(storage: Storage, plan: Plan, finished: list[Finished], describe: Describe, lease: Lease) -> Manifest:
    """Describe the dataset, remove what was there before, and save it."""
    counts, measurement = SampleCounts(), Measurement()
    bad: list[str] = []
    for shard in finished:
        counts.merge(shard.record.counts)
        measurement.merge(shard.record.measurement)
        bad += shard.record.bad
    try:
        described = describe(counts, measurement, bad)
    except UserError:
        if plan.packs and not counts.samples:  # nothing was written that an earlier run's records could be about
            remove(storage)
        raise
    kept = _kept(plan, finished)
    names = [shard.record.name for shard in kept]
    lease.check()
    storage.delete(MANIFEST_NAME)
    storage.delete(NAMES_NAME)
    if plan.packs:
        for name in set(_packed_shards(storage)).difference(names):
            storage.delete(name)
    needed = {shard.record.name + TABLE_SUFFIX for shard in kept if shard.record.table}
    for name in set(tables(info.key for info in storage.list())).difference(needed):
        storage.delete(name)
    manifest = save_dataset(storage, names, _rows(kept), [shard.entries for shard in kept], **described)
    remove(storage)
    return manifest


def _kept(plan: Plan, finished: list[Finished]) -> list[Finished]:
    """The shards that the dataset has: none that would have been packed of bad samples only."""
    return [shard for shard in finished if shard.record.samples or not plan.packs]


def _rows(finished: Sequence[Finished]) -> np.ndarray[Any, np.dtype[np.void]]:
    return np.array([shard.row for shard in finished], SHARD_DTYPE)


def _packed_shards(storage: Storage) -> Iterator[str]:
    """Names of shards that were packed here."""
    return (info.key for info in storage.list("shard-") if _OUR_SHARD.fullmatch(info.key))
