"""Source of samples for data that fits in memory. Every part of the shards is fetched once."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from crate_ray.config import DataConfig
from crate_ray.data.format.samples import Sample
from crate_ray.data.order.dataset_order import Draw
from crate_ray.data.order.hashing import Int64
from crate_ray.data.order.interface import Order
from crate_ray.data.read.mixture import MixtureReader
from crate_ray.data.read.shard_reader import Unreadable

_ABSENT = Unreadable("", "not read yet")


class ResidentSource:
    """Fetches parts of the shards in threads when they are first needed, and keeps them in memory."""

    def __init__(self, reader: MixtureReader, order: Order, slots: tuple[int, int], data: DataConfig) -> None:
        self._reader, self._order, self._slots = reader, order, slots
        self._pool = ThreadPoolExecutor(data.fetch_threads, "fetch")
        self._parts = reader.all_parts()
        self._starts = np.array([part.start for part in self._parts])
        self._loading: dict[int, Future[list[Sample | Unreadable]]] = {}  # by number of the part
        self._samples: list[Sample | Unreadable] = [_ABSENT] * self._parts[-1].stop  # by number of the sample
        self._missing = set(range(len(self._parts)))  # parts whose samples are not in the list yet

    def request(self, step: int) -> bool:
        """Start fetching the parts that a step needs. Does not block. Returns True."""
        if self._missing:
            self._begin(self._order.draw(step, *self._slots).samples)
        return True

    def take(self, step: int) -> tuple[Draw, list[Sample | Unreadable]]:
        """Numbers and encoded samples of a step's slots. Waits until they have arrived."""
        draw = self._order.draw(step, *self._slots)
        if self._missing:
            for part in self._begin(draw.samples):
                span = self._parts[part]
                self._samples[span.start : span.stop] = self._loading.pop(part).result()
                self._missing.remove(part)
        return draw, [self._samples[number] for number in draw.samples.tolist()]

    def _begin(self, numbers: Int64) -> list[int]:
        """Start fetching the missing parts with these samples. Returns their numbers."""
        parts = np.unique(np.searchsorted(self._starts, numbers, "right") - 1).tolist()
        missing = [part for part in parts if part in self._missing]
        for part in missing:
            if part not in self._loading:
                self._loading[part] = self._pool.submit(self._reader.read, self._parts[part])
        return missing

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)
