"""From the loader's threads to the device that trains, beside the work that is queued there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values computed on the host, on the device; the program does not wait for the copy to a GPU."""
    if device.type == "cuda":
        values = values.pin_memory()  # a copy from other memory is one that is waited for
    return values.to(device, non_blocking=True)


class DeviceFeed:
    """Copies (or decodes) batches on a CUDA stream of its own, so that they arrive while earlier steps still compute.

    On other devices it does nothing but the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Inside, the calling thread queues its work on the stream of the batches to come."""
        with torch.cuda.stream(self._stream):  # None: nothing happens
            yield

    @property
    def copies_ahead(self) -> bool:
        """Whether a batch that is sent before it is asked for arrives meanwhile."""
        return self._stream is not None

    def send(self, images: Tensor) -> Tensor:
        """Start the copy of a batch; what is returned is to be handed over before it is used.

        Args:
            images: in pinned memory, or filled inside `queue`.
        """
        with self.queue():
            return images.to(self.device, non_blocking=True)

    def hand_over(self, images: Tensor) -> Tensor:
        """A batch that was sent, for the caller's stream, which waits for it; the caller does not."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            images.record_stream(current)  # its memory is free again when the caller's stream is done with it
        return images
