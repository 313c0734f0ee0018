"""What training tells of itself: losses and norms of its steps, rates between log steps, which samples a batch had."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from crate_ray.memory import peak_memory

KEYS_DIGEST_RANGE = 2**48  # a float, as which metrics travel, holds these exactly


def keys_digest(keys: Sequence[str], first_slot: int) -> int:
    """A worker's part of the digest of a global batch: which sample is in which slot.

    The sum of all workers' parts, modulo KEYS_DIGEST_RANGE, is the same for every number of workers.
    """
    parts = (
        xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"), slot)
        for slot, key in enumerate(keys, first_slot)
    )
    return sum(parts) % KEYS_DIGEST_RANGE


class Stopwatch:
    """Time since the last lap, and the parts of it that were spent waiting for data and on logging.

    Args:
        device: that trains; its work is waited for before a log step is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lap, self._waited, self._logged = time.perf_counter(), 0.0, 0.0
        self._logging_since: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the worker waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Inside, the worker logs; a lap may be taken there."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._logging_since = time.perf_counter()
        yield
        self._logged += time.perf_counter() - self._logging_since
        self._logging_since = None

    def lap(self, steps: int, batch_size: int) -> dict[str, float]:
        """Rates since the last lap, and a new lap: images/s of all workers, seconds per step, shares of the time."""
        now = time.perf_counter()
        seconds = max(now - self._lap, 1e-9)
        if self._logging_since is not None:
            self._logged, self._logging_since = self._logged + now - self._logging_since, now
        rates = {
            "images_per_second": steps * batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_wait_share": self._waited / seconds,
            "logging_share": self._logged / seconds,
        }
        self._lap, self._waited, self._logged = now, 0.0, 0.0
        return rates


class StepLog:
    """Loss and gradient norm of every step since the last look, kept on the device so that no step waits for it.

    Args:
        capacity: most steps between two looks.
        device: that trains.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._losses_S, self._norms_S = torch.zeros(2, capacity, device=device)
        self._count = 0

    def add(self, loss_sum: Tensor, norm: Tensor) -> None:
        """Note a step: this worker's sum of sample losses, and the norm of the global gradient."""
        self._losses_S[self._count] = loss_sum
        self._norms_S[self._count] = norm
        self._count += 1

    def take(self, batch_size: int, world_size: int) -> tuple[list[float], list[float]]:
        """Mean losses over the global batches and gradient norms, step by step, and start anew. A collective call."""
        losses_S, count = self._losses_S[: self._count].clone(), self._count
        self._count = 0
        if world_size > 1:
            dist.all_reduce(losses_S)
        return (losses_S / batch_size).tolist(), self._norms_S[:count].tolist()


def used_memory(device: torch.device) -> dict[str, float]:
    """Most memory that this process has had so far, in bytes: of the GPU that it trains on, else of the host."""
    if device.type == "cuda":
        return {"gpu_memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    peak = peak_memory()
    return {} if peak is None else {"memory_bytes": float(peak)}
