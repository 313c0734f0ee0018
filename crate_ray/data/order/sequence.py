"""Which sample goes where in which step: pure functions of (seed, epoch, step), the same for every number of workers.

A dataset's samples are numbered through and cut into blocks of b. An epoch is a keyed permutation of the blocks,
laid end to end and dealt to L lanes in windows of g blocks; each window's samples are permuted by their own key. The
dataset's stream takes a sample of each lane in turn. Global batch t takes the next samples of the stream, or of those
of several datasets by their weights; worker w of W computes slots [wB/W, (w+1)B/W). Nothing here depends on W, nothing
needs memory for more than a window, and a run's position is one integer, the step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import accumulate, takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

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
    ints = tuple(int(part) for part in takewhile(lambda part: isinstance(part, int), parts))
    state = _hash_of_ints(ints)
    for part in parts[len(ints) :]:
        state = _absorb(state, part)
    return state


@lru_cache(maxsize=4096)
def _hash_of_ints(parts: tuple[int, ...]) -> UInt64:
    """(1,): nearly all hashes begin with the same few keys, and of so little NumPy's calls take as long as of much."""
    state = np.full(1, 0x9E3779B97F4A7C15, np.uint64)
    for part in parts:
        state = _absorb(state, part)
    state.flags.writeable = False
    return state


def _absorb(state: UInt64, part: int | NDArray[np.integer]) -> UInt64:
    word = np.atleast_1d(np.asarray(part)).astype(np.uint64)
    return mix64((state + np.uint64(0x9E3779B97F4A7C15)) ^ mix64(word + np.uint64(0xD1B54A32D192ED03)))


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


def worker_slots(batch_size: int, worker: int, workers: int, together: int = 1) -> tuple[int, int]:
    """Half-open range of batch slots that a worker computes; sizes differ by at most one.

    With `together`, a divisor of the batch, each so many slots in a row stay on one worker.
    """
    groups = batch_size // together
    return worker * groups // workers * together, (worker + 1) * groups // workers * together


class Window(NamedTuple):
    """A stretch of an epoch whose samples are shuffled together."""

    lane: int
    """Lanes of several datasets are numbered through."""
    epoch: int
    """Epoch of its dataset."""
    round: int
    """Number of the window in its lane and epoch."""


class Draw(NamedTuple):
    """Samples of some slots of a batch."""

    samples: Int64
    """(n,) sample numbers; those of several datasets are numbered through."""
    epochs: Int64
    """(n,) epoch, of its dataset, in which each sample is drawn."""


class _OrderSettings(Settings):
    """Settings that are keys of caches, looked up for every batch: hashed once."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in type(self).model_fields))

    def __hash__(self) -> int:
        return self._hash


class DatasetOrder(_OrderSettings):
    """The order of the samples of one dataset."""

    num_samples: PositiveInt
    """Samples in the dataset."""
    block_samples: PositiveInt
    """Samples b per block."""
    window_blocks: PositiveInt
    """Blocks g per window of a lane."""
    lanes: PositiveInt
    """Number L of lanes that the stream draws from in turn."""
    seed: int
    """Seed of the permutations."""
    shuffle: bool = True
    """False: blocks and windows keep their order."""

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
    def drawn_per_epoch(self) -> int:
        """Most samples that an epoch of the stream can have: L times what the shortest lane holds wherever the ragged
        block lies, so that it is a constant."""
        tail_blocks = self.num_blocks - self._full_rounds * self.lanes * self.window_blocks
        shortest = (self._full_rounds * self.window_blocks + tail_blocks // self.lanes) * self.block_samples
        return max(0, shortest - self._deficit) * self.lanes

    def block_numbers(self, epoch: int, lane: int, round_: int) -> Int64:
        """Numbers of the blocks of one window, in the order in which the epoch's sequence holds them."""
        start, count = self._window_span(lane, round_)
        positions = np.arange(start, start + count, dtype=np.int64)
        if not self.shuffle:
            return positions
        return permute(positions, self.num_blocks, _key(self.seed, STREAM_BLOCKS, epoch))

    def window_samples(self, epoch: int, lane: int, round_: int) -> Int64:
        """Sample numbers of one window, in the order in which the lane hands them out."""
        return _window_samples(self, epoch, lane, round_)

    def round_of(self, epoch: int, lane: int, offset: int) -> int:
        """Round of the window that holds an offset of a lane."""
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
        """First position in the epoch's block sequence, and number of blocks, of a window."""
        lanes, g, rounds = self.lanes, self.window_blocks, self._full_rounds
        if round_ < rounds:
            return (round_ * lanes + lane) * g, g
        tail = self.num_blocks - rounds * lanes * g
        first, last = lane * tail // lanes, (lane + 1) * tail // lanes
        return rounds * lanes * g + first, last - first

    def _window_start(self, epoch: int, lane: int, round_: int) -> int:
        """Offset in a lane at which a window begins."""
        start = round_ * self.window_blocks * self.block_samples
        ragged_lane, ragged_round = _ragged_window(self, epoch)
        return start - self._deficit if lane == ragged_lane and round_ > ragged_round else start


class _Stretch(NamedTuple):
    """Slots of a batch that lie one after the other in a lane."""

    dataset: int
    epoch: int
    lane: int
    start: int
    stop: int


class SampleOrder(_OrderSettings):
    """The order of one run: fixed when the run starts, stored in its checkpoints."""

    batch_size: PositiveInt
    """Global batch B."""
    datasets: tuple[DatasetOrder, ...] = Field(min_length=1)
    """Order of each dataset."""
    weights: tuple[PositiveInt, ...] = (1,)
    """Shares of the datasets, in proportion."""

    @model_validator(mode="after")
    def _check(self) -> SampleOrder:
        if len(self.weights) != len(self.datasets):
            raise ValueError(f"{len(self.weights)} weights for {len(self.datasets)} datasets")
        least = self.batch_size if len(self.datasets) == 1 else 1
        for dataset in self.datasets:
            if dataset.drawn_per_epoch < least:
                raise ValueError(
                    f"{dataset.num_samples} samples in blocks of {dataset.block_samples} over {dataset.lanes} lanes do "
                    f"not fill one batch of {self.batch_size}; use a smaller training.batch_size, data.lanes or "
                    "data.block_samples"
                )
        return self

    @property
    def seed(self) -> int:
        """Seed of the run's randomness."""
        return self.datasets[0].seed

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return sum(dataset.num_samples for dataset in self.datasets)

    @property
    def batches_per_epoch(self) -> int:
        """Batches T per epoch; of several datasets, batches that draw as many samples as they have together."""
        if len(self.datasets) == 1:
            return self.datasets[0].drawn_per_epoch // self.batch_size
        return max(1, self.num_samples // self.batch_size)

    @property
    def steps_per_window(self) -> int:
        """Steps that one window of a lane lasts for, rounded up; the least of all datasets."""
        drawn = zip(self.datasets, self.weights, strict=True)
        return min(
            -(-d.window_blocks * d.block_samples * d.lanes * sum(self.weights) // (self.batch_size * weight))
            for d, weight in drawn
        )

    def describe(self) -> dict[str, object]:
        """All that the order depends on, as plain data."""
        return self.model_dump(mode="json")

    @cached_property
    def first_sample(self) -> tuple[int, ...]:
        """Number of the first sample of each dataset, and at the end the number of all."""
        return tuple(accumulate((dataset.num_samples for dataset in self.datasets), initial=0))

    @cached_property
    def _first_lane(self) -> tuple[int, ...]:
        return tuple(accumulate((dataset.lanes for dataset in self.datasets), initial=0))

    def drawn_before(self, step: int) -> list[int]:
        """Samples that each dataset has given before a step.

        Of the tB samples before step t, a dataset takes the share of its weight, rounded down, in what the datasets
        before it leave. So the numbers add up, none ever falls, and each is within one of its exact share of the rest.
        """
        left, weight_left = step * self.batch_size, sum(self.weights)
        counts = []
        for weight in self.weights:
            counts.append(left * weight // weight_left)
            left, weight_left = left - counts[-1], weight_left - weight
        return counts

    def draw(self, step: int, start: int = 0, stop: int | None = None) -> Draw:
        """Samples in slots [start, stop) of the global batch of a step; the whole batch by default."""
        stretches = list(self._stretches(step, start, self.batch_size if stop is None else stop))
        samples = [
            self.first_sample[s.dataset] + self.datasets[s.dataset].lane_samples(s.epoch, s.lane, s.start, s.stop)
            for s in stretches
        ]
        epochs = np.repeat([s.epoch for s in stretches], [s.stop - s.start for s in stretches])
        return Draw(np.concatenate(samples) if samples else np.empty(0, np.int64), epochs.astype(np.int64))

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """Every window that slots [start, stop) of a step's batch draw from."""
        found = []
        for dataset, epoch, lane, first, last in self._stretches(step, start, stop):
            order = self.datasets[dataset]
            rounds = range(order.round_of(epoch, lane, first), order.round_of(epoch, lane, last - 1) + 1)
            found += [Window(self._first_lane[dataset] + lane, epoch, round_) for round_ in rounds]
        return found

    def blocks(self, window: Window) -> list[range]:
        """Sample numbers of each block of a window."""
        dataset, lane = self._dataset_of(window)
        order, first = self.datasets[dataset], self.first_sample[dataset]
        starts = order.block_numbers(window.epoch, lane, window.round) * order.block_samples
        return [range(first + s, first + min(s + order.block_samples, order.num_samples)) for s in starts.tolist()]

    def window_samples(self, window: Window) -> Int64:
        """Sample numbers of a window, in the order in which its lane hands them out."""
        dataset, lane = self._dataset_of(window)
        samples = self.datasets[dataset].window_samples(window.epoch, lane, window.round)
        return self.first_sample[dataset] + samples

    def _dataset_of(self, window: Window) -> tuple[int, int]:
        """Dataset of a window, and its lane's number there."""
        dataset = bisect_right(self._first_lane, window.lane) - 1
        return dataset, window.lane - self._first_lane[dataset]

    def _stretches(self, step: int, start: int, stop: int) -> Iterator[_Stretch]:
        """What slots [start, stop) of a step's batch consist of: slots of a batch are in the order of datasets, epochs,
        lanes and offsets."""
        before, after = self.drawn_before(step), self.drawn_before(step + 1)
        for number, order in enumerate(self.datasets):
            whole_batches = self.batch_size if len(self.datasets) == 1 else 1
            per_epoch = order.drawn_per_epoch // whole_batches * whole_batches
            position = before[number]
            while position < after[number]:
                epoch, first = divmod(position, per_epoch)
                last = min(first + after[number] - position, per_epoch)
                for lane in range(order.lanes):
                    low, high = -((lane - first) // order.lanes), -((lane - last) // order.lanes)
                    taken = range(low, high)[max(start, 0) : max(stop, 0)]
                    if taken:
                        yield _Stretch(number, epoch, lane, taken.start, taken.stop)
                    start, stop = start - (high - low), stop - (high - low)
                position += last - first


def _key(*parts: int) -> int:
    return int(hash64(*parts)[0])


@lru_cache(maxsize=64)
def _ragged_window(order: DatasetOrder, epoch: int) -> tuple[int, int]:
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
def _window_samples(order: DatasetOrder, epoch: int, lane: int, round_: int) -> Int64:
    blocks, b = order.block_numbers(epoch, lane, round_), order.block_samples
    samples = (blocks[:, None] * b + np.arange(b)).ravel()
    samples = samples[samples < order.num_samples]
    if order.shuffle:
        key = _key(order.seed, STREAM_WINDOW, epoch, lane, round_)
        samples = samples[np.argsort(hash64(key, np.arange(len(samples))), kind="stable")]
    samples.setflags(write=False)
    return samples
