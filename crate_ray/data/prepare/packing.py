"""Pack images or grids into plain ustar shards, optionally re-encoding large images at a smaller size.

The same input, seed and settings give the same bytes on any number of machines. Every sample is decoded once. Samples
that cannot be decoded are skipped, so the dataset holds only good ones.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from crate_ray.config import PrepareConfig
from crate_ray.data.decode.arrays import channels_first, grid_shape, looks_like_hwc
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.samples import read_image_header
from crate_ray.data.format.index import INDEX_STRIDE, index_shard
from crate_ray.data.format.manifest import MANIFEST_NAME, Manifest
from crate_ray.data.format.samples import class_number, read_table
from crate_ray.data.format.source_names import SOURCE_NAMES_SUFFIX, source_names_content
from crate_ray.data.prepare.build import SHARD_PATTERN, Plan, ShardTask, build_dataset
from crate_ray.data.prepare.records import Finished, check_plan, digest_of, save_record
from crate_ray.data.prepare.shrink import shrink_image, shrink_mask
from crate_ray.data.prepare.sources import Item, Source, in_order, map_file, size_in_tar
from crate_ray.data.prepare.statistics import (
    STATISTICS_SAMPLES,
    BadSample,
    DatasetStatistics,
    SampleCounts,
    SampleStatistics,
    UnreadableSample,
    bad_sample,
    grid_statistics,
    image_members,
    image_statistics,
    image_suffix,
    is_grid,
)
from crate_ray.data.prepare.tasks import Report
from crate_ray.errors import UserError, first_few
from crate_ray.storage.interface import Storage

if TYPE_CHECKING:
    import webdataset

logger = logging.getLogger(__name__)

_FORMAT_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_SHRUNK_FOR_RATIO = 64  # samples
_FEW_UNREADABLE = 16  # samples of a shard
_CONCURRENT_SHARDS = 2  # one is hashed and uploaded while another is filled


class Shrinking(NamedTuple):
    """How large images are re-encoded."""

    max_side: int
    """Largest shortest side in pixels."""
    quality: int
    """Quality of JPEGs and WebPs."""


class _Form(NamedTuple):
    """The form of the samples."""

    max_pixels: int
    """Larger images are bad samples."""
    channels: int | None = None
    """Channels that all grids must have; None for images."""
    axes: Literal["CHW", "HWC"] = "CHW"
    """Order of the axes of grids. HWC grids are stored as CHW."""


class _Part(NamedTuple):
    """The content of one shard."""

    first: int
    """Position of its first sample in the packing order."""
    items: Sequence[Item]
    digits: int
    """Length of a key."""
    stride: int
    """The statistics of every stride-th sample are computed."""
    form: _Form
    shrinking: Shrinking | None
    image: str | None
    """Which member holds the image, if samples have several (`image_suffix`)."""


def pack(source: Source, storage: Storage, config: PrepareConfig) -> Manifest:
    """Write the samples of a source as shards, then index and manifest. Continues an interrupted packing.

    Keys are positions in the packing order. A sample that cannot be decoded is skipped with a warning and leaves a gap
    in the keys. Members are stored unchanged, except images that exceed config.max_side.

    Raises:
        UserError: there is a dataset already (unless config.overwrite), another process packs there, or no sample can
            be decoded.
    """
    plan = plan_packing(source, storage.uri, config)
    return build_dataset(storage, plan, overwrite=config.overwrite, lease_seconds=config.lease_seconds)


def plan_packing(source: Source, uri: str, config: PrepareConfig, title: str = "packing") -> Plan:
    """The plan of a packing.

    Args:
        source: the samples.
        uri: where they go, for messages.
        config: shard sizes, order and re-encoding.
        title: name of the progress display.

    Raises:
        UserError: there are no samples, or grids are to be shrunk.
    """
    items = list(source.items)
    if not items:
        raise UserError("there are no samples to pack; for a built-in set, increase num_samples for this split")
    if config.shuffle:  # sort by raw random numbers, which are the same in all versions of NumPy
        order = np.argsort(np.random.Philox(key=config.seed % 2**64).random_raw(len(items)), kind="stable")
        items = [items[i] for i in order]
    shrinking = None if config.max_side is None else Shrinking(config.max_side, config.quality)
    form, shape = _form_of(items, config)
    if form.channels is not None and shrinking is not None:
        raise _grids_are_not_shrunk(items[0].name)
    edges = _shard_edges(items, config, form, shrinking)
    digits, stride = max(6, len(str(len(items) - 1))), -(-len(items) // STATISTICS_SAMPLES)

    def describe(counts: SampleCounts, statistics: DatasetStatistics, bad: list[str]) -> dict[str, object]:
        if bad:
            logger.warning("%d of %d samples cannot be decoded, skipped: %s", len(bad), len(items), first_few(bad))
        if not counts.samples or not statistics.count:
            raise UserError(f"none of the {len(items)} samples can be packed: {first_few(bad)}")
        counts.add_unsafe(source.unsafe_names)
        statistics.warn(uri)
        described = counts.describe(uri, config.image) | statistics.describe() | {"classes": source.classes}
        if (
            described["num_classes"] is not None and source.classes is not None
        ):  # the last class may have no good sample
            described["num_classes"] = max(described["num_classes"], len(source.classes))
        return described

    settings = ["packing", 2, shrinking, form.channels, source.classes, edges]
    if form.axes != "CHW":
        settings.append(form.axes)
    if config.max_pixels is not None:
        settings.append(config.max_pixels)
    if config.image is not None:
        settings.append(config.image)
    return Plan(
        title=title,
        digest=digest_of([*settings, *((item.name, item.size, item.version) for item in items)]),
        names=[SHARD_PATTERN.format(number) for number in range(len(edges) - 1)],
        packs=True,
        work=pack_shard,
        detail=lambda number: _Part(
            edges[number], items[edges[number] : edges[number + 1]], digits, stride, form, shrinking, config.image
        ),
        describe=describe,
        note=lambda statistics: statistics.form(shape, form.axes),
        samples=len(items),
        size=sum(item.size for item in items),
        threads=_CONCURRENT_SHARDS,
    )


# --- The plan -------------------------------------------------------------------------------------------------------


def _shard_edges(items: Sequence[Item], config: PrepareConfig, form: _Form, shrinking: Shrinking | None) -> list[int]:
    """Positions at which shards begin, and the total number of samples. Uses only facts that are known before packing.

    A shard that reaches shard_bytes ends at a multiple of 16 samples if it has at least 16. Then blocks of the training
    order begin at entries of the index, so that training reads no extra bytes.
    """
    ratio = 1.0
    if shrinking is not None and sum(item.size for item in items) > config.shard_bytes:
        ratio = _shrinking_ratio(items, form, shrinking, config.image)
    edges, size = [0], 0.0
    for number, item in enumerate(items):
        while (samples := number - edges[-1]) and (samples >= config.shard_samples or size >= config.shard_bytes):
            left = samples % INDEX_STRIDE if INDEX_STRIDE <= samples < config.shard_samples else 0
            edges.append(number - left)
            size = sum(item.size for item in items[edges[-1] : number]) * ratio
        size += item.size * ratio
    return [*edges, len(items)]


def _shrinking_ratio(items: Sequence[Item], form: _Form, shrinking: Shrinking, image: str | None) -> float:
    """Size after shrinking divided by size before, estimated from evenly spaced samples."""

    def sizes_of(item: Item) -> tuple[int, int]:
        try:
            before = item.load()
            after, _ = _checked(before, form, shrinking, image, moments=False)
        except BadSample:
            return 0, 0
        return size_in_tar(*map(len, before.values())), size_in_tar(*map(len, after.values()))

    count = min(len(items), _SHRUNK_FOR_RATIO)
    sizes = list(in_order(sizes_of, (items[i * len(items) // count] for i in range(count))))
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    return after / before if before else 1.0


def _form_of(items: Sequence[Item], config: PrepareConfig) -> tuple[_Form, tuple[int, ...]]:
    """The form of the first good sample, which all samples must have, and its shape as it is stored if it is a grid."""
    form = _Form(config.largest_image)
    for item in items:
        try:
            members = {suffix.lower(): content for suffix, content in item.load().items()}
            suffix = image_suffix(members, config.image)
            if suffix is None:
                continue
            if not is_grid(suffix):
                break
            shape = grid_shape(members[suffix])
            axes = config.grid_axes
            if axes == "auto":
                axes = "HWC" if looks_like_hwc(shape) else "CHW"
            content = channels_first(members[suffix]) if axes == "HWC" else members[suffix]
            found = grid_statistics(content, moments=False, max_pixels=form.max_pixels)
            return form._replace(channels=found.channels, axes=axes), shape
        except (BadSample, DecodeError):
            continue
    return form, ()


def _grids_are_not_shrunk(name: str) -> UserError:
    return UserError(f"max_side is for images, but {name} is a .npy grid; leave max_side out or resize the grids")


# --- The work -------------------------------------------------------------------------------------------------------


def pack_shard(task: ShardTask, report: Report) -> Finished:
    """Write one shard and its record."""
    part: _Part = task.detail
    check_plan(task.storage, task.plan)
    counts, statistics = SampleCounts(), DatasetStatistics()
    bad: list[str] = []
    names: list[tuple[str, str]] = []
    unreadable: list[str] = []

    def load(numbered: tuple[int, Item]) -> tuple[dict[str, bytes], SampleStatistics] | str:
        number, item = numbered
        try:
            moments = number % part.stride == 0
            members, sample = _checked(item.load(), part.form, part.shrinking, part.image, moments=moments)
        except UnreadableSample as error:
            unreadable.append(bad_sample(item.label, error))
            return unreadable[-1]
        except BadSample as error:
            return bad_sample(item.label, error)
        if part.form.channels not in (None, sample.channels):
            return bad_sample(item.label, f"{sample.channels} channels, but others have {part.form.channels}")
        return members, sample

    def size_of(numbered: tuple[int, Item]) -> int:
        return numbered[1].size

    numbered = list(enumerate(part.items, part.first))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        with path.open("wb") as file, shard_writer(file) as writer:
            for (number, item), loaded in zip(numbered, in_order(load, numbered, size_of), strict=True):
                if isinstance(loaded, str):
                    bad.append(loaded)
                    if len(unreadable) > max(_FEW_UNREADABLE, len(part.items) // 2):
                        raise UserError(
                            f"{len(unreadable)} of the {len(part.items)} samples of a shard cannot be read: "
                            f"{first_few(unreadable)}; check the source, and run the command again to continue"
                        )
                else:
                    members, sample = loaded
                    image = image_suffix(members, part.image)
                    assert image is not None
                    key = f"{number:0{part.digits}d}"
                    writer.write({"__key__": key, **members})
                    label = class_number(members["cls"]) if "cls" in members else None
                    counts.add(members, label, image)
                    if label is None:
                        counts.add_unlabelled(item.original or item.name, members.get("cls"))
                    names.append((key, item.original or item.name))
                    statistics.add(sample, name=part.items[number - part.first].name)
                report(counts.samples, len(bad))
        with map_file(path) as buffer:
            table = read_table(buffer, task.name).rows
            assert len(table) == counts.samples
            row, entries, _ = index_shard(buffer, table)
        if counts.samples:
            check_plan(task.storage, task.plan)
            if task.replaces:  # the old dataset is incomplete from here on
                task.storage.delete(MANIFEST_NAME)
            task.storage.write(task.name, path)
            content = source_names_content(task.name, bytes(bytearray(row[3])).hex(), names)
            task.storage.write(task.name + SOURCE_NAMES_SUFFIX, content)
            counts.named = counts.samples
    return save_record(
        task.storage, task.number, row, entries,
        plan=task.plan, name=task.name, counts=counts, measurement=statistics, bad=bad,
    )  # fmt: skip


def shard_writer(file: IO[bytes]) -> webdataset.TarWriter:
    """webdataset's writer for encoded samples, without owner and time, so that equal samples give equal bytes.

    The time is a whole number, so headers are plain ustar. Only suffixes that do not fit into ustar get a PAX header.
    """
    import webdataset

    return webdataset.TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0, keep_meta=True)


def _checked(
    members: dict[str, bytes], form: _Form, shrinking: Shrinking | None, image: str | None, *, moments: bool
) -> tuple[dict[str, bytes], SampleStatistics]:
    """Decode a sample once. Returns its members as they are to be stored, and its statistics.

    An image gets the suffix of its actual format, unless `image` chooses a suffix.

    Raises:
        BadSample: it cannot be decoded.
    """
    members = {suffix.lower(): content for suffix, content in members.items()}
    if not members.keys().isdisjoint(("", "__key__")):
        raise BadSample("it has a member that webdataset cannot write: its suffix is empty or '__key__'")
    suffix = image_suffix(members, image)
    if suffix is None:
        choose = "; --image chooses one" if image is None and image_members(members) else ""
        raise BadSample(f"no image or grid among {', '.join(sorted(members))}{choose}")
    if "cls" in members:
        try:
            class_number(members["cls"])
        except ValueError as error:
            raise BadSample(str(error)) from None
    if is_grid(suffix):
        if shrinking is not None:
            raise _grids_are_not_shrunk("one of the samples")
        try:
            members[suffix] = channels_first(members[suffix]) if form.axes == "HWC" else members[suffix]
        except (DecodeError, MemoryError) as error:
            raise BadSample(str(error)) from None
        return members, grid_statistics(members[suffix], moments=moments, max_pixels=form.max_pixels)
    content = members[suffix]
    mask = members.get("mask.png")
    if mask is not None:
        _check_mask(mask, content, form.max_pixels)
    shrunk = None if shrinking is None else shrink_image(content, *shrinking, form.max_pixels)
    if shrinking is None or shrunk is None:
        kind, statistics = image_statistics(content, moments=moments, reduce=False, max_pixels=form.max_pixels)
    else:
        members[suffix] = shrunk
        kind, statistics = image_statistics(shrunk, moments=moments, reduce=False, max_pixels=form.max_pixels)
        if mask is not None:
            members["mask.png"] = shrink_mask(mask, shrinking.max_side, form.max_pixels)
    if image is None and _FORMAT_SUFFIX[kind] not in members:
        members[_FORMAT_SUFFIX[kind]] = members.pop(suffix)
    return members, statistics


def _check_mask(mask: bytes, content: bytes, max_pixels: int) -> None:
    """Decode the mask of an encoded image and compare their sizes. Raises BadSample."""
    try:
        size = read_image_header(content, max_pixels=max_pixels)[:2]
    except DecodeError as error:
        raise BadSample(str(error)) from None
    _, found = image_statistics(mask, moments=False, reduce=False, max_pixels=max_pixels)
    if found.size != size:
        raise BadSample(f"the mask has {found.size[1]}×{found.size[0]} pixels, the image {size[1]}×{size[0]}")
