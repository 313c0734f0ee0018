"""Encoded samples by number: ranged, concurrent, checked reads of the blocks that the order asks for, ahead of use.

A source is told which steps come (`request`) and hands out a step's samples when they have arrived (`take`). What
cannot be read is an `Unreadable` in a sample's place; what must stop a run (a shard deleted or replaced) is raised.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np
import torch
import xxhash

from crate_ray.config import DataConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.format.samples import Sample, parse_samples
from crate_ray.data.format.tar import DamagedShard
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.sequence import Draw, Int64, Window
from crate_ray.storage.cache import PartCache
from crate_ray.storage.interface import Replaced

logger = logging.getLogger(__name__)

_CHECKED_READS = 3  # of bytes whose digest is wrong: they may have changed on the way
_JOIN_GAP = 64 * 2**10  # members closer together than this are read in one request
_RELEASE_SECONDS = 10.0  # without a batch that was decoded, its bytes are not waited for any longer

Keep = Callable[[bytes], memoryview]
"""Where bytes that were read are kept: gives the view that samples' members become parts of."""


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

    def read(self, first: int, count: int, keep: Keep = memoryview) -> list[Sample | Unreadable]:
        """Samples first .. first + count of the dataset, as far as it goes, their bytes as `keep` keeps them.

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
                out += self._read(shard, local, take, keep)
            except DamagedShard:  # only the 16 samples around the damage are lost
                for low in range(local - local % INDEX_STRIDE, local + take, INDEX_STRIDE):
                    begin, end = max(low, local), min(low + INDEX_STRIDE, local + take)
                    try:
                        out += self._read(shard, begin, end - begin, keep)
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

    def _read(self, shard: int, first: int, count: int, keep: Keep) -> Sequence[Sample]:
        return (self._listed if self.shards.has_table(shard) else self._contiguous)(shard, first, count, keep)

    def _contiguous(self, shard: int, first: int, count: int, keep: Keep) -> list[Sample]:
        start, end, covered = self.shards.byte_range(shard, first, count)

        def check(data: bytes) -> None:
            self.shards.check(shard, start, data)

        name = self.shards.shard_name(shard)
        parsed = parse_samples(keep(self._checked(shard, start, end, check)), name)
        found = parsed[first - covered : first - covered + count]
        if len(found) != count:
            raise DamagedShard(f"{name} holds other samples than its index says; index it again")
        return found

    def _listed(self, shard: int, first: int, count: int, keep: Keep) -> list[Sample]:
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
                            f"member {rows['key'][i]!r} of {self.shards.shard_name(shard)} is not what was indexed; "
                            "index or pack it again"
                        )

            view = keep(self._checked(shard, start, end, check))
            contents.update((i, view[span]) for i, span in spans.items())
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

    def read(self, samples: range, keep: Keep = memoryview) -> list[Sample | Unreadable]:
        """Consecutive samples of one dataset, their bytes as `keep` keeps them. Raises as `ShardReader.read` does."""
        dataset, first = self.mixture.locate(samples.start)
        return self._readers[dataset].read(first, len(samples), keep)

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


@dataclass(eq=False)
class _InMemory:
    """Bytes of a part that are in memory, or will be: the planning thread's count."""

    num_bytes: int
    is_passed: bool = False
    """No window holds the part any more, only batches that wait for decoding."""


@dataclass
class _Part:
    """Consecutive samples that are read together."""

    content: Future[list[Sample | Unreadable]]
    memory: _InMemory
    windows: int = 1
    """Windows that hold it: the end of one epoch and the begin of the next can share a block."""


class StreamedSource:
    """Blocks of the worker's lanes, fetched by threads as many windows ahead as the buffer holds, dropped when used.

    Bytes count until nothing refers to them: batches that wait for decoding hold those of windows that are passed. What
    the lanes' current windows need beyond the buffer lies on disk, and then what the next ones do, too. One thread
    calls `request` and `take`.
    """

    def __init__(self, reader: MixtureReader, order: Order, slots: tuple[int, int], data: DataConfig) -> None:
        self._reader, self._order, self._slots = reader, order, slots
        self._buffer_bytes, self._folder = data.buffer_bytes, data.cache_dir or tempfile.gettempdir()
        self._held = self._passed = 0  # bytes in memory, and those of them that are of passed parts
        # Filled by whichever thread drops the last reference, which no lock may stop.
        self._freed: SimpleQueue[tuple[_InMemory, int]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(data.fetch_threads, "fetch")
        self._windows: dict[Window, list[range]] = {}  # their parts
        self._parts: dict[int, _Part] = {}  # by first sample
        self._starts = np.empty(0, np.int64)  # of the parts, in order
        self._measured = lru_cache(maxsize=64)(self._measure)  # asked again at every step until there is room
        self._is_closed = self._uses_disk = self._disk_failed = False

    def request(self, step: int) -> bool:
        """Start fetching what a step needs, as far as the buffer has room; returns at once, whether all is on its way.

        A lane's current window is fetched in any case, at the latest when it is taken: beyond the buffer to disk.
        """
        self._count_freed()
        for window in self._order.windows(step, *self._slots):
            if window not in self._windows:
                of_lane = sum(held.lane == window.lane for held in self._windows)
                may_use_disk = self._uses_disk and not self._disk_failed and of_lane < 2
                if (of_lane or self._passed) and not may_use_disk and not self._has_room(window):
                    return False
                self._fetch(window, step)
        return True

    def take(self, step: int) -> tuple[Draw, list[Sample | Unreadable]]:
        """Numbers and encoded samples of a step's slots; waits for what has not arrived. Steps follow each other."""
        needed = self._order.windows(step, *self._slots)
        if not self._windows.keys() >= set(needed):
            self._drop_before(needed)
            for window in needed:
                if window not in self._windows:
                    self._wait_for_room(window)
                    self._fetch(window, step)
        draw = self._order.draw(step, *self._slots)
        owners = np.searchsorted(self._starts, draw.samples, "right") - 1
        loaded = {part: self._parts[self._starts[part]].content.result() for part in np.unique(owners).tolist()}
        places = zip(owners.tolist(), (draw.samples - self._starts[owners]).tolist(), strict=True)
        samples = [loaded[part][i] for part, i in places]
        self._drop_before(self._order.windows(step + 1, *self._slots))
        return draw, samples

    def _measure(self, window: Window) -> tuple[list[tuple[range, int]], int]:
        """Parts of a window with their bytes, and the bytes of all."""
        parts = [part for block in self._order.blocks(window) for part in self._reader.parts(block)]
        sizes = [self._reader.num_bytes(part) for part in parts]
        return list(zip(parts, sizes, strict=True)), sum(sizes)

    def _has_room(self, window: Window) -> bool:
        return self._held + self._measured(window)[1] <= self._buffer_bytes

    def _wait_for_room(self, window: Window) -> None:
        """Wait until batches that hold bytes of passed windows are decoded, as far as a window needs their room."""
        while self._passed and not self._has_room(window) and not self._is_closed:
            if not self._count_freed(_RELEASE_SECONDS):
                return

    def _count_freed(self, seconds: float = 0.0) -> bool:
        """Count the bytes that nothing refers to any more, if any within so many seconds."""
        found = False
        with suppress(Empty):
            while True:
                memory, num_bytes = self._freed.get(timeout=0.0 if found else seconds)
                memory.num_bytes -= num_bytes
                self._held -= num_bytes
                self._passed -= num_bytes if memory.is_passed else 0
                found = True
        return found

    def _fetch(self, window: Window, step: int) -> None:
        parts, _ = self._measured(window)
        self._windows[window] = [part for part, _ in parts]
        for part, num_bytes in parts:
            if (held := self._parts.get(part.start)) is not None:
                held.windows += 1
                continue
            fits = self._held + num_bytes <= self._buffer_bytes
            if not fits and not self._uses_disk:
                self._uses_disk = True
                self._tell_of_disk(step)
            memory = _InMemory(num_bytes if fits else 0)
            self._held += memory.num_bytes
            content = self._pool.submit(self._read, part, memory, memory.num_bytes, on_disk=not fits)
            self._parts[part.start] = _Part(content, memory)
        self._starts = np.sort(np.fromiter(self._parts, np.int64))

    def _tell_of_disk(self, step: int) -> None:
        needed = sum(self._measured(window)[1] for window in self._order.windows(step, *self._slots))
        logger.warning(
            "a worker draws from windows of %.0f MiB at a time, more than data.buffer_bytes (%.0f MiB) has room for; "
            "the rest waits in unnamed files under %s, which is slower: raise data.buffer_bytes, or use more workers",
            needed / 2**20, self._buffer_bytes / 2**20, self._folder,
        )  # fmt: skip

    def _read(self, part: range, memory: _InMemory, reserved: int, on_disk: bool) -> list[Sample | Unreadable]:
        """Thread: samples of a part, in memory for which so many bytes are counted, or on disk."""

        def keep(data: bytes) -> memoryview:
            nonlocal reserved
            if on_disk and not self._disk_failed:
                try:
                    return _on_disk(data, self._folder)
                except OSError as error:
                    self._disk_failed = True
                    logger.warning("%s takes no files (%s): what data.buffer_bytes has no room for stays in memory",
                                   self._folder, error)  # fmt: skip
            array = np.frombuffer(data, np.uint8)
            weakref.finalize(array, self._freed.put, (memory, len(data))).atexit = False
            reserved -= len(data)
            return array.data

        samples = self._reader.read(part, keep)
        self._freed.put((memory, reserved))  # what was read may have another size than was counted
        return samples

    def _drop_before(self, needed: Iterable[Window]) -> None:
        current: dict[int, Window] = {}
        for window in needed:
            current[window.lane] = min(current.get(window.lane, window), window)
        for window in [w for w in self._windows if w.lane in current and w < current[w.lane]]:
            for part in self._windows.pop(window):
                held = self._parts[part.start]
                held.windows -= 1
                if not held.windows:
                    held.memory.is_passed = True
                    self._passed += held.memory.num_bytes
                    del self._parts[part.start], held
            self._starts = np.sort(np.fromiter(self._parts, np.int64))
        self._count_freed()

    def close(self) -> None:
        """Stop fetching."""
        self._is_closed = True
        self._freed.put((_InMemory(0), 0))  # wakes who waits
        self._pool.shutdown(wait=False, cancel_futures=True)


def _on_disk(data: bytes, folder: str) -> memoryview:
    """The same bytes, mapped from a file that nobody else sees: pages that the kernel can take out of memory.

    Raises OSError when they cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(data)
        file.flush()
        # Unlike mmap, torch keeps no file open: there may be more parts than a process may have open.
        return torch.from_file(file.name, size=len(data), dtype=torch.uint8).numpy().data


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
