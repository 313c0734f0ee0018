"""Sources for packing and indexing: folders of images or grids, tar shards, and patterns of shard names.

A source knows the names and sizes of its samples. Their content is read on the machine that packs them.
"""

from __future__ import annotations

import logging
import mmap
import os
import posixpath
import re
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from braceexpand import braceexpand

from crate_ray.bounded import MAX_MEMBER_BYTES, open_regular
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import INDEX_NAME, MANIFEST_NAME, NAMES_NAME, SHARDS_NAME, TABLE_SUFFIX
from crate_ray.data.format.names import IMAGE_SUFFIXES, printable
from crate_ray.data.format.samples import Table, read_table
from crate_ray.data.format.source_names import SOURCE_NAMES_SUFFIX, read_source_names
from crate_ray.data.format.tar import BLOCK
from crate_ray.data.prepare.folders import class_folders, usable_names
from crate_ray.data.prepare.statistics import UnreadableSample, checked_size
from crate_ray.data.prepare.tasks import Report, run_tasks, wants_cluster
from crate_ray.errors import UserError, first_few
from crate_ray.storage.interface import CannotRead, NotFound, ObjectInfo, Storage

logger = logging.getLogger(__name__)

THREADS = 8
"""Samples of a shard that are decoded at a time; also shards that one process scans at a time."""

_COMPRESSED_NAME = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_WILDCARD = re.compile(r"[*?[]")
_CLASS_BYTES = 2  # approximate size of a `cls` member
_AHEAD_BYTES = 2**28  # samples that are read ahead
_CONCURRENT_REQUESTS = 32
_GAP_BYTES = 2**16  # reading a gap of this size costs less than another request

T = TypeVar("T")
R = TypeVar("R")


class Item(NamedTuple):
    """One sample to pack."""

    name: str
    """Its path in the source, or another name for messages."""
    load: Callable[[], dict[str, bytes]]
    """Reads or generates its members: content by suffix. Must be picklable."""
    size: int = 0
    """Estimated bytes in a shard, tar headers included."""
    version: str = ""
    """Changes when the content does."""
    original: str = ""
    """Its name in the source of its source, if that is a dataset which keeps such names."""

    @property
    def label(self) -> str:
        """Its names, for messages."""
        return f"{self.name}, {self.original}" if self.original else self.name


@dataclass(frozen=True)
class Source:
    """Samples to pack, with their common properties."""

    items: Sequence[Item]
    classes: tuple[str, ...] | None = None
    """Names of the classes, by the numbers in `cls` members."""
    unsafe_names: Sequence[str] = ()
    """Members of its shards that were skipped because of their names, each after its shard's name."""


def size_in_tar(*sizes: int) -> int:
    """Bytes that members of these sizes occupy in a tar, headers and padding included."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes)


# --- Samples to pack ------------------------------------------------------------------------------------------------


def open_source(storage: Storage, shards: str = "*.tar", image: str | None = None) -> Source:
    """Samples of a folder: its images or .npy grids, or else the samples of its .tar shards.

    If all files lie in sub-folders, these are the classes (`class_folders`): `a/b.jpg` belongs to class `a`.
    `b.mask.png` beside `b.jpg` becomes its `mask.png` member. Folders behind symbolic links count. Warnings say what is
    left out.

    Args:
        storage: the folder.
        shards: names of the shards to use if the folder holds no images, with wildcards and braces.
        image: which member of the shards' samples will be used (`image_suffix`).

    Raises:
        UserError: there is nothing to pack, the folder holds both images and grids, or `image` is given without shards.
    """
    path = storage.local_path("")
    if path is not None and path.is_file():
        raise UserError(f"{storage.uri} is a file; give the folder that holds the images, .npy grids or .tar shards")
    listed, unlisted = storage.survey()
    infos = {info.key: info for info in listed}
    names = usable_names(list(infos), unlisted)
    indexed = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == MANIFEST_NAME}
    beside = {*files_of_shards(names, TABLE_SUFFIX), *files_of_shards(names, SOURCE_NAMES_SUFFIX)}
    names = [n for n in names if n not in beside and not _describes_dataset(PurePosixPath(n), indexed)]
    suffixes = {name: PurePosixPath(name).suffix[1:].lower() for name in names}
    masks = {name[: -len(".mask.png")]: name for name in names if name.lower().endswith(".mask.png")}
    mask_names = set(masks.values())
    images = [name for name in names if suffixes[name] in IMAGE_SUFFIXES and name not in mask_names]
    grids = [name for name in names if suffixes[name] == "npy"]
    if images and grids:
        raise UserError(f"{storage.uri} holds both images ({images[0]}) and grids ({grids[0]}); make them two datasets")
    files = images or grids
    if not files:
        tars = [name for name in names if suffixes[name] == "tar"]
        if tars:
            return _shard_source(storage, list_shards(storage, shards), known_classes(storage))
        raise UserError(
            f"no images (.jpg .jpeg .png .webp), .npy grids or .tar shards under {storage.uri}"
            + (f"; it holds {first_few(names)}" if names else ", which is empty or does not exist")
        )
    if image is not None:
        raise UserError(
            f"image chooses a member of each sample in shards, but in {storage.uri} each file is a sample of its own, "
            f"such as {files[0]}; leave --image out"
        )
    stems = {name.rpartition(".")[0] for name in files}
    if lost := [name for stem, name in masks.items() if stem not in stems]:
        logger.warning("skipped %d masks without an image beside them: %s", len(lost), first_few(lost))
    if others := Counter(f".{suffixes[n]}" for n in names if suffixes[n] not in (*IMAGE_SUFFIXES, "npy")):
        example = next(n for n in names if suffixes[n] not in (*IMAGE_SUFFIXES, "npy"))
        logger.warning(
            "skipped %d other files (%s), such as %s", sum(others.values()), ", ".join(sorted(others)), example
        )
    folders = class_folders(files, names, storage.uri)
    numbers = {name: number for number, name in enumerate(folders.classes if folders else ())}

    def item(name: str) -> Item:
        label = str(numbers[folders.folder(name)]).encode() if folders else None
        mask = masks.get(name.rpartition(".")[0])
        parts = [infos[part] for part in (name, mask) if part is not None]
        return Item(
            name,
            partial(_read_files, storage, name, suffixes[name], mask, label),
            size_in_tar(*(info.size for info in parts), *((_CLASS_BYTES,) if label else ())),
            " ".join(info.etag for info in parts),
        )

    named = None if folders is None else tuple(map(printable, folders.classes))
    return Source([item(name) for name in files], named)


def _read_files(storage: Storage, name: str, suffix: str, mask: str | None, label: bytes | None) -> dict[str, bytes]:
    members = {suffix: _read_member(storage, name)}
    if mask is not None:
        members["mask.png"] = _read_member(storage, mask)
    if label is not None:
        members["cls"] = label
    return members


def _read_member(storage: Storage, name: str) -> bytes:
    """Raises BadSample if the file is too large or cannot be read."""
    try:
        data = storage.read(name, 0, MAX_MEMBER_BYTES + 1)
    except (CannotRead, NotFound) as error:
        raise UnreadableSample(str(error)) from None
    checked_size(len(data))
    return data


def _describes_dataset(name: PurePosixPath, indexed: set[PurePosixPath]) -> bool:
    """Whether a file is part of the manifest or index beside it."""
    return name.parent in indexed and name.name in (MANIFEST_NAME, SHARDS_NAME, INDEX_NAME, NAMES_NAME)


def files_of_shards(names: Iterable[str], suffix: str) -> Iterator[str]:
    """Select the files that are named like a shard with this suffix, such as TABLE_SUFFIX.

    The shard is among the files, or its name ends with .tar.
    """
    present = set(names)
    for name in present:
        shard = name.removesuffix(suffix)
        if shard != name and (shard in present or shard.endswith(".tar")):
            yield name


def known_classes(storage: Storage) -> tuple[str, ...] | None:
    """Names of the classes from an existing manifest, because shards hold only their numbers."""
    try:
        return load_dataset(storage).manifest.classes
    except UserError:
        return None


def _shard_source(storage: Storage, shards: Sequence[ObjectInfo], classes: tuple[str, ...] | None) -> Source:
    """Samples of tar shards. The members of a sample may lie anywhere in its shard."""
    found: dict[int, Table] = {}
    on_cluster = wants_cluster(len(shards), 0, sum(info.size for info in shards))
    jobs = ((storage, info.key) for info in shards)
    for number, table in run_tasks(_read_table, jobs, lambda *_: None, on_cluster=on_cluster, threads=THREADS):
        found[number] = table
    unsafe = [f"{info.key}: {name}" for number, info in enumerate(shards) for name in found[number].unsafe]
    items = [
        Item(
            f"{info.key}/{row.key}",
            partial(_read_members, storage, info.key, row.members),
            size_in_tar(*(size for _, size in row.members.values())),
            info.etag,
            originals.get(row.key, ""),
        )
        for number, info in enumerate(shards)
        for originals in [_original_names(storage, info.key)]
        for row in found.pop(number).rows
    ]
    return Source(items, classes, unsafe)


def _original_names(storage: Storage, shard: str) -> dict[str, str]:
    """The source names of a shard's samples by key; empty if they are not known."""
    try:
        return dict(read_source_names(storage, shard))
    except (UserError, ValueError):
        return {}


def _read_table(job: tuple[Storage, str], _: Report) -> Table:
    storage, name = job
    with open_shard(storage, name) as buffer:
        return read_table(buffer, f"{storage.uri}/{name}")


def _read_members(storage: Storage, shard: str, members: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    for _, size in members.values():
        checked_size(size)
    begin = min(start for start, _ in members.values())
    end = max(start + size for start, size in members.values())
    if end - begin > sum(size for _, size in members.values()) + _GAP_BYTES:
        return {suffix: storage.read(shard, start, size) for suffix, (start, size) in members.items()}
    data = storage.read(shard, begin, end - begin)
    return {suffix: data[start - begin : start - begin + size] for suffix, (start, size) in members.items()}


# --- Sets of shards -------------------------------------------------------------------------------------------------


def split_address(storage: Storage, shards: str) -> tuple[Storage, str]:
    """Split shard addresses into the storage of the shards, and the pattern of their names in it.

    Args:
        storage: where the shards are if `shards` are names; its settings also open other addresses.
        shards: names, or addresses below one folder (s3://…, file://…, or beginning with / ~ ./ or ../), with
            wildcards and braces.

    Raises:
        UserError: the addresses are in several buckets or stores.
    """
    if not is_address(shards):
        return storage, shards
    addresses = [_absolute(address) for address in _expanded(shards)]
    schemes = {address.rpartition("://")[0] for address in addresses}
    paths = [address.rpartition("://")[2] for address in addresses]
    folders = [posixpath.dirname(_WILDCARD.split(path, maxsplit=1)[0]) for path in paths]
    try:
        folder = posixpath.commonpath(folders)
    except ValueError:  # absolute and relative paths
        folder = ""
    if len(schemes) > 1 or (not folder and any(folders)):
        raise UserError(f"the shards {shards} are in several buckets or stores; index each store on its own")
    (scheme,) = schemes
    source = storage.at(f"{scheme}://{folder}" if scheme else folder)
    return source, "::".join(posixpath.relpath(path, folder) for path in paths)


def is_address(shards: str) -> bool:
    """Whether shards are given as whole addresses, not as names within a storage."""
    return "://" in shards or shards.startswith(("/", "~", "./", "../"))


def _absolute(address: str) -> str:
    if address.startswith("file:///"):
        address = address.removeprefix("file://")
    return address if "://" in address else os.path.abspath(os.path.expanduser(address))  # noqa: PTH100, PTH111 - '..'


def find_shards(storage: Storage, shards: str) -> list[str]:
    """Names of the shards that match a pattern, as `list_shards`."""
    return [info.key for info in list_shards(storage, shards)]


def list_shards(storage: Storage, shards: str) -> list[ObjectInfo]:
    """The shards that match a pattern, in the order of the pattern.

    Args:
        storage: where they are, sub-folders included.
        shards: wildcards as in a shell ('train-*.tar'; '*' also matches '/'), whose matches are sorted; braces as in a
            shell ('train-{00000..00049}.tar', '{train,extra}-*.tar'), each alternative of which must exist. '::' joins
            several patterns, as in webdataset.

    Raises:
        UserError: a pattern, or one of the alternatives in its braces, matches nothing.
    """
    patterns = _expanded(shards)
    before = [_WILDCARD.split(pattern, maxsplit=1)[0] for pattern in patterns]
    prefix = os.path.commonprefix(before)  # noqa: RUF071 - of characters, not folders, as a listing needs it
    if any(map(_WILDCARD.search, patterns)):
        present = {info.key: info for info in storage.survey(prefix)[0]}
    else:  # the permission to list is not needed
        present = _named(storage, patterns)
    names = list(present)
    visible = [name for name in names if not posixpath.basename(name).startswith(".")]
    found: dict[str, None] = {}
    missing = []
    for pattern in patterns:
        matches = [pattern] if pattern in present else []
        if not matches and _WILDCARD.search(pattern):
            matches = sorted(name for name in visible if fnmatchcase(name, pattern))
        if not matches:
            missing.append(pattern)
        found.update(dict.fromkeys(matches))
    if missing:
        with suppress(UserError):
            names = [info.key for info in storage.survey(prefix)[0]]
        compressed = [name for name in names if _COMPRESSED_NAME.search(name) and name not in found]
        hint = f"; compressed ones such as {compressed[0]} must be decompressed first" if compressed else ""
        of_set = f" ({len(missing)} of {len(patterns)} are missing)" if len(patterns) > 1 else ""
        raise UserError(f"no shards named {first_few(missing)} under {storage.uri}{of_set}{hint}")
    return [present[name] for name in found]


def _named(storage: Storage, names: Iterable[str]) -> dict[str, ObjectInfo]:
    """Those of some shards that exist, by name."""

    def find(name: str) -> ObjectInfo | None:
        try:
            return storage.info(name)
        except NotFound:
            return None

    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        return {info.key: info for info in pool.map(find, names) if info is not None}


def _expanded(shards: str) -> list[str]:
    """The patterns that result from expanding the braces of a pattern."""
    try:
        return [name for pattern in shards.split("::") for name in braceexpand(pattern, escape=False)]
    except ValueError:
        raise UserError(f"the braces in {shards} are not closed; write for example train-{{00..49}}.tar") from None


@contextmanager
def open_shard(storage: Storage, name: str) -> Iterator[mmap.mmap | bytes]:
    """A shard, memory-mapped: the local file or a temporary copy."""
    path = storage.local_path(name)
    if path is not None:
        with map_file(path) as buffer:
            yield buffer
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "shard.tar"
        storage.download(name, copy)
        with map_file(copy) as buffer:
            yield buffer


@contextmanager
def map_file(path: Path) -> Iterator[mmap.mmap | bytes]:
    """A local file, memory-mapped."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped when its last view is deleted


# --- Reading ahead --------------------------------------------------------------------------------------------------


def in_order(function: Callable[[T], R], inputs: Iterable[T], size_of: Callable[[T], int] = lambda _: 0) -> Iterator[R]:
    """Results of a function in the order of its inputs, computed a little ahead in threads.

    `size_of` gives the bytes that an input takes from its start until its result is used. Inputs of more than 256 MiB
    in all do not wait at the same time.
    """
    with ThreadPoolExecutor(THREADS, "sample") as pool:
        waiting: deque[tuple[Future[R], int]] = deque()
        held = 0
        try:
            for value in inputs:
                size = size_of(value)
                while waiting and (len(waiting) >= 2 * THREADS or held + size > _AHEAD_BYTES):
                    future, freed = waiting.popleft()
                    yield future.result()
                    held -= freed
                waiting.append((pool.submit(function, value), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)
