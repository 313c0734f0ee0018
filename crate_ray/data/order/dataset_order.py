"""The order of one dataset's samples: blocks, lanes and windows of an epoch."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from pydantic import PositiveInt

from crate_ray.config import Settings
from crate_ray.data.order.hashing import STREAM_BLOCKS, STREAM_WINDOW, Int64, hash64, int_key, permute


class Window(NamedTuple):
    """Part of a lane's epoch whose samples are shuffled together."""

    lane: int
    """Number of the lane. Lanes of several datasets are numbered one after the other."""
    epoch: int
    """Epoch of its dataset."""
    round: int
    """Number of the window in its lane and epoch."""


class Draw(NamedTuple):
    """Samples of some slots of a batch."""

    samples: Int64
    """(n,) sample numbers. Several datasets are numbered one after the other."""
    epochs: Int64
    """(n,) epoch, of its dataset, in which each sample is drawn."""


class OrderSettings(Settings):
    """Settings with a cached hash, because they are cache keys that are looked up for every batch."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in type(self).model_fields))

    def __hash__(self) -> int:
        return self._hash


class DatasetOrder(OrderSettings):
    """The order of one dataset's samples."""

    num_samples: PositiveInt
    """Samples in the dataset."""
    block_samples: PositiveInt
    """Samples b per block."""
    window_blocks: PositiveInt
    """Blocks g per window of a lane."""
    lanes: PositiveInt
    """Number L of lanes. Samples are drawn from the lanes in turn."""
    seed: int
    """Seed of the permutations."""
    shuffle: bool = True
    """If false, blocks and the samples in windows keep their order."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the dataset. The last one may be ragged (shorter)."""
        return -(-self.num_samples // self.block_samples)

    @property
    def _deficit(self) -> int:
        """Number of samples that the ragged block lacks."""
        return self.num_blocks * self.block_samples - self.num_samples

    @property
    def _full_rounds(self) -> int:
        return self.num_blocks // (self.lanes * self.window_blocks)

    @property
    def drawn_per_epoch(self) -> int:
        """Number of samples in an epoch: L times the length of the shortest lane.

        The ragged block is counted as if it were always in that lane, so the number is the same for all epochs.
        """
        tail_blocks = self.num_blocks - self._full_rounds * self.lanes * self.window_blocks
        shortest = (self._full_rounds * self.window_blocks + tail_blocks // self.lanes) * self.block_samples
        return max(0, shortest - self._deficit) * self.lanes

    def block_numbers(self, epoch: int, lane: int, round_: int) -> Int64:
        """Numbers of the blocks of a window, in the order of the epoch's sequence."""
        start, count = self._window_span(lane, round_)
        positions = np.arange(start, start + count, dtype=np.int64)
        if not self.shuffle:
            return positions
        return permute(positions, self.num_blocks, int_key(self.seed, STREAM_BLOCKS, epoch))

    def window_samples(self, epoch: int, lane: int, round_: int) -> Int64:
        """Sample numbers of a window, in the order in which the lane yields them."""
        return _window_samples(self, epoch, lane, round_)

    def round_of(self, epoch: int, lane: int, offset: int) -> int:
        """Round of the window at an offset of a lane."""
        size = self.window_blocks * self.block_samples
        ragged_lane, ragged_round = _ragged_window(self, epoch)
        if lane == ragged_lane and offset >= (ragged_round + 1) * size - self._deficit:
            offset += self._deficit
        return min(offset // size, self._full_rounds)

    def lane_samples(self, epoch: int, lane: int, start: int, stop: int) -> Int64:
        """Samples at offsets [start, stop) of a lane."""
        parts = []
        while start < stop:
            round_ = self.round_of(epoch, lane, start)
            offset = start - self._window_start(epoch, lane, round_)
            part = self.window_samples(epoch, lane, round_)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _window_span(self, lane: int, round_: int) -> tuple[int, int]:
        """Position of a window in the epoch's block sequence, and its number of blocks."""
        lanes, g, rounds = self.lanes, self.window_blocks, self._full_rounds
        if round_ < rounds:
            return (round_ * lanes + lane) * g, g
        tail = self.num_blocks - rounds * lanes * g
        first, last = lane * tail // lanes, (lane + 1) * tail // lanes
        return rounds * lanes * g + first, last - first

    def _window_start(self, epoch: int, lane: int, round_: int) -> int:
        """Offset in a lane at which a window starts."""
        start = round_ * self.window_blocks * self.block_samples
        ragged_lane, ragged_round = _ragged_window(self, epoch)
        return start - self._deficit if lane == ragged_lane and round_ > ragged_round else start


@lru_cache(maxsize=64)
def _ragged_window(order: DatasetOrder, epoch: int) -> tuple[int, int]:
    """Lane and round that contain the last block, which may be ragged."""
    last, lanes, g = order.num_blocks - 1, order.lanes, order.window_blocks
    position = last
    if order.shuffle:
        key = int_key(order.seed, STREAM_BLOCKS, epoch)
        position = int(permute(np.array([last]), order.num_blocks, key, inverse=True)[0])
    round_, rest = divmod(position, lanes * g)
    if round_ < order._full_rounds:
        return rest // g, round_
    tail = order.num_blocks - order._full_rounds * lanes * g
    lane = next(k for k in range(lanes) if k * tail // lanes <= rest < (k + 1) * tail // lanes)
    return lane, round_


@lru_cache(maxsize=256)
def _window_samples(order: DatasetOrder, epoch: int, lane: int, round_: int) -> Int64:
    blocks, b = order.block_numbers(epoch, lane, round_), order.block_samples
    samples = (blocks[:, None] * b + np.arange(b)).ravel()
    samples = samples[samples < order.num_samples]
    if order.shuffle:
        key = int_key(order.seed, STREAM_WINDOW, epoch, lane, round_)
        samples = samples[np.argsort(hash64(key, np.arange(len(samples))), kind="stable")]
    samples.setflags(write=False)
    return samples
