"""Source of samples for data that does not fit in memory: blocks are fetched ahead of use within a byte budget."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from queue import Empty, SimpleQueue

import numpy as np
import torch

from crate_ray.config import DataConfig
from crate_ray.data.format.samples import Sample
from crate_ray.data.order.dataset_order import Draw, Window
from crate_ray.data.order.interface import Order
from crate_ray.data.read.mixture import MixtureReader
from crate_ray.data.read.shard_reader import Unreadable

logger = logging.getLogger(__name__)

_RELEASE_SECONDS = 10.0  # if no bytes are freed within this time, stop waiting and use the disk


@dataclass(eq=False)
class _InMemory:
    """Count of a part's bytes that are or will be in memory. Only the planning thread changes it."""

    num_bytes: int
    is_passed: bool = False
    """Whether only batches that wait for decoding still use the part, and no window contains it."""


@dataclass
class _Part:
    """Consecutive samples that are read together."""

    content: Future[list[Sample | Unreadable]]
    memory: _InMemory
    windows: int = 1
    """Windows that contain it: the end of one epoch and the start of the next can share a block."""


class StreamedSource:
    """Fetches the blocks of the worker's lanes in threads, as many windows ahead as the buffer has room for.

    Bytes count until nothing refers to them. This includes bytes of passed windows whose samples are not decoded yet.
    If the current windows of the lanes exceed the buffer, the rest and the next windows are stored on disk. Only one
    thread may call `request` and `take`.
    """

    def __init__(self, reader: MixtureReader, order: Order, slots: tuple[int, int], data: DataConfig) -> None:
        self._reader, self._order, self._slots = reader, order, slots
        self._buffer_bytes, self._folder = data.buffer_bytes, data.cache_dir or tempfile.gettempdir()
        self._held = self._passed = 0  # bytes in memory, and how many of them belong to passed parts
        # The thread that drops the last reference fills this queue. Taking a lock there could deadlock.
        self._freed: SimpleQueue[tuple[_InMemory, int]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(data.fetch_threads, "fetch")
        self._windows: dict[Window, list[range]] = {}  # parts of each window
        self._parts: dict[int, _Part] = {}  # by first sample
        self._starts = np.empty(0, np.int64)  # first samples of the parts, sorted
        self._measured = lru_cache(maxsize=64)(self._measure)  # called at every step until there is room
        self._is_closed = self._uses_disk = self._disk_failed = False

    def request(self, step: int) -> bool:
        """Start fetching a step's samples, if the buffer has room. Does not block. Returns whether all are requested.

        The current window of a lane is always fetched, at the latest in `take`, and to disk if the buffer is full.
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
        """Numbers and encoded samples of a step's slots. Waits until they have arrived.

        Call it for all steps in order.
        """
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
        positions = zip(owners.tolist(), (draw.samples - self._starts[owners]).tolist(), strict=True)
        samples = [loaded[part][i] for part, i in positions]
        self._drop_before(self._order.windows(step + 1, *self._slots))
        return draw, samples

    def _measure(self, window: Window) -> tuple[list[tuple[range, int]], int]:
        """Parts of a window with their sizes in bytes, and the sum of the sizes."""
        parts = [part for block in self._order.blocks(window) for part in self._reader.parts(block)]
        sizes = [self._reader.num_bytes(part) for part in parts]
        return list(zip(parts, sizes, strict=True)), sum(sizes)

    def _has_room(self, window: Window) -> bool:
        return self._held + self._measured(window)[1] <= self._buffer_bytes

    def _wait_for_room(self, window: Window) -> None:
        """Wait until there is room for a window, while batches with bytes of passed windows are decoded."""
        while self._passed and not self._has_room(window) and not self._is_closed:
            if not self._count_freed(_RELEASE_SECONDS):
                return

    def _count_freed(self, seconds: float = 0.0) -> bool:
        """Subtract bytes that have been freed. Waits up to `seconds` for some. Returns whether there were any."""
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
                self._warn_about_disk(step)
            memory = _InMemory(num_bytes if fits else 0)
            self._held += memory.num_bytes
            content = self._pool.submit(self._read, part, memory, memory.num_bytes, on_disk=not fits)
            self._parts[part.start] = _Part(content, memory)
        self._starts = np.sort(np.fromiter(self._parts, np.int64))

    def _warn_about_disk(self, step: int) -> None:
        needed = sum(self._measured(window)[1] for window in self._order.windows(step, *self._slots))
        logger.warning(
            "a worker draws from %.0f MiB at a time, more than data.buffer_bytes (%.0f MiB); the rest is stored in "
            "unnamed files under %s, which is slower: raise data.buffer_bytes or use more workers",
            needed / 2**20, self._buffer_bytes / 2**20, self._folder,
        )  # fmt: skip

    def _read(self, part: range, memory: _InMemory, reserved: int, on_disk: bool) -> list[Sample | Unreadable]:
        """In a thread: read a part into memory, for which `reserved` bytes are counted, or to disk."""

        def store(data: bytes) -> memoryview:
            nonlocal reserved
            if on_disk and not self._disk_failed:
                try:
                    return _on_disk(data, self._folder)
                except OSError as error:
                    self._disk_failed = True
                    logger.warning("cannot write to %s (%s): data beyond data.buffer_bytes stays in memory",
                                   self._folder, error)  # fmt: skip
            array = np.frombuffer(data, np.uint8)
            weakref.finalize(array, self._freed.put, (memory, len(data))).atexit = False
            reserved -= len(data)
            return array.data

        samples = self._reader.read(part, store)
        self._freed.put((memory, reserved))  # correct the count if less was read than estimated
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
        self._freed.put((_InMemory(0), 0))  # wake up a waiting thread
        self._pool.shutdown(wait=False, cancel_futures=True)


def _on_disk(data: bytes, folder: str) -> memoryview:
    """Map the bytes from an unnamed file, so that the kernel can evict their pages. Raises OSError if that fails."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(data)
        file.flush()
        # Unlike mmap, torch does not keep the file open: there can be more parts than the limit of open files.
        return torch.from_file(file.name, size=len(data), dtype=torch.uint8).numpy().data
