"""Interfaces that the training loop needs from its process. training/ray implements them on Ray, bare_loop without."""

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
    """Actions of all workers before the next step."""

    stop: bool
    """Save a checkpoint and return."""
    check_preemption: bool
    """Check, in a collective call, whether a node is about to be preempted."""


class StartFacts(NamedTuple):
    """Facts that are shown to the user when a run starts."""

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
    """Sends a worker's reports to the run's listeners. Only `flush` waits for them.

    Only rank 0's reports are sent, except for bad samples.
    """

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Report metrics after `step` steps."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Report a picture."""

    def started(self, step: int, facts: StartFacts) -> None:
        """Report that training starts, after `step` steps."""

    def first_step(self, step: int, loss: float, seconds: float) -> None:
        """Report loss and duration of one of the first steps after a start."""

    def note(self, step: int, text: str) -> None:
        """Report an event as a sentence for the user."""

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Report unusable samples of this rank: their causes by key."""

    def flush(self) -> None:
        """Wait until everything reported so far has reached the driver."""


class Control(Protocol):
    """Reports to the driver what the worker is doing, and passes on the driver's requests."""

    def decide(self, step: int) -> StepDecision:
        """Decide what all workers do before a step. A collective call before every step."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Context manager that names what the worker is doing, for the driver."""

    def finish(self) -> None:
        """Wait for the last decision. All workers have called `decide` the same number of times."""


class Checkpoints(Protocol):
    """Saves and restores the state of a run. `restore` and `save` are collective calls."""

    def restore(self, assembled: Assembled) -> int:
        """Load the state to start from, if there is one. Returns the number of steps that are done."""

    def save(self, step: int, assembled: Assembled, validation_loss: float | None = None) -> None:
        """Copy the state and save the copy in the background."""

    def raise_failure(self) -> None:
        """Raise the error of the save in the background, if it has failed."""

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
    """Whether a node of the run is about to be preempted. A collective call."""
    run: Storage | None = None
    """The run's folder; None if the run stores nothing."""
