"""Which sample goes where in which step: pure functions of (seed, epoch, step), the same for every number of workers.

The dataset's samples are numbered through and cut into blocks of b. An epoch is a keyed permutation of the blocks,
laid end to end and dealt to L lanes in windows of g blocks; each window's samples are permuted by their own key. Global
batch t takes the next B / L samples of every lane; worker w of W computes slots [wB/W, (w+1)B/W). Nothing here depends
on W, nothing needs memory for more than a window, and a run's position is one integer, the step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt, model_validator

from crate_ray.config import Settings

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

# Streams of randomness; part of a key, so that no two uses of a seed are related.
STREAM_BLOCKS, STREAM_WINDOW, STREAM_CROP, STREAM_MASK, STREAM_PROBE, STREAM_REPLACEMENT = range(1, 7)

_FEISTEL_ROUNDS = 8
_MIN_FEISTEL_BITS = 6


def mix64(x: UInt64) -> UInt64:
    """Finaliser of splitmix64 (Steele et al. 2014): a fixed bijection of 64-bit words in which every bit avalanches."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*parts: int | NDArray[np.integer]) -> UInt64:
    """Hash of integers, broadcast over arrays, in at least one dimension. The order of the parts matters."""
    state = np.full(1, 0x9E3779B97F4A7C15, np.uint64)
    for part in parts:
        word = np.atleast_1d(np.asarray(part)).astype(np.uint64)
        state = mix64((state + np.uint64(0x9E3779B97F4A7C15)) ^ mix64(word + np.uint64(0xD1B54A32D192ED03)))
    return state


def uniform(*parts: int | NDArray[np.integer]) -> NDArray[np.float64]:
    """Counter-based uniform numbers in [0, 1), one for each broadcast combination of the parts, 53 bits each."""
    return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(x: NDArray[np.integer], size: int, key: int, *, inverse: bool = False) -> Int64:
    """Image of positions x under a keyed pseudo-random permutation of [0, size), or its inverse, in O(1) memory.

    A Feistel network over the next power of two, with cycle walking: outputs outside the range are permuted again.
    """
    bits = max((size - 1).bit_length(), _MIN_FEISTEL_BITS)
    out = np.asarray(x).astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        out[todo] = _feistel(out[todo], bits, key, inverse)
        todo = out >= size
    return out.astype(np.int64)


def _feistel(x: UInt64, bits: int, key: int, inverse: bool) -> UInt64:
    """Permutation of words of so many bits, rounds (l, r) → (r, l ⊕ F_i(r)); the halves may differ by a bit."""
    a, b = bits // 2, bits - bits // 2  # widths of the halves; they swap each round, and the number of rounds is even
    left, right = x >> np.uint64(b), x & np.uint64((1 << b) - 1)
    for i in reversed(range(_FEISTEL_ROUNDS)) if inverse else range(_FEISTEL_ROUNDS):
        if inverse:
            left, right, a, b = right ^ (hash64(key, i, left) >> np.uint64(64 - b)), left, b, a
        else:
            left, right, a, b = right, left ^ (hash64(key, i, right) >> np.uint64(64 - a)), b, a
    return (left << np.uint64(b)) | right


def worker_slots(batch_size: int, worker: int, workers: int) -> tuple[int, int]:
    """Half-open range of batch slots that a worker computes; sizes differ by at most one."""
    return worker * batch_size // workers, (worker + 1) * batch_size // workers


class SampleOrder(Settings):
    """The order of one run: fixed when the run starts, stored in its checkpoints."""

    num_samples: PositiveInt
    """Samples in the dataset."""
    batch_size: PositiveInt
    """Global batch B."""
    block_samples: PositiveInt
    """Samples b per block."""
    window_blocks: PositiveInt
    """Blocks g per window of a lane."""
    lanes: PositiveInt
    """Streams L that every batch draws from equally; divides B."""
    seed: int
    """Seed of the permutations."""
    shuffle: bool = True
    """False: blocks and windows keep their order."""

    @model_validator(mode="after")
    def _check(self) -> SampleOrder:
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch size {self.batch_size} is not a multiple of the {self.lanes} lanes; "
                "change training.batch_size or data.lanes"
            )
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"{self.num_samples} samples in blocks of {self.block_samples} over {self.lanes} lanes do not fill one "
                f"batch of {self.batch_size}; use a smaller training.batch_size, data.lanes or data.block_samples"
            )
        return self

    @property
    def num_blocks(self) -> int:
        """Blocks in the dataset; the last one may be ragged."""
        return -(-self.num_samples // self.block_samples)

    @property
    def _deficit(self) -> int:
        """Samples that the ragged block lacks."""
        return self.num_blocks * self.block_samples - self.num_samples

    @property
    def _full_rounds(self) -> int:
        return self.num_blocks // (self.lanes * self.window_blocks)

    @property
    def batches_per_epoch(self) -> int:
        """Batches T per epoch: what the shortest lane fills wherever the ragged block lies, so that T is a constant."""
        tail_blocks = self.num_blocks - self._full_rounds * self.lanes * self.window_blocks
        shortest = (self._full_rounds * self.window_blocks + tail_blocks // self.lanes) * self.block_samples
        return (shortest - self._deficit) // (self.batch_size // self.lanes)

    @property
    def steps_per_window(self) -> int:
        """Steps that one window of a lane lasts for, rounded up."""
        return -(-self.window_blocks * self.block_samples // (self.batch_size // self.lanes))

    def epoch_of(self, step: int) -> int:
        """Epoch that global step belongs to."""
        return step // self.batches_per_epoch

    def samples(self, step: int, start: int = 0, stop: int | None = None) -> Int64:
        """Sample numbers in slots [start, stop) of the global batch of a step; the whole batch by default."""
        stop = self.batch_size if stop is None else stop
        epoch, batch = divmod(step, self.batches_per_epoch)
        per_lane = self.batch_size // self.lanes
        parts = []
        while start < stop:
            lane, offset = divmod(start, per_lane)
            count = min(stop - start, per_lane - offset)
            first = batch * per_lane + offset
            parts.append(self._lane_slice(epoch, lane, first, first + count))
            start += count
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def windows(self, step: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(epoch, lane, round) of every window that slots [start, stop) of a step's batch draw from."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        per_lane = self.batch_size // self.lanes
        found = []
        for lane in range(start // per_lane, -(-stop // per_lane)):
            low, high = max(start - lane * per_lane, 0), min(stop - lane * per_lane, per_lane)
            first = self._round_of(epoch, lane, batch * per_lane + low)
            last = self._round_of(epoch, lane, batch * per_lane + high - 1)
            found += [(epoch, lane, r) for r in range(first, last + 1)]
        return found

    def window_blocks_of(self, epoch: int, lane: int, round_: int) -> Int64:
        """Numbers of the blocks of one window, in the order in which the epoch's sequence holds them."""
        start, count = self._window_span(lane, round_)
        positions = np.arange(start, start + count, dtype=np.int64)
        if not self.shuffle:
            return positions
        return permute(positions, self.num_blocks, _key(self.seed, STREAM_BLOCKS, epoch))

    def window_samples(self, epoch: int, lane: int, round_: int) -> Int64:
        """Sample numbers of one window, in the order in which the lane hands them out."""
        return _window_samples(self, epoch, lane, round_)

    def _window_span(self, lane: int, round_: int) -> tuple[int, int]:
        """First position in the epoch's block sequence, and number of blocks, of a window."""
        lanes, g, rounds = self.lanes, self.window_blocks, self._full_rounds
        if round_ < rounds:
            return (round_ * lanes + lane) * g, g
        tail = self.num_blocks - rounds * lanes * g
        first, last = lane * tail // lanes, (lane + 1) * tail // lanes
        return rounds * lanes * g + first, last - first

    def _round_of(self, epoch: int, lane: int, offset: int) -> int:
        """Round of the window that holds an offset of a lane's stream."""
        size = self.window_blocks * self.block_samples
        ragged_lane, ragged_round = _ragged_window(self, epoch)
        if lane == ragged_lane and offset >= (ragged_round + 1) * size - self._deficit:
            offset += self._deficit
        return min(offset // size, self._full_rounds)

    def _window_start(self, epoch: int, lane: int, round_: int) -> int:
        """Offset in a lane's stream at which a window begins."""
        start = round_ * self.window_blocks * self.block_samples
        ragged_lane, ragged_round = _ragged_window(self, epoch)
        return start - self._deficit if lane == ragged_lane and round_ > ragged_round else start

    def _lane_slice(self, epoch: int, lane: int, start: int, stop: int) -> Int64:
        """Samples at offsets [start, stop) of a lane's stream."""
        parts = []
        while start < stop:
            round_ = self._round_of(epoch, lane, start)
            offset = start - self._window_start(epoch, lane, round_)
            part = self.window_samples(epoch, lane, round_)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)


def _key(*parts: int) -> int:
    return int(hash64(*parts)[0])


@lru_cache(maxsize=64)
def _ragged_window(order: SampleOrder, epoch: int) -> tuple[int, int]:
    """Lane and round that the last block, the only one that may be short, falls into."""
    last, lanes, g = order.num_blocks - 1, order.lanes, order.window_blocks
    position = last
    if order.shuffle:
        key = _key(order.seed, STREAM_BLOCKS, epoch)
        position = int(permute(np.array([last]), order.num_blocks, key, inverse=True)[0])
    round_, rest = divmod(position, lanes * g)
    if round_ < order._full_rounds:
        return rest // g, round_
    tail = order.num_blocks - order._full_rounds * lanes * g
    lane = next(k for k in range(lanes) if k * tail // lanes <= rest < (k + 1) * tail // lanes)
    return lane, round_


@lru_cache(maxsize=256)
def _window_samples(order: SampleOrder, epoch: int, lane: int, round_: int) -> Int64:
    blocks, b = order.window_blocks_of(epoch, lane, round_), order.block_samples
    samples = (blocks[:, None] * b + np.arange(b)).ravel()
    samples = samples[samples < order.num_samples]
    if order.shuffle:
        key = _key(order.seed, STREAM_WINDOW, epoch, lane, round_)
        samples = samples[np.argsort(hash64(key, np.arange(len(samples))), kind="stable")]
    samples.setflags(write=False)
    return samples
