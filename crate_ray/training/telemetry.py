"""Measurements of training: losses and norms of the steps, rates between log steps, digests of batches, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from crate_ray.memory import peak_memory
from crate_ray.runs import metrics

KEYS_DIGEST_RANGE = 2**48  # metrics are floats, which represent these integers exactly


def keys_digest(keys: Sequence[str], first_slot: int) -> int:
    """A worker's part of the digest of a global batch, which depends on the sample in each slot.

    The sum of all workers' parts, modulo KEYS_DIGEST_RANGE, is the same for every number of workers.
    """
    parts = (
        xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"), slot)
        for slot, key in enumerate(keys, first_slot)
    )
    return sum(parts) % KEYS_DIGEST_RANGE


class Stopwatch:
    """Time since the last lap, and the parts of it that were spent waiting for data and logging.

    Args:
        device: the device that trains; a log step waits for its work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._logging_since: float | None = None
        self.start()

    def start(self) -> None:
        """Start the first lap now."""
        self._lap, self._waited, self._logged = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager for the time in which the worker waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Context manager for the time in which the worker logs. A lap may be taken inside."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._logging_since = time.perf_counter()
        yield
        self._logged += time.perf_counter() - self._logging_since
        self._logging_since = None

    def lap(self, steps: int, batch_size: int) -> dict[str, float]:
        """Rates of the current lap as metrics: images/s of all workers, seconds per step, shares of the time.

        Starts a new lap.
        """
        now = time.perf_counter()
        seconds = max(now - self._lap, 1e-9)
        if self._logging_since is not None:
            self._logged, self._logging_since = self._logged + now - self._logging_since, now
        rates = {
            metrics.IMAGES_PER_SECOND: steps * batch_size / seconds,
            metrics.STEP_SECONDS: seconds / steps,
            metrics.DATA_WAIT_SHARE: self._waited / seconds,
            metrics.LOGGING_SHARE: self._logged / seconds,
        }
        self._lap, self._waited, self._logged = now, 0.0, 0.0
        return rates


class StepLog:
    """Loss and gradient norm of every step since the last log step, kept on the device so that no step waits for it.

    Args:
        capacity: largest number of steps between two log steps.
        device: the device that trains.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._losses_S, self._norms_S = torch.zeros(2, capacity, device=device)
        self._count = 0

    def add(self, loss_sum: Tensor, norm: Tensor) -> None:
        """Add a step: this worker's sum of sample losses, and the norm of the global gradient."""
        self._losses_S[self._count] = loss_sum
        self._norms_S[self._count] = norm
        self._count += 1

    def take(self, batch_size: int, world_size: int) -> tuple[list[float], list[float]]:
        """Mean losses over the global batches and gradient norms by step; empties the log. A collective call."""
        losses_S, count = self._losses_S[: self._count].clone(), self._count
        self._count = 0
        if world_size > 1:
            dist.all_reduce(losses_S)
        return (losses_S / batch_size).tolist(), self._norms_S[:count].tolist()


def used_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in bytes, as a metric: of the GPU that it trains on, else of the host."""
    if device.type == "cuda":
        return {metrics.GPU_MEMORY_BYTES: float(torch.cuda.max_memory_allocated(device))}
    peak = peak_memory()
    return {} if peak is None else {metrics.MEMORY_BYTES: float(peak)}
