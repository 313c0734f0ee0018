"""Encoded samples by number: ranged, concurrent reads of the blocks that the order asks for, a window ahead.

A source is told which steps come (`request`) and hands out a step's samples when they have arrived (`take`).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crate_ray.data.order import Int64
from crate_ray.data.shards import Sample, ShardSet, parse_samples

Window = tuple[int, int, int]
"""(epoch, lane, round)"""

_WINDOWS_PER_LANE = 2  # the current one and the next: what data.buffer_bytes is planned for


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


def read_samples(shards: ShardSet, first: int, count: int) -> list[Sample]:
    """Samples first .. first + count of the dataset, one ranged read for each shard that they lie in."""
    out: list[Sample] = []
    stop = min(first + count, shards.manifest.num_samples)
    while first < stop:
        shard, local = shards.locate(first)
        take = min(stop - first, int(shards.samples[shard]) - local)
        begin, end, covered = shards.byte_range(shard, local, take)
        name = shards.shard_name(shard)
        parsed = parse_samples(shards.storage.read(name, begin, end - begin), name)
        out += parsed[local - covered : local - covered + take]
        first += take
    return out


class StreamedSource:
    """Blocks of the current and the next window of the worker's lanes, fetched by threads and dropped when used up."""

    def __init__(self, shards: ShardSet, order: Order, slots: tuple[int, int], fetch_threads: int) -> None:
        self._shards, self._order, self._slots = shards, order, slots
        self._pool = ThreadPoolExecutor(fetch_threads, "fetch")
        self._windows: dict[Window, list[int]] = {}
        self._blocks: dict[tuple[int, int], Future[list[Sample]]] = {}  # (epoch, block)

    def request(self, step: int) -> bool:
        """Start fetching what a step needs, as far as that is the current and the next window of its lanes.

        Returns at once, whether all of it is on its way.
        """
        for window in self._order.windows(step, *self._slots):
            if window not in self._windows:
                if sum(lane == window[1] for _, lane, _ in self._windows) >= _WINDOWS_PER_LANE:
                    return False
                self._fetch(window)
        return True

    def take(self, step: int) -> tuple[Int64, list[Sample]]:
        """Numbers and encoded samples of a step's slots; waits for what has not arrived. Steps follow each other."""
        needed = self._order.windows(step, *self._slots)
        for window in needed:
            if window not in self._windows:
                self._fetch(window)
        epoch, size = needed[0][0], self._order.block_samples
        numbers = self._order.samples(step, *self._slots)
        samples = [self._blocks[epoch, n // size].result()[n % size] for n in numbers.tolist()]
        self._drop_before(self._order.windows(step + 1, *self._slots))
        return numbers, samples

    def _fetch(self, window: Window) -> None:
        size = self._order.block_samples
        blocks = self._windows[window] = self._order.window_blocks_of(*window).tolist()
        for block in blocks:
            self._blocks[window[0], block] = self._pool.submit(read_samples, self._shards, block * size, size)

    def _drop_before(self, needed: Iterable[Window]) -> None:
        current: dict[int, tuple[int, int]] = {}
        for epoch, lane, round_ in needed:
            current[lane] = min(current.get(lane, (epoch, round_)), (epoch, round_))
        for window in [w for w in self._windows if w[1] in current and (w[0], w[2]) < current[w[1]]]:
            for block in self._windows.pop(window):
                del self._blocks[window[0], block]

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class ResidentSource:
    """Whole shards, each fetched once by threads and kept: for data that fits memory."""

    def __init__(self, shards: ShardSet, order: Order, slots: tuple[int, int], fetch_threads: int) -> None:
        self._shards, self._order, self._slots = shards, order, slots
        self._pool = ThreadPoolExecutor(fetch_threads, "fetch")
        self._loaded: list[Future[list[Sample]] | None] = [None] * shards.manifest.num_shards

    def request(self, step: int) -> bool:
        """Start fetching the shards that a step needs; returns at once, always True."""
        for shard in np.unique(self._shards_of(self._order.samples(step, *self._slots))).tolist():
            self._load(shard)
        return True

    def take(self, step: int) -> tuple[Int64, list[Sample]]:
        """Numbers and encoded samples of a step's slots; waits for what has not arrived."""
        numbers = self._order.samples(step, *self._slots)
        owners = self._shards_of(numbers)
        locals_ = numbers - self._shards.first_sample[owners].astype(np.int64)
        pairs = zip(owners.tolist(), locals_.tolist(), strict=True)
        return numbers, [self._load(shard).result()[local] for shard, local in pairs]

    def _shards_of(self, numbers: Int64) -> NDArray[np.int64]:
        return np.searchsorted(self._shards.first_sample, numbers, "right") - 1

    def _load(self, shard: int) -> Future[list[Sample]]:
        future = self._loaded[shard]
        if future is None:
            first, count = int(self._shards.first_sample[shard]), int(self._shards.samples[shard])
            future = self._loaded[shard] = self._pool.submit(read_samples, self._shards, first, count)
        return future

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)
