"""Encoded samples by number: ranged, concurrent, checked reads of the blocks that the order asks for, ahead of use.

A source is told which steps come (`request`) and hands out a step's samples when they have arrived (`take`). What
cannot be read is an `Unreadable` in a sample's place; what must stop a run (a shard deleted or replaced) is raised.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from crate_ray.config import DataConfig
from crate_ray.data.cache import PartCache
from crate_ray.data.order import Int64
from crate_ray.data.shards import INDEX_STRIDE, DamagedShard, Sample, ShardSet, parse_samples
from crate_ray.data.storage import Replaced

logger = logging.getLogger(__name__)

Window = tuple[int, int, int]
"""(epoch, lane, round)"""

_CHECKED_READS = 3  # of bytes whose digest is wrong: they may have changed on the way
_JOIN_GAP = 64 * 2**10  # members closer together than this are read in one request


class Unreadable(NamedTuple):
    """Stands for a sample whose bytes are damaged."""

    key: str
    """Where it lies: the key itself cannot be read."""
    error: str


class Order(Protocol):
    """What a source asks of an order: SampleOrder for training, SequentialOrder for evaluation."""

    @property
    def block_samples(self) -> int:
        """Samples per block."""

    @property
    def steps_per_window(self) -> int:
        """Steps that one window of a lane lasts for."""

    def epoch_of(self, step: int) -> int:
        """Epoch of a step."""

    def samples(self, step: int, start: int, stop: int) -> Int64:
        """Sample numbers of slots [start, stop) of a step."""

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """Windows that these slots draw from."""

    def window_blocks_of(self, epoch: int, lane: int, round_: int) -> Int64:
        """Blocks of a window."""


class ShardReader:
    """Reads samples of a dataset by number; every byte is checked against the index, every shard stays one version."""

    def __init__(self, shards: ShardSet, cache: PartCache | None = None) -> None:
        self.shards = shards
        self._cache = cache
        self._versions = np.zeros(shards.manifest.num_shards, np.uint64)  # hashes of ETags; 0: not read yet
        self._table = lru_cache(maxsize=64)(shards.table)
        self._dataset = shards.manifest.digest()

    def read(self, first: int, count: int) -> list[Sample | Unreadable]:
        """Samples first .. first + count of the dataset, as far as it goes.

        Raises:
            Replaced: a shard was overwritten since it was first read.
            NotFound: a shard was deleted.
        """
        out: list[Sample | Unreadable] = []
        stop = min(first + count, self.shards.manifest.num_samples)
        while first < stop:
            shard, local = self.shards.locate(first)
            take = min(stop - first, int(self.shards.samples[shard]) - local)
            try:
                out += self._read(shard, local, take)
            except DamagedShard:  # only the 16 samples around the damage are lost
                for low in range(local - local % INDEX_STRIDE, local + take, INDEX_STRIDE):
                    begin, end = max(low, local), min(low + INDEX_STRIDE, local + take)
                    try:
                        out += self._read(shard, begin, end - begin)
                    except DamagedShard as error:
                        name = self.shards.shard_name(shard)
                        out += [Unreadable(f"{name}#{number}", str(error)) for number in range(begin, end)]
            first += take
        return out

    def num_bytes(self, first: int, count: int) -> int:
        """Bytes that `read` of these samples fetches, nearly."""
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

    def _read(self, shard: int, first: int, count: int) -> Sequence[Sample]:
        return (self._listed if self.shards.has_table(shard) else self._contiguous)(shard, first, count)

    def _contiguous(self, shard: int, first: int, count: int) -> list[Sample]:
        start, end, covered = self.shards.byte_range(shard, first, count)

        def check(data: bytes) -> None:
            self.shards.check(shard, start, data)

        name = self.shards.shard_name(shard)
        parsed = parse_samples(self._checked(shard, start, end, check), name)
        found = parsed[first - covered : first - covered + count]
        if len(found) != count:
            raise DamagedShard(f"{name} holds other samples than its index says; index it again")
        return found

    def _listed(self, shard: int, first: int, count: int) -> list[Sample]:
        """Samples of a shard with a table: their members, read in as few requests as they lie in."""
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

            def check(data: bytes, group: NDArray[np.int64] = group, start: int = start) -> None:
                view = memoryview(data)
                for i in group.tolist():
                    offset = int(rows["offset"][i]) - start
                    content = contents[i] = view[offset : offset + int(rows["size"][i])]
                    if xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF != int(rows["digest"][i]):
                        raise DamagedShard(
                            f"member {rows['key'][i]!r} of {self.shards.shard_name(shard)} is not what was indexed; "
                            "index or pack it again"
                        )

            check(self._checked(shard, start, end, check))
        samples: list[Sample] = []
        for number, members in groupby(range(len(rows)), key=lambda i: int(rows["sample"][i])):
            listed = list(members)
            key = bytes(rows["key"][listed[0]]).decode("utf-8", "surrogateescape")
            suffixes = (bytes(rows["suffix"][i]).decode("utf-8", "surrogateescape") for i in listed)
            assert number == first + len(samples)
            samples.append(Sample(key, {s: contents[i] for s, i in zip(suffixes, listed, strict=True)}))
        return samples

    def _checked(self, shard: int, start: int, end: int, check: _Check) -> bytes:
        """Bytes of a shard that pass the check, from the cache or from the storage."""
        if self._cache is None:
            return self._fetch(shard, start, end, check)
        name = hashlib.sha256(f"{self._dataset}:{shard}:{start}:{end}".encode()).hexdigest()
        return self._cache.get(name, lambda: self._fetch(shard, start, end, check), check)

    def _fetch(self, shard: int, start: int, end: int, check: _Check) -> bytes:
        for attempt in range(1, _CHECKED_READS + 1):
            name = self.shards.shard_name(shard)
            data, etag = self.shards.shard_storage.read_version(name, start, end - start)
            version = xxhash.xxh3_64_intdigest(etag.encode()) or 1
            known = int(self._versions[shard])
            if known not in (0, version):
                raise Replaced(
                    f"{self.shards.shard_storage.uri}/{name} was replaced while it is being read; "
                    "index or pack the dataset again and start a new run"
                )
            try:
                if len(data) != end - start:
                    raise DamagedShard(
                        f"{self.shards.shard_storage.uri}/{name} is truncated: it ends before byte {end}; pack it again"
                    )
                check(data)
            except DamagedShard as error:
                if attempt == _CHECKED_READS:
                    raise
                logger.warning("%s; reading again", error)
                continue
            self._versions[shard] = version
            return data
        raise AssertionError("unreachable")


class _Check(Protocol):
    def __call__(self, data: bytes) -> None:
        """Raise DamagedShard for wrong bytes."""


def shard_reader(shards: ShardSet, data: DataConfig) -> ShardReader:
    """Reader with the disk cache that the settings name."""
    return ShardReader(shards, PartCache(Path(data.cache_dir), data.cache_bytes) if data.cache_dir else None)


def _samples_per_part(shards: ShardSet, part_bytes: int) -> int:
    """Samples to read in one request, a multiple of what an entry of the index covers."""
    mean = shards.manifest.total_bytes / shards.manifest.num_samples
    return max(1, int(part_bytes / mean / INDEX_STRIDE)) * INDEX_STRIDE


class StreamedSource:
    """Blocks of the worker's lanes, fetched by threads as many windows ahead as the buffer holds, dropped when used."""

    def __init__(self, reader: ShardReader, order: Order, slots: tuple[int, int], data: DataConfig) -> None:
        self._reader, self._order, self._slots = reader, order, slots
        self._buffer_bytes, self._held = data.buffer_bytes, 0
        self._part = min(order.block_samples, _samples_per_part(reader.shards, data.part_bytes))
        self._pool = ThreadPoolExecutor(data.fetch_threads, "fetch")
        self._windows: dict[Window, tuple[list[int], int]] = {}  # blocks, bytes
        self._parts: dict[tuple[int, int, int], Future[list[Sample | Unreadable]]] = {}  # (epoch, block, part of it)

    def request(self, step: int) -> bool:
        """Start fetching what a step needs, as far as the buffer has room; returns at once, whether all is on its way.

        There is always room for each lane's current window and the next.
        """
        for window in self._order.windows(step, *self._slots):
            if window not in self._windows:
                blocks, size = self._size(window)
                ahead = sum(lane == window[1] for _, lane, _ in self._windows)
                if ahead >= 2 and self._held + size > self._buffer_bytes:
                    return False
                self._fetch(window, blocks, size)
        return True

    def take(self, step: int) -> tuple[Int64, list[Sample | Unreadable]]:
        """Numbers and encoded samples of a step's slots; waits for what has not arrived. Steps follow each other."""
        needed = self._order.windows(step, *self._slots)
        for window in needed:
            if window not in self._windows:
                self._fetch(window, *self._size(window))
        numbers = self._order.samples(step, *self._slots)
        epoch, size, part = self._order.epoch_of(step), self._order.block_samples, self._part
        samples = []
        for number in numbers.tolist():
            block, rest = divmod(number, size)
            samples.append(self._parts[epoch, block, rest // part].result()[rest % part])
        self._drop_before(self._order.windows(step + 1, *self._slots))
        return numbers, samples

    def _size(self, window: Window) -> tuple[list[int], int]:
        blocks = self._order.window_blocks_of(*window).tolist()
        size = self._order.block_samples
        return blocks, sum(self._reader.num_bytes(block * size, size) for block in blocks)

    def _fetch(self, window: Window, blocks: list[int], num_bytes: int) -> None:
        self._windows[window] = (blocks, num_bytes)
        self._held += num_bytes
        size = self._order.block_samples
        for block in blocks:
            for i, first in enumerate(range(0, size, self._part)):
                count = min(self._part, size - first)
                self._parts[window[0], block, i] = self._pool.submit(self._reader.read, block * size + first, count)

    def _drop_before(self, needed: Iterable[Window]) -> None:
        current: dict[int, tuple[int, int]] = {}
        for epoch, lane, round_ in needed:
            current[lane] = min(current.get(lane, (epoch, round_)), (epoch, round_))
        for window in [w for w in self._windows if w[1] in current and (w[0], w[2]) < current[w[1]]]:
            blocks, num_bytes = self._windows.pop(window)
            self._held -= num_bytes
            for block in blocks:
                for i in range(-(-self._order.block_samples // self._part)):
                    del self._parts[window[0], block, i]

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class ResidentSource:
    """Parts of shards, each fetched once by threads and kept: for data that fits memory."""

    def __init__(self, reader: ShardReader, order: Order, slots: tuple[int, int], data: DataConfig) -> None:
        self._reader, self._order, self._slots = reader, order, slots
        self._part = _samples_per_part(reader.shards, data.part_bytes)
        self._pool = ThreadPoolExecutor(data.fetch_threads, "fetch")
        self._loaded: dict[tuple[int, int], Future[list[Sample | Unreadable]]] = {}  # (shard, part of it)

    def request(self, step: int) -> bool:
        """Start fetching the parts that a step needs; returns at once, always True."""
        self._places(self._order.samples(step, *self._slots))
        return True

    def take(self, step: int) -> tuple[Int64, list[Sample | Unreadable]]:
        """Numbers and encoded samples of a step's slots; waits for what has not arrived."""
        numbers = self._order.samples(step, *self._slots)
        return numbers, [part.result()[i] for part, i in self._places(numbers)]

    def _places(self, numbers: Int64) -> list[tuple[Future[list[Sample | Unreadable]], int]]:
        """The part that each sample lies in, and its place there; parts that are not there yet are begun."""
        first_sample = self._reader.shards.first_sample
        owners = np.searchsorted(first_sample, numbers, "right") - 1
        parts, rest = np.divmod(numbers - first_sample[owners], self._part)
        out = []
        for shard, part, i in zip(owners.tolist(), parts.tolist(), rest.tolist(), strict=True):
            future = self._loaded.get((shard, part))
            if future is None:
                begin = int(first_sample[shard]) + part * self._part
                count = min(self._part, int(first_sample[shard + 1]) - begin)
                future = self._loaded[shard, part] = self._pool.submit(self._reader.read, begin, count)
            out.append((future, i))
        return out

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)
