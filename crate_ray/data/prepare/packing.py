"""Making datasets: pack images or grids into plain USTAR shards, over a cluster, smaller than they were if wished.

The same input, seed and settings give the same bytes, on however many machines. Every sample is decoded once here, so
that training meets no broken one.
"""

from __future__ import annotations

import io
import logging
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crate_ray.config import PrepareConfig
from crate_ray.data.decode.samples import DecodeError, read_image_header
from crate_ray.data.format.index import INDEX_STRIDE, index_shard
from crate_ray.data.format.manifest import MANIFEST_NAME, Manifest
from crate_ray.data.format.samples import read_table
from crate_ray.data.prepare.build import SHARD_PATTERN, Plan, ShardTask, make_dataset
from crate_ray.data.prepare.records import Finished, check_plan, digest_of, save_record
from crate_ray.data.prepare.shrink import shrink_image, shrink_mask
from crate_ray.data.prepare.sources import Item, Source, in_order, map_file, size_in_tar
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
from crate_ray.storage.interface import Storage

logger = logging.getLogger(__name__)

_FORMAT_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_SHRUNK_TO_MEASURE = 64
_SHARDS_AT_A_TIME = 2  # so that one is hashed and uploaded while another is filled


class Shrinking(NamedTuple):
    """How pictures are made smaller."""

    max_side: int
    """Largest shortest side in pixels."""
    quality: int
    """Of JPEG and WebP."""


class _Part(NamedTuple):
    """What is to be packed into one shard."""

    first: int
    """Number of its first sample in the packing order."""
    items: Sequence[Item]
    digits: int
    """Of keys."""
    stride: int
    """Every so many samples, one is measured."""
    channels: int | None
    """That all grids have; None for images."""
    shrinking: Shrinking | None


def pack(source: Source, storage: Storage, config: PrepareConfig) -> Manifest:
    """Write the samples of a source into shards, then index and manifest; or what an earlier run left of that.

    Keys are positions in the packing order, so that a sample that cannot be decoded, which is left out and reported,
    leaves a gap. Members are stored as they are, but for pictures that config.max_side makes smaller.

    Raises:
        UserError: there is a dataset already (unless config.overwrite), another process packs there, or no sample can
            be decoded.
    """
    items = list(source.items)
    if not items:
        raise UserError("there is no sample to pack; a built-in set needs a larger num_samples for this split")
    if config.shuffle:  # by raw random numbers, whose stream numpy keeps the same for ever
        order = np.argsort(np.random.Philox(key=config.seed % 2**64).random_raw(len(items)), kind="stable")
        items = [items[i] for i in order]
    shrinking = None if config.max_side is None else Shrinking(config.max_side, config.quality)
    channels = _channels_of_grids(items)
    if channels is not None and shrinking is not None:
        raise _grids_are_not_shrunk(items[0].name)
    edges = _shard_edges(items, config, shrinking)
    digits, stride = max(6, len(str(len(items) - 1))), -(-len(items) // MEASURED_SAMPLES)
    settings = ["packing", 1, shrinking, channels, source.classes, edges]
    plan = Plan(
        title="packing",
        digest=digest_of([*settings, *((item.name, item.size, item.version) for item in items)]),
        names=[SHARD_PATTERN.format(number) for number in range(len(edges) - 1)],
        packs=True,
        work=pack_shard,
        detail=lambda number: _Part(
            edges[number], items[edges[number] : edges[number + 1]], digits, stride, channels, shrinking
        ),
        samples=len(items),
        size=sum(item.size for item in items),
        threads=_SHARDS_AT_A_TIME,
    )

    def describe(counts: SampleCounts, measurement: Measurement, bad: list[str]) -> dict[str, object]:
        if bad:
            logger.warning(
                "%d of %d samples cannot be decoded and are left out: %s", len(bad), len(items), first_few(bad)
            )
        if not counts.samples or not measurement.count:
            raise UserError(f"none of the {len(items)} samples can be packed: {first_few(bad)}")
        counts.add_unsafe(source.unsafe_names)
        return counts.describe(storage.uri) | measurement.describe() | {"classes": source.classes}

    return make_dataset(storage, plan, describe, overwrite=config.overwrite, lease_seconds=config.lease_seconds)


# --- The plan -------------------------------------------------------------------------------------------------------


def _shard_edges(items: Sequence[Item], config: PrepareConfig, shrinking: Shrinking | None) -> list[int]:
    """Where the shards begin in the packing order, and the number of samples: a plan by what is known beforehand.

    A shard that is full of bytes is closed at a multiple of 16 samples, if it holds as many: blocks of the training's
    order then begin at entries of the index, and nothing beside them is read.
    """
    ratio = 1.0
    if shrinking is not None and sum(item.size for item in items) > config.shard_bytes:
        ratio = _shrinking_ratio(items, shrinking)
    edges, size = [0], 0.0
    for number, item in enumerate(items):
        while (samples := number - edges[-1]) and (samples >= config.shard_samples or size >= config.shard_bytes):
            left = samples % INDEX_STRIDE if INDEX_STRIDE <= samples < config.shard_samples else 0
            edges.append(number - left)
            size = sum(item.size for item in items[edges[-1] : number]) * ratio
        size += item.size * ratio
    return [*edges, len(items)]


def _shrinking_ratio(items: Sequence[Item], shrinking: Shrinking) -> float:
    """Size of the samples after shrinking by their size before, from some that are spread evenly."""

    def measure(item: Item) -> tuple[int, int]:
        try:
            before = item.load()
            after, _ = _checked(before, shrinking, measure=False)
        except BadSample:
            return 0, 0
        return size_in_tar(*map(len, before.values())), size_in_tar(*map(len, after.values()))

    count = min(len(items), _SHRUNK_TO_MEASURE)
    sizes = list(in_order(measure, (items[i * len(items) // count] for i in range(count))))
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    return after / before if before else 1.0


def _channels_of_grids(items: Sequence[Item]) -> int | None:
    """Channels of the first good sample if it is a grid, which all grids must have; None for images."""
    for item in items:
        members = {suffix.lower(): content for suffix, content in item.load().items()}
        suffix = image_suffix(members)
        if suffix is None:
            continue
        if suffix != "npy":
            return None
        try:
            return measure_grid(members["npy"], measure=False).channels
        except BadSample:
            continue
    return None


def _grids_are_not_shrunk(name: str) -> UserError:
    return UserError(f"max_side is for images, but {name} is a .npy grid; leave it out, or shrink the grids yourself")


# --- The work -------------------------------------------------------------------------------------------------------


def pack_shard(task: ShardTask, report: Report) -> Finished:
    """Write one shard and its record."""
    part: _Part = task.detail
    check_plan(task.storage, task.plan)
    counts, measurement = SampleCounts(), Measurement()
    bad: list[str] = []

    def load(numbered: tuple[int, Item]) -> tuple[dict[str, bytes], Measured] | str:
        number, item = numbered
        try:
            members, measured = _checked(item.load(), part.shrinking, measure=number % part.stride == 0)
        except BadSample as error:
            return f"{item.name} ({error})"
        if "npy" in members and part.channels not in (None, measured.channels):
            return f"{item.name} ({measured.channels} channels where others have {part.channels})"
        return members, measured

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, loaded in enumerate(in_order(load, enumerate(part.items, part.first)), part.first):
                if isinstance(loaded, str):
                    bad.append(loaded)
                else:
                    members, measured = loaded
                    _add(tar, f"{number:0{part.digits}d}", members)
                    counts.add(members, members.get("cls"))
                    measurement.add(measured)
                report(counts.samples, len(bad))
        with map_file(path) as buffer:
            table = read_table(buffer, task.name).rows
            assert len(table) == counts.samples
            row, entries, _ = index_shard(buffer, table)
        if counts.samples:
            check_plan(task.storage, task.plan)
            if task.replaces:  # from here on the old dataset is no longer whole
                task.storage.delete(MANIFEST_NAME)
            task.storage.write(task.name, path)
    return save_record(
        task.storage, task.number, row, entries,
        plan=task.plan, name=task.name, counts=counts, measurement=measurement, bad=bad,
    )  # fmt: skip


def _add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Append a sample: names and contents, nothing else."""
    for suffix, content in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _checked(
    members: dict[str, bytes], shrinking: Shrinking | None, *, measure: bool
) -> tuple[dict[str, bytes], Measured]:
    """Decode a sample once. Its members as they are stored, and what was measured of them.

    Images get the suffix of their format.

    Raises:
        BadSample: it cannot be decoded.
    """
    members = {suffix.lower(): content for suffix, content in members.items()}
    suffix = image_suffix(members)
    if suffix is None:
        raise BadSample("no image or grid among " + ", ".join(sorted(members)))
    if suffix == "npy":
        if shrinking is not None:
            raise _grids_are_not_shrunk("one of the samples")
        return members, measure_grid(members["npy"], measure=measure)
    content = members[suffix]
    mask = members.get("mask.png")
    if mask is not None:
        _check_mask(mask, content)
    shrunk = None if shrinking is None else shrink_image(content, *shrinking)
    if shrinking is None or shrunk is None:
        image, result = measure_image(content, measure=measure, reduce=False)
        kind = image.format or "JPEG"
    else:
        members[suffix], kind = shrunk.content, shrunk.kind
        result = Measured(shrunk.channels, shrunk.size, None, None)
        if measure:
            _, result = measure_image(shrunk.content, reduce=False)
        if mask is not None:
            members["mask.png"] = shrink_mask(mask, shrinking.max_side)
    if _FORMAT_SUFFIX[kind] not in members:
        members[_FORMAT_SUFFIX[kind]] = members.pop(suffix)
    return members, result


def _check_mask(mask: bytes, content: bytes) -> None:
    """Decode the mask of an encoded image, whose size it must have. Raises BadSample."""
    try:
        size = read_image_header(content)[:2]
    except DecodeError as error:
        raise BadSample(str(error)) from None
    _, found = measure_image(mask, measure=False, reduce=False)
    if found.size != size:
        raise BadSample(f"mask of {found.size[1]}×{found.size[0]} pixels for an image of {size[1]}×{size[0]}")
