"""Making datasets: pack images or grids into plain USTAR shards, or index shards that somebody else wrote.

The same input and seed give the same bytes. Every file is decoded once here, so that training meets no broken one.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import posixpath
import re
import sys
import tarfile
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from crate_ray.config import PrepareConfig
from crate_ray.data.decode import DecodeError, read_image_header, to_eight_bits
from crate_ray.data.shards import (
    INDEX_NAME,
    MANIFEST_NAME,
    NAMES_NAME,
    SHARD_DTYPE,
    SHARDS_NAME,
    TABLE_SUFFIX,
    Manifest,
    TableRow,
    index_shard,
    load_dataset,
    read_table,
    save_dataset,
)
from crate_ray.data.storage import Storage
from crate_ray.errors import UserError

logger = logging.getLogger(__name__)

SHARD_PATTERN = "shard-{:06d}.tar"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MEASURED_SAMPLES = 2048
"""At most this many samples are measured for mean, standard deviation and shape."""

_THREADS = 8
_FORMAT_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_OUR_SHARD = re.compile(r"shard-\d{6}\.tar")
_COMPRESSED_NAME = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_WILDCARD = re.compile(r"[*?[]")
_NUMBERED_SUFFIX = re.compile(r"\d[\d.]*\.(jpe?g|png|webp|npy)")
_REPORTED_NAMES = 10

T = TypeVar("T")
R = TypeVar("R")


class Item(NamedTuple):
    """One sample to pack."""

    name: str
    """What messages call it."""
    load: Callable[[], dict[str, bytes]]
    """Reads or makes its members: content by suffix."""


@dataclass(frozen=True)
class Source:
    """Samples to pack, and what is known about all of them."""

    items: Sequence[Item]
    classes: tuple[str, ...] | None = None
    """Names of the classes that `cls` members number."""


class BadSample(Exception):  # noqa: N818
    """A sample that cannot be decoded; packing goes on without it."""


# --- What to pack ---------------------------------------------------------------------------------------------------


def open_source(storage: Storage, shards: str = "*.tar") -> Source:
    """Samples of a folder: its images or .npy grids, or else the samples of its .tar shards.

    `a/b.jpg` is a sample of class `a` (where all files lie in folders); `b.mask.png` beside `b.jpg` becomes its
    `mask.png` member. Files whose names begin with a dot are left out.

    Args:
        storage: the folder.
        shards: which shards to take where the folder holds no images: names with wildcards and braces.

    Raises:
        UserError: there is nothing to pack, or images and grids are mixed.
    """
    names = [info.key for info in storage.list() if not PurePosixPath(info.key).name.startswith(".")]
    indexed = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == MANIFEST_NAME}
    shard_tables = set(_tables(names))
    names = [n for n in names if n not in shard_tables and not _describes_dataset(PurePosixPath(n), indexed)]
    suffixes = {name: PurePosixPath(name).suffix[1:].lower() for name in names}
    masks = {name[: -len(".mask.png")]: name for name in names if name.lower().endswith(".mask.png")}
    mask_names = set(masks.values())
    images = [name for name in names if suffixes[name] in IMAGE_SUFFIXES and name not in mask_names]
    grids = [name for name in names if suffixes[name] == "npy"]
    if images and grids:
        raise UserError(
            f"{storage.uri} holds both images ({images[0]}) and grids ({grids[0]}); pack them as two datasets"
        )
    files = images or grids
    if not files:
        tars = [name for name in names if suffixes[name] == "tar"]
        if tars:
            return _shard_source(storage, find_shards(storage, shards), _known_classes(storage))
        raise UserError(
            f"no images (.jpg .jpeg .png .webp), .npy grids or .tar shards under {storage.uri}"
            + (f"; it holds {_some(names)}" if names else ", which is empty or does not exist")
        )
    stems = {name.rpartition(".")[0] for name in files}
    if lost := [name for stem, name in masks.items() if stem not in stems]:
        logger.warning("%d masks have no image beside them and are left out: %s", len(lost), _some(lost))
    if others := Counter(f".{suffixes[n]}" for n in names if suffixes[n] not in (*IMAGE_SUFFIXES, "npy")):
        logger.warning("%d other files are left out (%s)", sum(others.values()), ", ".join(sorted(others)))
    classes: tuple[str, ...] | None = None
    if all("/" in name for name in files):
        classes = tuple(sorted({name.split("/", 1)[0] for name in files}))
    numbers = {name: number for number, name in enumerate(classes or ())}

    def item(name: str) -> Item:
        label = str(numbers[name.split("/", 1)[0]]).encode() if classes else None
        mask = masks.get(name.rpartition(".")[0])

        def load() -> dict[str, bytes]:
            members = {suffixes[name]: storage.read(name)}
            if mask is not None:
                members["mask.png"] = storage.read(mask)
            if label is not None:
                members["cls"] = label
            return members

        return Item(name, load)

    return Source([item(name) for name in files], classes)


def _describes_dataset(name: PurePosixPath, indexed: set[PurePosixPath]) -> bool:
    """Whether a file belongs to a manifest beside it."""
    return name.parent in indexed and name.name in (MANIFEST_NAME, SHARDS_NAME, INDEX_NAME, NAMES_NAME)


def _tables(names: Iterable[str]) -> Iterator[str]:
    """Those of some files that are tables of shards' members: the shard is beside, or was a .tar."""
    present = set(names)
    for name in present:
        shard = name.removesuffix(TABLE_SUFFIX)
        if shard != name and (shard in present or shard.endswith(".tar")):
            yield name


def _known_classes(storage: Storage) -> tuple[str, ...] | None:
    """Names of the classes from an earlier manifest, which the shards themselves do not hold."""
    try:
        return load_dataset(storage).manifest.classes
    except UserError:
        return None


def _shard_source(storage: Storage, names: Sequence[str], classes: tuple[str, ...] | None) -> Source:
    """Samples of tar shards, members gathered from anywhere in their shard."""

    def item(shard: str, row: TableRow) -> Item:
        def load() -> dict[str, bytes]:
            return {suffix: storage.read(shard, start, size) for suffix, (start, size) in row.members.items()}

        return Item(f"{shard}/{row.key}", load)

    items = []
    for name in names:
        with _open_shard(storage, name) as buffer:
            items += [item(name, row) for row in read_table(buffer, f"{storage.uri}/{name}")]
    return Source(items, classes)


# --- Packing --------------------------------------------------------------------------------------------------------


def pack(source: Source, storage: Storage, config: PrepareConfig) -> Manifest:
    """Write the samples of a source into shards, then index and manifest.

    Members are stored as they are, under sequential keys. Samples that cannot be decoded are left out and reported.

    Raises:
        UserError: there is a dataset already (unless config.overwrite), or no sample can be decoded.
    """
    items = list(source.items)
    if not items:
        raise UserError("there is no sample to pack; a built-in set needs a larger num_samples for this split")
    old_shards = _old_shards(storage, overwrite=config.overwrite)
    if config.shuffle:  # by raw random numbers, whose stream numpy keeps the same for ever
        order = np.argsort(np.random.Philox(key=config.seed % 2**64).random_raw(len(items)), kind="stable")
        items = [items[i] for i in order]
    stride = -(-len(items) // MEASURED_SAMPLES)
    digits = max(6, len(str(len(items) - 1)))
    measured = Measurement()
    counts = _SampleCounts()
    bad: list[str] = []
    rows: list[tuple[Any, ...]] = []
    index: list[NDArray[np.void]] = []
    names: list[str] = []

    with tempfile.TemporaryDirectory() as folder:
        shard = _ShardFile(Path(folder) / "shard.tar")

        def finish() -> None:
            name = SHARD_PATTERN.format(len(rows))
            row, entries = shard.finish(name)
            if not rows:  # from here on the old dataset is no longer whole
                storage.delete(MANIFEST_NAME)
                storage.delete(NAMES_NAME)
            storage.write(name, shard.path)
            rows.append(row)
            index.append(entries)
            names.append(name)

        def load(numbered: tuple[int, Item]) -> tuple[Item, dict[str, bytes], _Measured | str]:
            number, (name, read) = numbered
            try:
                return numbered[1], *_checked(read(), measure=number % stride == 0)
            except BadSample as error:
                return numbered[1], {}, f"{name} ({error})"

        loaded = _in_order(load, enumerate(items))
        for item, members, result in _progress(loaded, len(items), "packing"):
            if isinstance(result, str):
                bad.append(result)
                continue
            if counts.kind == "grid" and result.channels != measured.channels:
                bad.append(f"{item.name} ({result.channels} channels where others have {measured.channels})")
                continue
            if shard.samples and (shard.samples >= config.shard_samples or shard.size >= config.shard_bytes):
                finish()
            measured.add(result)
            counts.add(members, members.get("cls"))
            shard.add(f"{counts.samples - 1:0{digits}d}", members)
        if bad:
            logger.warning("%d of %d samples cannot be decoded and are left out: %s", len(bad), len(items), _some(bad))
        if not counts.samples or not measured.count:
            raise UserError(f"none of the {len(items)} samples can be packed: {_some(bad)}")
        finish()
    for name in old_shards - set(names):
        storage.delete(name)
    _remove_tables(storage)
    described = counts.describe(storage.uri) | measured.describe()
    return save_dataset(storage, names, np.array(rows, SHARD_DTYPE), index, **described, classes=source.classes)


class _ShardFile:
    """The shard that is being written, as a local file: plain USTAR, nothing in it but names and contents."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self._tar: tarfile.TarFile | None = None

    @property
    def size(self) -> int:
        return self._tar.offset if self._tar else 0

    def add(self, key: str, members: dict[str, bytes]) -> None:
        if self._tar is None:
            self._tar = tarfile.open(self.path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by finish
        for suffix, content in sorted(members.items()):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self.samples += 1

    def finish(self, name: str) -> tuple[tuple[Any, ...], NDArray[np.void]]:
        """Close the file. Its row of SHARD_DTYPE and its part of the index, from reading it back."""
        assert self._tar is not None
        self._tar.close()
        with _map(self.path) as buffer:
            table = read_table(buffer, name)
            assert len(table) == self.samples
            self._tar, self.samples = None, 0
            return index_shard(buffer, table)[:2]


def _old_shards(storage: Storage, *, overwrite: bool) -> set[str]:
    """Names of shards that were packed here before; an error where they may not be overwritten."""
    manifest = storage.exists(MANIFEST_NAME)
    shards = {info.key for info in storage.list("shard-") if _OUR_SHARD.fullmatch(info.key)}
    if (manifest or shards) and not overwrite:
        what = "a dataset" if manifest else "shards without a manifest, perhaps of a packing that was interrupted,"
        raise UserError(
            f"there is {what} at {storage.uri} already; use another output, or --overwrite true to replace it"
        )
    return shards


def _checked(members: dict[str, bytes], *, measure: bool) -> tuple[dict[str, bytes], _Measured]:
    """Decode a sample once. Its members, images under their format's suffix, and what was measured.

    Raises:
        BadSample: it cannot be decoded.
    """
    members = {suffix.lower(): content for suffix, content in members.items()}
    suffix = image_suffix(members)
    if suffix is None:
        raise BadSample("no image or grid among " + ", ".join(sorted(members)))
    if suffix == "npy":
        return members, measure_grid(members["npy"], measure=measure)
    image, result = measure_image(members[suffix], measure=measure, reduce=False)
    true_suffix = _FORMAT_SUFFIX[image.format or "JPEG"]
    if true_suffix not in members:
        members[true_suffix] = members.pop(suffix)
    if "mask.png" in members:
        _, mask = measure_image(members["mask.png"], measure=False, reduce=False)
        if mask.size != result.size:
            raise BadSample(
                f"mask of {mask.size[1]}×{mask.size[0]} pixels for an image of {result.size[1]}×{result.size[0]}"
            )
    return members, result


# --- Indexing -------------------------------------------------------------------------------------------------------


def index_existing(storage: Storage, *, shards: str = "*.tar", overwrite: bool = False) -> Manifest:
    """Scan tar shards, whoever wrote them, and write index and manifest beside them or elsewhere.

    Args:
        storage: where index and manifest go, and where the shards are unless their address is given.
        shards: which files are shards: names (sub-folders included) with wildcards and braces, as for `find_shards`, or
            whole addresses of shards that are elsewhere and only read, 's3://bucket/cifar10/train-{00000..00049}.tar'.
        overwrite: replace an index that is there.

    Raises:
        UserError: no shards, or a missing one; a manifest is there; a shard is damaged, compressed, or cannot be read
            in ranges.
    """
    if storage.exists(MANIFEST_NAME) and not overwrite:
        raise UserError(f"{storage.uri} is indexed already; --overwrite true indexes it again")
    source, pattern = split_address(storage, shards)
    names = find_shards(source, pattern)
    share = max(1, MEASURED_SAMPLES // len(names))
    skip = -(-len(names) // MEASURED_SAMPLES)

    def scan(numbered: tuple[int, str]) -> _ScannedShard:
        number, name = numbered
        return _scan(source, name, share if number % skip == 0 else 0)

    measured = Measurement()
    counts = _SampleCounts()
    rows, index, bad = [], [], []
    tables: set[str] = set()
    for scanned in _progress(_in_order(scan, enumerate(names), ahead=1), len(names), "indexing"):
        rows.append(scanned.row)
        index.append(scanned.entries)
        if scanned.table is not None:
            tables.add(names[len(rows) - 1] + TABLE_SUFFIX)
            storage.write(names[len(rows) - 1] + TABLE_SUFFIX, scanned.table)
        counts.merge(scanned.counts)
        bad += scanned.bad
        for result in scanned.measured:
            if counts.kind == "grid" and measured.count and result.channels != measured.channels:
                raise UserError(
                    f"grids under {source.uri} have {measured.channels} and {result.channels} channels; "
                    "a dataset needs one number of channels"
                )
            measured.add(result, weight=scanned.counts.samples / len(scanned.measured))
    described = counts.describe(source.uri) | {"classes": _known_classes(source)}
    if bad:
        logger.warning("%d of the measured samples cannot be decoded: %s", len(bad), _some(bad))
    if not measured.count:
        raise UserError(f"none of the measured samples under {source.uri} can be decoded: {_some(bad)}")
    storage.delete(MANIFEST_NAME)
    storage.delete(NAMES_NAME)
    _remove_tables(storage, tables)
    if source.uri != storage.uri:
        described["shards_uri"] = source.uri
    return save_dataset(storage, names, np.array(rows, SHARD_DTYPE), index, **described, **measured.describe())


def _remove_tables(storage: Storage, keep: Iterable[str] = ()) -> None:
    """Delete the tables of members that an earlier index of the same place needed."""
    for name in set(_tables(info.key for info in storage.list())).difference(keep):
        storage.delete(name)


@dataclass
class _ScannedShard:
    row: tuple[Any, ...]
    entries: NDArray[np.void]
    table: bytes | None
    counts: _SampleCounts
    measured: list[_Measured]
    bad: list[str]


def _scan(storage: Storage, name: str, share: int) -> _ScannedShard:
    """Table, digest and a measured share of one shard."""
    where = f"{storage.uri}/{name}"
    with _open_shard(storage, name) as buffer:
        table = read_table(buffer, where)
        counts = _SampleCounts()
        for row in table:
            start, size = row.members.get("cls", (0, 0))
            counts.add(row.members, bytes(buffer[start : start + size]) if size else None, row.key)
        measured, bad = [], []
        for number in sorted({i * len(table) // share for i in range(share)} if table else ()):
            row = table[number]
            suffix = image_suffix(row.members)
            if suffix is None:
                continue
            start, size = row.members[suffix]
            content = bytes(buffer[start : start + size])
            try:
                result = measure_grid(content) if suffix == "npy" else measure_image(content)[1]
            except BadSample as error:
                bad.append(f"{name}/{row.key} ({error})")
            else:
                measured.append(result)
        return _ScannedShard(*index_shard(buffer, table), counts, measured, bad)


def split_address(storage: Storage, shards: str) -> tuple[Storage, str]:
    """Where shards are and what they are called there: those of a storage, or those that whole addresses name.

    Args:
        storage: where names that are no addresses belong; its settings also open other addresses.
        shards: names, or addresses (of s3://, file://, or beginning with / ~ ./ or ../) below one folder;
            with wildcards and braces.

    Raises:
        UserError: the addresses have no bucket or scheme in common.
    """
    if not is_address(shards):
        return storage, shards
    addresses = [_absolute(address) for address in _expanded(shards)]
    schemes = {address.rpartition("://")[0] for address in addresses}
    paths = [address.rpartition("://")[2] for address in addresses]
    folders = [posixpath.dirname(_WILDCARD.split(path, maxsplit=1)[0]) for path in paths]
    try:
        folder = posixpath.commonpath(folders)
    except ValueError:  # some are absolute, some are not
        folder = ""
    if len(schemes) > 1 or (not folder and any(folders)):
        raise UserError(f"the shards {shards} are in several buckets or stores; index each of them by itself")
    (scheme,) = schemes
    source = storage.at(f"{scheme}://{folder}" if scheme else folder)
    return source, "::".join(posixpath.relpath(path, folder) for path in paths)


def is_address(shards: str) -> bool:
    """Whether shards are given by whole addresses, not by their names within a storage."""
    return "://" in shards or shards.startswith(("/", "~", "./", "../"))


def _absolute(address: str) -> str:
    if address.startswith("file:///"):
        address = address.removeprefix("file://")
    return address if "://" in address else os.path.abspath(os.path.expanduser(address))  # noqa: PTH100, PTH111 - '..'


def find_shards(storage: Storage, shards: str) -> list[str]:
    """Names of the shards under a storage that a pattern stands for, in the order of the pattern.

    Args:
        storage: where they are, in sub-folders too.
        shards: wildcards as in a shell ('train-*.tar'; '*' goes on into sub-folders), what such a pattern finds being
            sorted; and braces as in a shell ('train-{00000..00049}.tar', '{train,extra}-*.tar'), each of which must be
            there. '::' joins several, as in webdataset.

    Raises:
        UserError: there is no shard for a pattern, or for a name or pattern that its braces stand for.
    """
    patterns = _expanded(shards)
    before = [_WILDCARD.split(pattern, maxsplit=1)[0] for pattern in patterns]
    prefix = os.path.commonprefix(before)  # noqa: RUF071 - characters, not folders: a listing goes by them
    names = [info.key for info in storage.list(prefix)]
    present = set(names)
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
        compressed = [name for name in names if _COMPRESSED_NAME.search(name) and name not in found]
        hint = f"; compressed ones such as {compressed[0]} must be decompressed first" if compressed else ""
        of_set = f" ({len(missing)} of the {len(patterns)} that are named)" if len(patterns) > 1 else ""
        raise UserError(f"no shards named {_some(missing)} under {storage.uri}{of_set}{hint}")
    return list(found)


def _expanded(shards: str) -> list[str]:
    """The patterns without braces that a pattern stands for."""
    try:
        return [name for pattern in shards.split("::") for name in braceexpand(pattern, escape=False)]
    except ValueError:
        raise UserError(
            f"the braces in the shards' names {shards} are not closed; write train-{{00..49}}.tar"
        ) from None


@contextmanager
def _open_shard(storage: Storage, name: str) -> Iterator[mmap.mmap | bytes]:
    """A whole shard, memory-mapped: the local file itself, or a temporary copy."""
    path = storage.local_path(name)
    if path is not None:
        with _map(path) as buffer:
            yield buffer
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "shard.tar"
        storage.download(name, copy)
        with _map(copy) as buffer:
            yield buffer


@contextmanager
def _map(path: Path) -> Iterator[mmap.mmap | bytes]:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped when the last view of it is gone


# --- Measuring ------------------------------------------------------------------------------------------------------


def image_suffix(suffixes: Iterable[str]) -> str | None:
    """The suffix under which a sample with these suffixes holds its image or grid; images are preferred."""
    present = set(suffixes)
    return next((suffix for suffix in (*IMAGE_SUFFIXES, "npy") if suffix in present), None)


class _Measured(NamedTuple):
    """One sample: shape, and mean of values and of their squares per channel where measured."""

    channels: int
    size: tuple[int, int]
    """Height, width; upright, as training sees the picture."""
    mean: NDArray[np.float64] | None
    square: NDArray[np.float64] | None


def measure_image(content: bytes, *, measure: bool = True, reduce: bool = True) -> tuple[Image.Image, _Measured]:
    """Decode a JPEG, PNG or WebP image; nothing else is tried.

    Args:
        content: the encoded image.
        measure: compute its statistics on the scale 0-1 too.
        reduce: decode large JPEGs at a smaller scale of at least 256 pixels, for statistics only.

    Raises:
        BadSample: it cannot be decoded.
    """
    try:
        header = read_image_header(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        if reduce:
            image.draft(None, (256, 256))
        image.load()
        channels = 1 if image.mode in ("1", "L", "LA", "I", "I;16", "F") else 3
        if not measure:
            return image, _Measured(channels, header[:2], None, None)
        eight_bits = to_eight_bits(image).convert("L" if channels == 1 else "RGB")
        histogram = np.array(eight_bits.histogram(), np.float64).reshape(-1, 256)
    except UnidentifiedImageError:
        raise BadSample("not a JPEG, PNG or WebP image") from None
    except (DecodeError, OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise BadSample(str(error)) from None
    share = histogram / histogram.sum(1, keepdims=True)
    values = np.arange(256) / 255
    return image, _Measured(channels, header[:2], share @ values, share @ values**2)


def measure_grid(content: bytes, *, measure: bool = True) -> _Measured:
    """Check a .npy array of shape (C, H, W) or (H, W) and compute its statistics.

    Raises:
        BadSample: it is no such array of finite numbers.
    """
    if not content.startswith(b"\x93NUMPY"):
        raise BadSample("not a .npy array")
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy lets through whatever a damaged header does to Python's parser
        raise BadSample(f"not a readable .npy array: {error}") from None
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or not array.size:
        raise BadSample(f"an array of {array.dtype} of shape {array.shape}, not numbers of shape (C, H, W) or (H, W)")
    if not np.isfinite(array).all():
        raise BadSample("the array holds infinities or NaN")
    grid = array[None] if array.ndim == 2 else array
    size = (int(grid.shape[1]), int(grid.shape[2]))
    if not measure:
        return _Measured(len(grid), size, None, None)
    flat = grid.reshape(len(grid), -1).astype(np.float64)
    return _Measured(len(grid), size, flat.mean(1), (flat**2).mean(1))


@dataclass
class Measurement:
    """Shape and statistics of the dataset, gathered from measured samples. Every sample weighs the same."""

    count: int = 0
    channels: int = 1
    sizes: set[tuple[int, int]] = field(default_factory=set)
    _mean: NDArray[np.float64] | None = None
    _square: NDArray[np.float64] | None = None
    _weight: float = 0.0

    def add(self, sample: _Measured, weight: float = 1.0) -> None:
        """Add a sample; of one that was not measured, only the shape counts."""
        if len(self.sizes) < 2:
            self.sizes.add(sample.size)
        if sample.channels > self.channels:  # grayscale pictures so far: they have three equal channels from now on
            self.channels = sample.channels
            if self._mean is not None and self._square is not None:
                self._mean = np.resize(self._mean, self.channels)
                self._square = np.resize(self._square, self.channels)
        if sample.mean is None or sample.square is None:
            return
        self.count += 1
        if self._mean is None or self._square is None:
            self._mean = self._square = np.zeros(self.channels)
        self._mean = self._mean + weight * np.resize(sample.mean, self.channels)
        self._square = self._square + weight * np.resize(sample.square, self.channels)
        self._weight += weight

    def describe(self) -> dict[str, Any]:
        """Fields of the manifest."""
        assert self._mean is not None
        assert self._square is not None
        mean = self._mean / self._weight
        std = np.sqrt(np.maximum(self._square / self._weight - mean**2, 0))
        size = next(iter(self.sizes)) if len(self.sizes) == 1 else (None, None)
        return {
            "channels": self.channels,
            "height": size[0],
            "width": size[1],
            "mean": tuple(float(f"{value:.6g}") for value in mean),
            "std": tuple(float(f"{value:.6g}") for value in std),
            "num_measured": self.count,
        }


@dataclass
class _SampleCounts:
    """Which members and labels all samples have."""

    samples: int = 0
    suffixes: set[str] = field(default_factory=set)
    images: Counter[str] = field(default_factory=Counter)
    labelled: int = 0
    max_label: int = -1
    without_image: list[str] = field(default_factory=list)

    def add(self, members: Iterable[str], label: bytes | None, key: str = "") -> None:
        self.samples += 1
        self.suffixes.update(members)
        suffix = image_suffix(members)
        if suffix is None:
            self.without_image.append(key)
        else:
            self.images[suffix] += 1
        if label is not None and label.strip().isdigit():
            self.labelled += 1
            self.max_label = max(self.max_label, int(label))

    def merge(self, other: _SampleCounts) -> None:
        self.samples += other.samples
        self.suffixes |= other.suffixes
        self.images += other.images
        self.labelled += other.labelled
        self.max_label = max(self.max_label, other.max_label)
        self.without_image += other.without_image

    @property
    def kind(self) -> str:
        return "grid" if "npy" in self.images else "image"

    def describe(self, uri: str) -> dict[str, Any]:
        """Fields of the manifest; warnings and errors where samples do not agree."""
        numbered = sorted(suffix for suffix in self.suffixes if _NUMBERED_SUFFIX.fullmatch(suffix))
        hint = (
            f" (suffixes such as {numbered[0]!r} come from dots within file names: in WebDataset the key ends at the "
            "first dot, so files may have merged into one sample)"
            if numbered
            else ""
        )
        if not self.images:
            raise UserError(
                f"no sample under {uri} has an image or grid but {', '.join(sorted(self.suffixes)) or 'nothing'}; "
                f"wanted is one of {', '.join((*IMAGE_SUFFIXES, 'npy'))}{hint}"
            )
        if "npy" in self.images and len(self.images) > 1:
            raise UserError(f"{uri} mixes samples with images and samples with .npy grids; make two datasets of them")
        if self.without_image:
            logger.warning(
                "%d of %d samples have no image or grid: %s%s",
                len(self.without_image),
                self.samples,
                _some(self.without_image),
                hint,
            )
        elif numbered:
            logger.warning("%s%s", uri, hint)
        return {
            "kind": self.kind,
            "image_suffixes": tuple(suffix for suffix in (*IMAGE_SUFFIXES, "npy") if suffix in self.images),
            "suffixes": tuple(sorted(self.suffixes)),
            "num_classes": self.max_label + 1 if self.labelled == self.samples else None,
        }


# --- Running --------------------------------------------------------------------------------------------------------


def _in_order(function: Callable[[T], R], inputs: Iterable[T], ahead: int = 2) -> Iterator[R]:
    """Results of a function in the order of its inputs, computed by threads at most ahead × threads inputs ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for value in inputs:
                waiting.append(pool.submit(function, value))
                if len(waiting) >= ahead * _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _progress(results: Iterable[R], total: int, title: str) -> Iterable[R]:
    """The results, with a progress bar where a person watches."""
    if not sys.stderr.isatty():
        return results
    return track(results, title, total, console=Console(stderr=True))


def _some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - _REPORTED_NAMES} more" if len(names) > _REPORTED_NAMES else ""
    return ", ".join(names[:_REPORTED_NAMES]) + more
