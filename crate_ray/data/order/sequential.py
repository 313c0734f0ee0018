"""The order of evaluation: every stride-th sample of a dataset, or of a part of it, once, shard after shard."""

from __future__ import annotations

import numpy as np

from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.order.dataset_order import Draw, Window


def stride_of(num_samples: int, max_samples: int | None) -> int:
    """The smallest stride with which at most max_samples samples of a dataset are selected."""
    return 1 if max_samples is None else -(-num_samples // max_samples)


class SequentialOrder:
    """Every stride-th of num_samples samples exactly once, in the order of the shards. The last batch may be short.

    `first` is the number of the first sample, for a part of a dataset.
    """

    def __init__(self, num_samples: int, batch_size: int, block_samples: int, stride: int = 1, first: int = 0) -> None:
        self.num_samples, self.batch_size, self.block_samples = -(-num_samples // stride), batch_size, block_samples
        self.stride, self.first = stride, first

    def describe(self) -> dict[str, object]:
        """Everything the order depends on, as plain data."""
        described: dict[str, object] = {
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "stride": self.stride,
        }
        return described | ({"first": self.first} if self.first else {})

    @property
    def num_steps(self) -> int:
        """Batches of one pass."""
        return -(-self.num_samples // self.batch_size)

    @property
    def steps_per_window(self) -> int:
        """Number of steps that a block lasts, at least one."""
        return -(-self.block_samples // self.batch_size)

    def draw(self, step: int, start: int, stop: int) -> Draw:
        """Samples of slots [start, stop) of a step; fewer at the end of the dataset."""
        low, high = self._positions(step, start, stop)
        return Draw(self.first + np.arange(low, high, dtype=np.int64) * self.stride, np.zeros(high - low, np.int64))

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """Windows that these slots draw from. A window is one block."""
        low, high = self._positions(step, start, stop)
        if low == high:
            return [Window(0, 0, step * self.batch_size // self.block_samples)]
        first, last = low // self.block_samples, (high - 1) // self.block_samples
        return [Window(0, 0, block) for block in range(first, last + 1)]

    def blocks(self, window: Window) -> list[range]:
        """Sample numbers to read for a window: one range, or one per sample if they are far apart."""
        begin = window.round * self.block_samples
        positions = range(begin, min(begin + self.block_samples, self.num_samples))
        if not positions:
            return []
        numbers = range(self.first + positions[0] * self.stride, self.first + positions[-1] * self.stride + 1)
        return [numbers] if self.stride < INDEX_STRIDE else [range(n, n + 1) for n in numbers[:: self.stride]]

    def _positions(self, step: int, start: int, stop: int) -> tuple[int, int]:
        first = step * self.batch_size
        return min(first + start, self.num_samples), min(first + stop, self.num_samples)
