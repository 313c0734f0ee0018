"""A dataset on storage: opened by its manifest and index, and saved.

A dataset has these files next to its shards, or in another place if the shards are read-only: `manifest.json` (written
last: without it there is no dataset), `shards.npy` (a row per shard), `index.npy` (offset and digest of every 16
samples), `names.txt` if the shards' names follow no pattern, and a table of members for each shard whose samples are
not contiguous. Beside each shard that was packed is a list of its samples' names in their source (`source_names`).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shlex
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from crate_ray.bounded import open_regular
from crate_ray.config.identifiers import check_relative_path
from crate_ray.data.format import npy
from crate_ray.data.format.index import INDEX_DTYPE, INDEX_STRIDE, SHARD_DTYPE, is_table
from crate_ray.data.format.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    NAMES_NAME,
    PLAN_NAME,
    SHARDS_NAME,
    TABLE_SUFFIX,
    DamagedDataset,
    Manifest,
    index_again,
    name_pattern,
    parse_manifest,
)
from crate_ray.data.format.names import IMAGE_SUFFIXES
from crate_ray.data.format.tar import BLOCK, Buffer, DamagedShard
from crate_ray.errors import UserError, first_few
from crate_ray.storage.cache import WrongDigest, fetch_once
from crate_ray.storage.interface import NotFound, Storage, TooLarge
from crate_ray.storage.node_folders import file_digest

_NAMES_SEEN = 1000  # files to look at for the error message about a folder without a manifest


class ByteRange(NamedTuple):
    """Bytes start .. end of a shard, which hold its samples first, first + 1, …"""

    start: int
    end: int
    first: int


@dataclass(frozen=True)
class ShardSet:
    """An open dataset: its manifest and index. The shards themselves have not been read."""

    storage: Storage
    """Where manifest and index are."""
    manifest: Manifest
    shards: NDArray[np.void]
    """(num_shards,) rows of SHARD_DTYPE."""
    index: NDArray[np.void]
    """Entries of INDEX_DTYPE: ⌈samples / 16⌉ per shard, one shard after the other."""
    names: tuple[str, ...] | None = None
    """Names of the shards if they follow no pattern."""

    @cached_property
    def shard_storage(self) -> Storage:
        """Where the shards are."""
        return self.storage if self.manifest.shards_uri is None else self.storage.at(self.manifest.shards_uri)

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """(num_shards,) number of samples of each shard."""
        return self.shards["samples"].astype(np.int64)

    @cached_property
    def bytes(self) -> NDArray[np.int64]:
        """(num_shards,) size of each shard in bytes."""
        return self.shards["bytes"].astype(np.int64)

    @cached_property
    def first_sample(self) -> NDArray[np.int64]:
        """(num_shards + 1,) number of each shard's first sample in the dataset; the last entry is the total."""
        return np.concatenate(([0], np.cumsum(self.samples)))

    @cached_property
    def first_entry(self) -> NDArray[np.int64]:
        """(num_shards + 1,) position of each shard's first entry in the index; the last is the total."""
        return np.concatenate(([0], np.cumsum(-(-self.samples // INDEX_STRIDE))))

    def shard_name(self, shard: int) -> str:
        """Key of a shard in the shards' storage."""
        if self.names is not None:
            return self.names[shard]
        assert self.manifest.shard_pattern is not None
        return self.manifest.shard_pattern.format(self.manifest.shard_first + shard)

    def locate(self, sample: int) -> tuple[int, int]:
        """The shard of a sample, and the sample's number within the shard."""
        shard = int(np.searchsorted(self.first_sample, sample, side="right")) - 1
        return shard, sample - int(self.first_sample[shard])

    def has_table(self, shard: int) -> bool:
        """Whether the shard's samples are not contiguous, so that a table lists its members."""
        return bool(self.shards["table"][shard])

    def table(self, shard: int) -> NDArray[np.void]:
        """The table of such a shard: rows of `table_dtype`, sorted by sample.

        Raises:
            DamagedDataset: the file is missing, or does not belong to the index or the shard.
        """
        key = self.shard_name(shard) + TABLE_SUFFIX
        try:
            data = self.storage.read(key)
            table = npy.read(data)
        except NotFound:
            raise _missing(self.storage, key) from None
        except ValueError:
            raise _disagrees(self.storage, key) from None
        if xxhash.xxh3_64_intdigest(data) != int(self.shards["table"][shard]):
            raise _disagrees(self.storage, key)
        if not is_table(table, int(self.samples[shard]), int(self.bytes[shard])):
            raise _disagrees(self.storage, key)
        return table

    def byte_range(self, shard: int, first: int, count: int) -> ByteRange:
        """The smallest indexed byte range that covers samples first .. first + count of a shard without a table.

        It begins at a multiple of 16 samples. It ends at a multiple of 16 samples or at the end of the shard.
        """
        samples = int(self.samples[shard])
        if not (0 <= first and 1 <= count and first + count <= samples):
            raise IndexError(f"samples {first} .. {first + count} of shard {shard}, which has {samples}")
        begin, stop = int(self.first_entry[shard]), int(self.first_entry[shard + 1])
        low, high = begin + first // INDEX_STRIDE, begin - (-(first + count) // INDEX_STRIDE)
        end = int(self.bytes[shard]) if high == stop else int(self.index["block"][high]) * BLOCK
        start = int(self.index["block"][low]) * BLOCK
        if not start < end <= int(self.bytes[shard]):
            raise _disagrees(self.storage, INDEX_NAME)
        return ByteRange(start, end, (low - begin) * INDEX_STRIDE)

    def check(self, shard: int, start: int, data: Buffer) -> None:
        """Compare bytes of a shard with the digests in the index.

        Args:
            shard: the shard's number.
            start: offset of the bytes; the start of a `byte_range`.
            data: the bytes of one or several consecutive ranges.

        Raises:
            DamagedShard: the digests differ, because bytes changed in transit or since the shard was indexed.
        """
        view = memoryview(data)
        begin, stop = int(self.first_entry[shard]), int(self.first_entry[shard + 1])
        blocks = self.index["block"][begin:stop]
        low = int(np.searchsorted(blocks, start // BLOCK))
        edges = [*(blocks[low:].astype(np.int64) * BLOCK - start).tolist(), int(self.bytes[shard]) - start]
        for i, (left, right) in enumerate(pairwise(edges)):
            if right > len(view):
                break
            if xxhash.xxh3_64_intdigest(view[left:right]) & 0xFFFFFFFF != int(self.index["digest"][begin + low + i]):
                raise DamagedShard(
                    f"bytes {start + left} to {start + right} of {self.shard_storage.uri}/{self.shard_name(shard)} are "
                    "not those that were indexed: the shard was changed or damaged; index or pack it again"
                )


def load_dataset(storage: Storage) -> ShardSet:
    """Open the dataset under a storage. The index is memory-mapped; from S3 it is fetched once per node.

    Raises:
        DamagedDataset: the manifest is damaged or of another version, or a file is missing or disagrees with it.
        UserError: there is no manifest, or something cannot be read.
    """
    try:
        text = storage.read_small(MANIFEST_NAME)
    except NotFound:
        raise _no_manifest(storage) from None
    except TooLarge as error:
        raise DamagedDataset(str(error)) from None
    manifest = parse_manifest(text, storage.uri)
    names = None
    if manifest.shard_pattern is None:
        try:
            names = tuple(_verified(storage, NAMES_NAME, manifest.names_sha256).decode().split("\n")[:-1])
        except UnicodeDecodeError:
            raise _disagrees(storage, NAMES_NAME) from None
        if len(names) != manifest.num_shards:
            raise _disagrees(storage, NAMES_NAME)
        try:
            check_shard_names(names, storage.uri)
        except UserError as error:
            raise DamagedDataset(f"{storage.uri}/{NAMES_NAME} is damaged: {error}") from None
    shards = _load_array(storage, SHARDS_NAME, manifest.shards_sha256)
    index = _load_array(storage, INDEX_NAME, manifest.index_sha256)
    if shards.dtype != SHARD_DTYPE or shards.shape != (manifest.num_shards,) or index.dtype != INDEX_DTYPE:
        raise _disagrees(storage, SHARDS_NAME)
    dataset = ShardSet(storage, manifest, shards, index, names)
    if dataset.first_sample[-1] != manifest.num_samples or index.shape != (dataset.first_entry[-1],):
        raise _disagrees(storage, INDEX_NAME)
    return dataset


def save_dataset(
    storage: Storage,
    names: Sequence[str],
    shards: NDArray[np.void],
    index: Sequence[NDArray[np.void]],
    **described: Any,
) -> Manifest:
    """Write names.txt (if names follow no pattern), shards.npy, index.npy and, last, the manifest.

    Args:
        storage: where manifest and index go. The shards are there too, unless described["shards_uri"] is given.
        names: keys of the shards.
        shards: (num_shards,) rows of SHARD_DTYPE.
        index: for each shard, its entries of INDEX_DTYPE. Tables of members must have been written before.
        described: the manifest's fields that describe the samples (kind, image_suffixes, mean, …).

    Raises:
        AlreadyExists: there is a manifest.
    """
    check_shard_names(names, storage.uri)
    files = {SHARDS_NAME: npy.content_of(shards), INDEX_NAME: npy.content_of(np.concatenate(index))}
    pattern, first = name_pattern(names)
    if pattern is None:
        files[NAMES_NAME] = "".join(f"{name}\n" for name in names).encode()
    digests = {key: hashlib.sha256(data).hexdigest() for key, data in files.items()}
    manifest = Manifest(
        num_samples=int(shards["samples"].sum(dtype=np.int64)),
        num_shards=len(shards),
        total_bytes=int(shards["bytes"].sum(dtype=np.int64)),
        shard_pattern=pattern,
        shard_first=first,
        shards_sha256=digests[SHARDS_NAME],
        index_sha256=digests[INDEX_NAME],
        names_sha256=digests.get(NAMES_NAME),
        **described,
    )
    for key, data in files.items():
        storage.write(key, data)
    storage.write(MANIFEST_NAME, manifest.to_json(), if_absent=True)
    return manifest


def check_shard_names(names: Iterable[str], uri: str) -> None:
    """Check that names can be stored as those of shards under `uri`. Raises UserError if one cannot."""
    for name in names:
        try:
            check_relative_path(name)
        except ValueError as error:
            raise UserError(f"the name of a shard, {error}; rename it under {uri}") from None


def _no_manifest(storage: Storage) -> UserError:
    """The error for a missing manifest: says what the folder holds instead, and which command makes a dataset of it."""
    uri, quoted = storage.uri, shlex.quote(storage.uri)
    if storage.exists(PLAN_NAME):
        return UserError(f"no manifest at {uri}: `crate-ray prepare` has not finished there; run it again to continue")
    visible = (info.key for info in storage.list() if not info.key.startswith(".") and "/." not in info.key)
    names = list(islice(visible, _NAMES_SEEN))
    datasets = sorted({f"{uri}/{name.rpartition('/')[0]}" for name in names if name.endswith(f"/{MANIFEST_NAME}")})
    suffixes = {name.rpartition(".")[2].lower() for name in names}
    if datasets:
        return UserError(f"no manifest at {uri}, but there are datasets below it: use {first_few(datasets)}")
    if suffixes & {*IMAGE_SUFFIXES, "npy"}:
        what = "images" if suffixes & set(IMAGE_SUFFIXES) else "grids"
        return UserError(
            f"no manifest at {uri}: these are {what}, run `crate-ray prepare --source {quoted} --output ...`"
        )
    if "tar" in suffixes:
        return UserError(f"no manifest at {uri}: run `crate-ray prepare --output {quoted}` to index the shards")
    there = f"it holds {first_few(names)}" if names else "it is empty or does not exist"
    return UserError(
        f"no manifest at {uri}: {there}; give the output of `crate-ray prepare --source IMAGES --output FOLDER`"
    )


def _missing(storage: Storage, key: str) -> DamagedDataset:
    return DamagedDataset(
        f"{storage.uri}/{key} does not exist, although {MANIFEST_NAME} refers to it; restore it, wait if the dataset "
        f"is still being copied, or {index_again(storage.uri)}"
    )


def _disagrees(storage: Storage, key: str) -> DamagedDataset:
    return DamagedDataset(
        f"{storage.uri}/{key} does not agree with {MANIFEST_NAME}: it is damaged or of another version of the dataset; "
        f"restore it, or {index_again(storage.uri)}"
    )


def _verified(storage: Storage, key: str, sha256: str | None) -> bytes:
    try:
        data = storage.read(key)
    except NotFound:
        raise _missing(storage, key) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _disagrees(storage, key)
    return data


def _load_array(storage: Storage, key: str, sha256: str) -> NDArray[Any]:
    with _open_file(storage, key, sha256) as file:
        try:
            if os.fstat(file.fileno()).st_size > mmap.PAGESIZE:
                return npy.map_file(file)
            file.seek(0)
            return npy.read(file.read())
        except ValueError:
            raise _disagrees(storage, key) from None


def _open_file(storage: Storage, key: str, sha256: str) -> BufferedReader:
    """Open a file of a dataset, after checking its digest. From object storage, the node's local copy is opened."""
    path = storage.local_path(key)
    try:
        if path is None:
            return fetch_once(storage, key, sha256)
        with ExitStack() as stack:
            file = stack.enter_context(open_regular(path))
            if file_digest(file) != sha256:
                raise _disagrees(storage, key)
            stack.pop_all()
            return file
    except (FileNotFoundError, NotFound):
        raise _missing(storage, key) from None
    except WrongDigest:
        raise _disagrees(storage, key) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
