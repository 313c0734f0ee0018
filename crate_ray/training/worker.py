"""What the training loop needs from the process that it runs in. training/ray provides it on a cluster, bare_loop
without one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from crate_ray.storage.interface import Storage

if TYPE_CHECKING:
    from crate_ray.training.task import Assembled


class StepDecision(NamedTuple):
    """What all workers do before the next step."""

    stop: bool
    """Save a checkpoint and return."""
    check_preemption: bool
    """Ask, all together, whether a node is about to be taken away."""


class StartFacts(NamedTuple):
    """What people want to know when a run starts."""

    device: str
    """Name of the hardware that rank 0 trains on."""
    workers: int
    threads: int
    """CPU threads of each worker."""
    parameters: int
    """Trained parameters of the model."""
    images: int
    """Training samples."""
    batch_size: int
    """Global batch."""


class Reporter(Protocol):
    """Sends what a worker reports to those who follow the run. No method waits for them, except `flush`."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Report metrics after a number of steps; only rank 0's count."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Report a picture; only rank 0's count."""

    def started(self, step: int, facts: StartFacts) -> None:
        """Report that training starts, after so many steps; only rank 0's counts."""

    def first_step(self, step: int, loss: float, seconds: float) -> None:
        """Report one of the first steps after a start and how long it took; only rank 0's count."""

    def note(self, step: int, text: str) -> None:
        """Report an event as a sentence for people; only rank 0's count."""

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Report unusable samples of this rank: cause by key."""

    def flush(self) -> None:
        """Wait until everything reported so far has reached the driver."""


class Control(Protocol):
    """Shows the driver what the worker is doing, and passes on its requests."""

    def decide(self, step: int) -> StepDecision:
        """What all workers do before a step. A collective call, before every step."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Inside, the worker is doing what `name` says."""

    def finish(self) -> None:
        """Wait for the last decision; all workers have called `decide` equally often."""


class Checkpoints(Protocol):
    """Saves and restores the state of a run. `restore` and `save` are collective calls."""

    def restore(self, assembled: Assembled) -> int:
        """Load the state to start from, if there is one; returns the number of steps that it has done."""

    def save(self, step: int, assembled: Assembled, validation_loss: float | None = None) -> None:
        """Copy the state and save the copy in the background."""

    def raise_failure(self) -> None:
        """Raise what the save in the background has failed with, if it has."""

    def finish(self) -> None:
        """Wait until everything is saved."""


@dataclass(frozen=True)
class Worker:
    """One process of a run, as the training loop sees it."""

    rank: int
    world_size: int
    device: torch.device
    scratch: Path
    """Local folder of this process."""
    reporter: Reporter
    control: Control
    checkpoints: Checkpoints
    preemption_notice: Callable[[], bool]
    """Whether a node of the run is about to be taken away. A collective call."""
    run: Storage | None = None
    """The run's folder; None if the run keeps nothing."""
