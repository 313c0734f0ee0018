"""Copies of batches to the training device, which overlap the work that is queued there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the host to the device. A copy to a GPU is asynchronous."""
    if device.type == "cuda":
        values = values.pin_memory()  # copies from pageable memory are synchronous
    return values.to(device, non_blocking=True)


class Sent(NamedTuple):
    """A batch on its way to the device."""

    images: Tensor
    ready: torch.cuda.Event | None
    """Passed when the batch has arrived; None on devices whose copies are synchronous."""


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

    def send(self, images: Tensor) -> Sent:
        """Start the copy of a batch.

        Args:
            images: in pinned memory, or allocated and filled within `queue`.
        """
        with self.queue():
            images = images.to(self.device, non_blocking=True)
            return Sent(images, self._stream.record_event() if self._stream else None)

    def hand_over(self, sent: Sent) -> Tensor:
        """Make the caller's stream wait for a batch, but not for later ones. The calling thread does not wait."""
        if sent.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent.ready)
            sent.images.record_stream(current)  # do not reuse its memory before the caller's stream is done with it
        return sent.images
