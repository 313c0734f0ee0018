"""Reads samples of one dataset by number, with ranged reads. All bytes are checked against the index."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.format.samples import Sample, parse_samples
from crate_ray.data.format.source_names import SOURCE_NAMES_SUFFIX, read_source_names
from crate_ray.data.format.tar import DamagedShard
from crate_ray.errors import UserError
from crate_ray.storage.cache import PartCache
from crate_ray.storage.interface import Replaced

logger = logging.getLogger(__name__)

_CHECKED_READS = 3  # attempts if the digest is wrong, because the bytes may have been damaged in transit
_NAME_LISTS = 8  # lists of source names that are kept
_JOIN_GAP = 64 * 2**10  # members closer together than this are read in one request

Store = Callable[[bytes], memoryview]
"""Stores bytes in memory or on disk until they are decoded. Samples' members are slices of the result."""


class Unreadable(NamedTuple):
    """Stands for a sample whose bytes are damaged."""

    key: str
    """Shard and number: the key itself cannot be read."""
    error: str

    @property
    def members(self) -> dict[str, memoryview]:
        """Empty."""
        return {}


class ShardReader:
    """Reads samples of a dataset by number.

    All bytes are checked against the index. A shard that is replaced while it is being read is an error.
    """

    def __init__(self, shards: ShardSet, cache: PartCache | None = None) -> None:
        self.shards = shards
        self._cache = cache
        self._versions = np.zeros(shards.manifest.num_shards, np.uint64)  # hash of each shard's ETag; 0: not read yet
        self._table = lru_cache(maxsize=64)(shards.table)
        self._source_names = lru_cache(maxsize=_NAME_LISTS)(self._read_source_names)
        self._dataset = shards.manifest.digest()

    def read(self, first: int, count: int, store: Store = memoryview) -> list[Sample | Unreadable]:
        """Read samples first .. first + count, or up to the end of the dataset.

        Args:
            first: number of the first sample.
            count: number of samples.
            store: stores the bytes in memory or on disk.

        Raises:
            Replaced: a shard was overwritten since it was first read, or its size differs from the indexed one.
            NotFound: a shard was deleted.
        """
        out: list[Sample | Unreadable] = []
        stop = min(first + count, self.shards.manifest.num_samples)
        while first < stop:
            shard, local = self.shards.locate(first)
            take = min(stop - first, int(self.shards.samples[shard]) - local)
            try:
                out += self._read(shard, local, take, store)
            except DamagedShard:  # read each index entry by itself, so that only 16 samples around the damage are lost
                for low in range(local - local % INDEX_STRIDE, local + take, INDEX_STRIDE):
                    begin, end = max(low, local), min(low + INDEX_STRIDE, local + take)
                    try:
                        out += self._read(shard, begin, end - begin, store)
                    except DamagedShard as error:
                        name = self.shards.shard_name(shard)
                        out += [Unreadable(f"{name}#{number}", str(error)) for number in range(begin, end)]
            first += take
        return out

    def source_name(self, sample: int) -> str | None:
        """Name of a sample in the source that it was packed from, with a surrogate for each byte that is not UTF-8.

        None if the dataset has no names, or if the list of the shard's names is missing or damaged.
        """
        if not self.shards.manifest.source_names:
            return None
        shard, local = self.shards.locate(sample)
        names = self._source_names(shard)
        return names[local] if names else None

    def _read_source_names(self, shard: int) -> list[str]:
        """Names of a shard's samples; empty if they cannot be read, which is logged."""
        name = self.shards.shard_name(shard)
        try:
            found = read_source_names(
                self.shards.shard_storage, name, self.shards.shards["sha256"][shard].tobytes().hex()
            )
            if len(found) != int(self.shards.samples[shard]):
                raise ValueError("it has another number of samples than the shard")
        except (UserError, ValueError) as error:
            uri = f"{self._uri(shard)}{SOURCE_NAMES_SUFFIX}"
            logger.warning("%s cannot be used (%s), so the source names of its samples are unknown", uri, error)
            return []
        return [name for _, name in found]

    def num_bytes(self, first: int, count: int) -> int:
        """Approximate number of bytes that `read` fetches for these samples."""
        total, stop = 0, min(first + count, self.shards.manifest.num_samples)
        while first < stop:
            shard, local = self.shards.locate(first)
            take = min(stop - first, int(self.shards.samples[shard]) - local)
            if self.shards.has_table(shard):
                total += int(self.shards.bytes[shard]) * take // int(self.shards.samples[shard])
            else:
                start, end, _ = self.shards.byte_range(shard, local, take)
                total += end - start
            first += take
        return total

    def _read(self, shard: int, first: int, count: int, store: Store) -> Sequence[Sample]:
        return (self._listed if self.shards.has_table(shard) else self._contiguous)(shard, first, count, store)

    def _contiguous(self, shard: int, first: int, count: int, store: Store) -> list[Sample]:
        """Samples of a shard whose samples are contiguous, read as one range."""
        start, end, covered = self.shards.byte_range(shard, first, count)

        def check(data: bytes) -> None:
            self.shards.check(shard, start, data)

        name = self.shards.shard_name(shard)
        parsed = parse_samples(store(self._checked(shard, start, end, check)), name)
        found = parsed[first - covered : first - covered + count]
        if len(found) != count:
            raise DamagedShard(f"{name} does not hold the samples that its index lists; index it again")
        return found

    def _listed(self, shard: int, first: int, count: int, store: Store) -> list[Sample]:
        """Samples of a shard with a table of members. Members that are close together are read in one request."""
        table = self._table(shard)
        low, high = np.searchsorted(table["sample"], [first, first + count])
        rows = table[low:high]
        contents: dict[int, memoryview] = {}
        by_offset = np.argsort(rows["offset"], kind="stable")
        ends = np.maximum.accumulate(rows["offset"][by_offset] + rows["size"][by_offset])
        gaps = rows["offset"][by_offset][1:].astype(np.int64) - ends[:-1].astype(np.int64)
        for group in np.split(by_offset, np.flatnonzero(gaps > _JOIN_GAP) + 1):
            start = int(rows["offset"][group[0]])
            end = int((rows["offset"][group] + rows["size"][group]).max())
            offsets = rows["offset"][group].astype(np.int64) - start
            spans = {
                i: slice(offset, offset + size)
                for i, offset, size in zip(group.tolist(), offsets.tolist(), rows["size"][group].tolist(), strict=True)
            }

            def check(data: bytes, spans: dict[int, slice] = spans) -> None:
                view = memoryview(data)
                for i, span in spans.items():
                    if xxhash.xxh3_64_intdigest(view[span]) & 0xFFFFFFFF != int(rows["digest"][i]):
                        raise DamagedShard(
                            f"member {rows['key'][i]!r} of {self.shards.shard_name(shard)} has changed since it was "
                            "indexed; index or pack it again"
                        )

            view = store(self._checked(shard, start, end, check))
            contents.update((i, view[span]) for i, span in spans.items())
        samples: list[Sample] = []
        for number, members in groupby(range(len(rows)), key=lambda i: int(rows["sample"][i])):
            listed = list(members)
            key = bytes(rows["key"][listed[0]]).decode("utf-8", "backslashreplace")
            suffixes = (bytes(rows["suffix"][i]).decode("utf-8", "surrogateescape") for i in listed)
            assert number == first + len(samples)
            samples.append(Sample(key, {s: contents[i] for s, i in zip(suffixes, listed, strict=True)}))
        return samples

    def _checked(self, shard: int, start: int, end: int, check: _Check) -> bytes:
        """Bytes of a shard that pass the check, from the cache or the storage."""

        def check_all(data: bytes) -> None:
            if len(data) != end - start:
                raise DamagedShard(f"{self._uri(shard)} is truncated before byte {end}; pack it again")
            check(data)

        if self._cache is None:
            return self._fetch(shard, start, end, check_all)
        name = hashlib.sha256(f"{self._dataset}:{shard}:{start}:{end}".encode()).hexdigest()
        return self._cache.get(name, lambda: self._fetch(shard, start, end, check_all), check_all)

    def _fetch(self, shard: int, start: int, end: int, check: _Check) -> bytes:
        for attempt in range(1, _CHECKED_READS + 1):
            name = self.shards.shard_name(shard)
            data, etag = self.shards.shard_storage.read_version(name, start, end - start)
            version = xxhash.xxh3_64_intdigest(etag.encode()) or 1
            known = int(self._versions[shard])
            if known not in (0, version):
                raise Replaced(
                    f"{self._uri(shard)} was replaced while it was being read; index or pack the dataset again and "
                    "start a new run"
                )
            try:
                check(data)
            except DamagedShard as error:
                if attempt == _CHECKED_READS:
                    self._check_size(shard)
                    raise
                logger.warning("%s; reading again", error)
                continue
            self._versions[shard] = version
            return data
        raise AssertionError("unreachable")

    def _check_size(self, shard: int) -> None:
        """Raise Replaced if a shard's size differs from the index: it is then another shard, not a damaged one."""
        name, size = self.shards.shard_name(shard), int(self.shards.bytes[shard])
        last, _ = self.shards.shard_storage.read_version(name, size - 1, 2)
        if len(last) != 1:
            raise Replaced(
                f"{self._uri(shard)} was replaced after it was indexed, when it had {size} bytes; "
                "index or pack the dataset again and start a new run"
            )

    def _uri(self, shard: int) -> str:
        return f"{self.shards.shard_storage.uri}/{self.shards.shard_name(shard)}"


class _Check(Protocol):
    def __call__(self, data: bytes) -> None:
        """Raise DamagedShard if the bytes are wrong."""
