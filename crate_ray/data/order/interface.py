"""The interface of an order of samples, as the loader and the sources use it."""

from __future__ import annotations

from typing import Protocol

from crate_ray.data.order.dataset_order import Draw, Window


class Order(Protocol):
    """SampleOrder for training, SequentialOrder for evaluation."""

    @property
    def steps_per_window(self) -> int:
        """Number of steps that a window of a lane lasts."""

    def describe(self) -> dict[str, object]:
        """Everything the order depends on, as plain data."""

    def draw(self, step: int, start: int, stop: int) -> Draw:
        """Samples of slots [start, stop) of a step."""

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """Windows that these slots draw from."""

    def blocks(self, window: Window) -> list[range]:
        """Sample numbers of each block of a window."""
