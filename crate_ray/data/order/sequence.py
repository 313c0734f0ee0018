"""The order of a run's samples, as pure functions of (seed, epoch, step). It is the same for every number of workers.

The samples of a dataset are numbered consecutively and cut into blocks of b samples. In each epoch, the blocks are
permuted with a key and dealt to L lanes, in windows of g blocks. The samples of each window are permuted with their own
key. The dataset's stream takes a sample of each lane in turn. Global batch t takes the next samples of the stream, or
of the streams of several datasets by their weights. Worker w of W computes slots [wB/W, (w+1)B/W). Nothing else depends
on W, nothing needs memory for more than a window, and the position of a run is one integer, the step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from crate_ray.data.order.dataset_order import DatasetOrder, Draw, OrderSettings, Window
from crate_ray.data.order.hashing import Int64


def worker_slots(batch_size: int, worker: int, workers: int, together: int = 1) -> tuple[int, int]:
    """Half-open range of batch slots that a worker computes. The workers' numbers of slots differ by at most one group.

    Groups of `together` adjacent slots stay on one worker; it must divide the batch size.
    """
    groups = batch_size // together
    return worker * groups // workers * together, (worker + 1) * groups // workers * together


class _Stretch(NamedTuple):
    """Slots of a batch that are adjacent in a lane."""

    dataset: int
    epoch: int
    lane: int
    start: int
    stop: int


class SampleOrder(OrderSettings):
    """The order of one run. It is fixed when the run starts, and stored in its checkpoints."""

    batch_size: PositiveInt
    """Global batch B."""
    datasets: tuple[DatasetOrder, ...] = Field(min_length=1)
    """Order of each dataset."""
    weights: tuple[PositiveInt, ...] = (1,)
    """Relative shares of the datasets."""

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
        """Batches T per epoch. For several datasets: batches with as many samples as all of them have."""
        if len(self.datasets) == 1:
            return self.datasets[0].drawn_per_epoch // self.batch_size
        return max(1, self.num_samples // self.batch_size)

    @property
    def steps_per_window(self) -> int:
        """Number of steps that a window of a lane lasts, rounded up; the minimum over the datasets."""
        drawn = zip(self.datasets, self.weights, strict=True)
        return min(
            -(-d.window_blocks * d.block_samples * d.lanes * sum(self.weights) // (self.batch_size * weight))
            for d, weight in drawn
        )

    def describe(self) -> dict[str, object]:
        """Everything the order depends on, as plain data."""
        return self.model_dump(mode="json")

    @cached_property
    def first_sample(self) -> tuple[int, ...]:
        """Number of the first sample of each dataset, followed by the total number of samples."""
        return tuple(accumulate((dataset.num_samples for dataset in self.datasets), initial=0))

    @cached_property
    def _first_lane(self) -> tuple[int, ...]:
        return tuple(accumulate((dataset.lanes for dataset in self.datasets), initial=0))

    def drawn_before(self, step: int) -> list[int]:
        """Number of samples drawn from each dataset before a step.

        tB samples are drawn before step t. Datasets are served one after the other: each takes its weight's share,
        rounded down, of the samples that the datasets before it have left. So the numbers add up to tB, never decrease,
        and differ from the exact share by at most one.
        """
        left, weight_left = step * self.batch_size, sum(self.weights)
        counts = []
        for weight in self.weights:
            counts.append(left * weight // weight_left)
            left, weight_left = left - counts[-1], weight_left - weight
        return counts

    def draw(self, step: int, start: int = 0, stop: int | None = None) -> Draw:
        """Samples in slots [start, stop) of a step's global batch; by default all of them."""
        stretches = list(self._stretches(step, start, self.batch_size if stop is None else stop))
        samples = [
            self.first_sample[s.dataset] + self.datasets[s.dataset].lane_samples(s.epoch, s.lane, s.start, s.stop)
            for s in stretches
        ]
        epochs = np.repeat([s.epoch for s in stretches], [s.stop - s.start for s in stretches])
        return Draw(np.concatenate(samples) if samples else np.empty(0, np.int64), epochs.astype(np.int64))

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """Windows that slots [start, stop) of a step's batch draw from."""
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
        """Sample numbers of a window, in the order in which its lane yields them."""
        dataset, lane = self._dataset_of(window)
        samples = self.datasets[dataset].window_samples(window.epoch, lane, window.round)
        return self.first_sample[dataset] + samples

    def _dataset_of(self, window: Window) -> tuple[int, int]:
        """Dataset of a window, and its lane's number there."""
        dataset = bisect_right(self._first_lane, window.lane) - 1
        return dataset, window.lane - self._first_lane[dataset]

    def _stretches(self, step: int, start: int, stop: int) -> Iterator[_Stretch]:
        """Slots [start, stop) of a step's batch. Slots are in the order of datasets, epochs, lanes and offsets."""
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
