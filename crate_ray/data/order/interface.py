"""What a source of encoded samples asks of an order of samples."""

from __future__ import annotations

from typing import Protocol

from crate_ray.data.order.dataset_order import Draw, Window


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
