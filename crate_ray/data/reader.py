"""Encoded samples by number: ranged, concurrent, checked reads of the blocks that the order asks for, ahead of use.

A source is told which steps come (`request`) and hands out a step's samples when they have arrived (`take`). What
cannot be read is an `Unreadable` in a sample's place; what must stop a run (a shard deleted or replaced) is raised.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from crate_ray.config import DataConfig
from crate_ray.data.cache import PartCache
from crate_ray.data.mixture import Mixture
from crate_ray.data.order import Draw, Int64, Window
from crate_ray.data.shards import INDEX_STRIDE, DamagedShard, Sample, ShardSet, parse_samples
from crate_ray.data.storage import Replaced

logger = logging.getLogger(__name__)

_CHECKED_READS = 3  # of bytes whose digest is wrong: they may have changed on the way
_JOIN_GAP = 64 * 2**10  # members closer together than this are read in one request


class Unreadable(NamedTuple):
    """Stands for a sample whose bytes are damaged."""

    key: str
    """Where it lies: the key itself cannot be read."""
    error: str

    @property
    def members(self) -> dict[str, memoryview]:
        """None of them."""
        return {}


_ABSENT = Unreadable("", "not read yet")


class Order(Protocol):
    """What a source asks of an order: SampleOrder for training, SequentialOrder for evaluation."""

    @property
    def steps_per_window(self) -> int:
        """Steps that one window of a lane lasts for."""

    def describe(self) -> dict[str, object]:
        """All that the order depends on, as plain data."""

    def draw(self, step: int, start: int, stop: int) -> Draw:
        """Samples of slots [start, stop) of a step."""

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """Windows that these slots draw from."""

    def blocks(self, window: Window) -> list[range]:
        """Sample numbers of each block of a window."""


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
            Replaced: a shard was overwritten since it was first read, or is not as large as the one that was indexed.
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

        def check_all(data: bytes) -> None:
            if len(data) != end - start:
                raise DamagedShard(f"{self._uri(shard)} is truncated: it ends before byte {end}; pack it again")
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
                    f"{self._uri(shard)} was replaced while it is being read; "
                    "index or pack the dataset again and start a new run"
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
        """Raise Replaced where a shard has not the size that was indexed: then it is not damaged, but another one."""
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
        """Raise DamagedShard for wrong bytes."""


class MixtureReader:
    """Reads samples of a mixture by number."""

    def __init__(self, mixture: Mixture, data: DataConfig) -> None:
        cache = PartCache(Path(data.cache_dir), data.cache_bytes) if data.cache_dir else None
        self.mixture = mixture
        self._readers = [ShardReader(dataset, cache) for dataset in mixture.datasets]
        self._part_bytes = data.part_bytes

    def read(self, samples: range) -> list[Sample | Unreadable]:
        """Consecutive samples of one dataset. Raises as `ShardReader.read` does."""
        dataset, first = self.mixture.locate(samples.start)
        return self._readers[dataset].read(first, len(samples))

    def num_bytes(self, samples: range) -> int:
        """Bytes that `read` of these samples fetches, nearly."""
        dataset, first = self.mixture.locate(samples.start)
        return self._readers[dataset].num_bytes(first, len(samples))

    def parts(self, samples: range) -> list[range]:
        """What to read in one request each, of consecutive samples of one dataset."""
        manifest = self.mixture.datasets[self.mixture.locate(samples.start)[0]].manifest
        # A multiple of what an entry of the index covers.
        mean = manifest.total_bytes / manifest.num_samples
        size = max(1, int(self._part_bytes / mean / INDEX_STRIDE)) * INDEX_STRIDE
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def all_parts(self) -> list[range]:
        """The same of the whole mixture, shard by shard."""
        return [
            part
            for begin, dataset in zip(self.mixture.first_sample, self.mixture.datasets, strict=False)
            for first, last in pairwise(dataset.first_sample.tolist())
            for part in self.parts(range(begin + first, begin + last))
        ]


@dataclass
class _Part:
    """Consecutive samples that are read together."""

    content: Future[list[Sample | Unreadable]]
    windows: int = 1
    """Windows that hold it: the end of one epoch and the begin of the next can share a block."""


class StreamedSource:
    """Blocks of the worker's lanes, fetched by threads as many windows ahead as the buffer holds, dropped when used."""

    def __init__(self, reader: MixtureReader, order: Order, slots: tuple[int, int], data: DataConfig) -> None:
        self._reader, self._order, self._slots = reader, order, slots
        self._buffer_bytes, self._held = data.buffer_bytes, 0
        self._pool = ThreadPoolExecutor(data.fetch_threads, "fetch")
        self._windows: dict[Window, tuple[list[range], int]] = {}  # parts, bytes
        self._parts: dict[int, _Part] = {}  # by first sample
        self._starts = np.empty(0, np.int64)  # of the parts, in order
        self._size = lru_cache(maxsize=64)(self._measure)  # asked again at every step until there is room

    def request(self, step: int) -> bool:
        """Start fetching what a step needs, as far as the buffer has room; returns at once, whether all is on its way.

        There is always room for each lane's current window.
        """
        for window in self._order.windows(step, *self._slots):
            if window not in self._windows:
                blocks, size = self._size(window)
                is_ahead = any(held.lane == window.lane for held in self._windows)
                if is_ahead and self._held + size > self._buffer_bytes:
                    return False
                self._fetch(window, blocks, size)
        return True

    def take(self, step: int) -> tuple[Draw, list[Sample | Unreadable]]:
        """Numbers and encoded samples of a step's slots; waits for what has not arrived. Steps follow each other."""
        for window in self._order.windows(step, *self._slots):
            if window not in self._windows:
                self._fetch(window, *self._size(window))
        draw = self._order.draw(step, *self._slots)
        owners = np.searchsorted(self._starts, draw.samples, "right") - 1
        loaded = {part: self._parts[self._starts[part]].content.result() for part in np.unique(owners).tolist()}
        places = zip(owners.tolist(), (draw.samples - self._starts[owners]).tolist(), strict=True)
        samples = [loaded[part][i] for part, i in places]
        self._drop_before(self._order.windows(step + 1, *self._slots))
        return draw, samples

    def _measure(self, window: Window) -> tuple[list[range], int]:
        """Blocks of a window, and their bytes."""
        blocks = self._order.blocks(window)
        return blocks, sum(map(self._reader.num_bytes, blocks))

    def _fetch(self, window: Window, blocks: list[range], num_bytes: int) -> None:
        parts = [part for block in blocks for part in self._reader.parts(block)]
        self._windows[window] = (parts, num_bytes)
        self._held += num_bytes
        for part in parts:
            held = self._parts.get(part.start)
            if held is None:
                self._parts[part.start] = _Part(self._pool.submit(self._reader.read, part))
            else:
                held.windows += 1
        self._starts = np.sort(np.fromiter(self._parts, np.int64))

    def _drop_before(self, needed: Iterable[Window]) -> None:
        current: dict[int, Window] = {}
        for window in needed:
            current[window.lane] = min(current.get(window.lane, window), window)
        for window in [w for w in self._windows if w.lane in current and w < current[w.lane]]:
            parts, num_bytes = self._windows.pop(window)
            self._held -= num_bytes
            for part in parts:
                self._parts[part.start].windows -= 1
                if not self._parts[part.start].windows:
                    del self._parts[part.start]
            self._starts = np.sort(np.fromiter(self._parts, np.int64))

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class ResidentSource:
    """Parts of shards, each fetched once by threads and kept: for data that fits memory."""

    def __init__(self, reader: MixtureReader, order: Order, slots: tuple[int, int], data: DataConfig) -> None:
        self._reader, self._order, self._slots = reader, order, slots
        self._pool = ThreadPoolExecutor(data.fetch_threads, "fetch")
        self._parts = reader.all_parts()
        self._starts = np.array([part.start for part in self._parts])
        self._loading: dict[int, Future[list[Sample | Unreadable]]] = {}  # by number of the part
        self._samples: list[Sample | Unreadable] = [_ABSENT] * self._parts[-1].stop  # by number
        self._missing = set(range(len(self._parts)))  # not in there yet

    def request(self, step: int) -> bool:
        """Start fetching the parts that a step needs; returns at once, always True."""
        if self._missing:
            self._begin(self._order.draw(step, *self._slots).samples)
        return True

    def take(self, step: int) -> tuple[Draw, list[Sample | Unreadable]]:
        """Numbers and encoded samples of a step's slots; waits for what has not arrived."""
        draw = self._order.draw(step, *self._slots)
        if self._missing:
            for part in self._begin(draw.samples):
                span = self._parts[part]
                self._samples[span.start : span.stop] = self._loading.pop(part).result()
                self._missing.remove(part)
        return draw, [self._samples[number] for number in draw.samples.tolist()]

    def _begin(self, numbers: Int64) -> list[int]:
        """The parts with these samples that are not there yet; they are begun."""
        parts = np.unique(np.searchsorted(self._starts, numbers, "right") - 1).tolist()
        missing = [part for part in parts if part in self._missing]
        for part in missing:
            if part not in self._loading:
                self._loading[part] = self._pool.submit(self._reader.read, self._parts[part])
        return missing

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)
