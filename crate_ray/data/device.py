"""Copies of batches to the training device, which overlap the work that is queued there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the host to the device. A copy to a GPU is asynchronous."""
    if device.type == "cuda":
        values = values.pin_memory()  # copies from pageable memory are synchronous
    return values.to(device, non_blocking=True)


class DeviceFeed:
    """Copies (or decodes) batches on a CUDA stream of its own, so that this overlaps the computation of earlier steps.

    On other devices, it only copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Within this context, the calling thread queues its work on the feed's stream."""
        with torch.cuda.stream(self._stream):  # no effect if it is None
            yield

    @property
    def copies_ahead(self) -> bool:
        """Whether copies overlap computation, so that it pays to send a batch before it is needed."""
        return self._stream is not None

    def send(self, images: Tensor) -> Tensor:
        """Start the copy of a batch. Call `hand_over` on the result before using it.

        Args:
            images: in pinned memory, or filled within `queue`.
        """
        with self.queue():
            return images.to(self.device, non_blocking=True)

    def hand_over(self, images: Tensor) -> Tensor:
        """Make the caller's stream wait for a batch that was sent. The calling thread does not wait."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            images.record_stream(current)  # do not reuse its memory before the caller's stream is done with it
        return images
