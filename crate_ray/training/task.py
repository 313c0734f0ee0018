"""What a run trains, and how that is measured: the part in which pretraining and fine-tuning differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crate_ray.config import FinetuneConfig, ImageModelConfig, PretrainConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import Batch
from crate_ray.data.order.mixture import Mixture
from crate_ray.models.exported import Normalizer
from crate_ray.runs.record import RunRecord
from crate_ray.training.parallel import micro_steps_of, parallelize
from crate_ray.training.probe_batch import Look
from crate_ray.training.step import compile_layers, largest_micro_batch, should_compile


@dataclass(frozen=True)
class Place:
    """Where a task is at work: one worker of a run."""

    record: RunRecord
    """The run's record."""
    mixture: Mixture
    """Training data."""
    validation: ShardSet | None
    """Held-out data."""
    rank: int
    """Of the worker."""
    world_size: int
    """Workers."""
    device: torch.device
    """That trains."""
    autocast: torch.dtype | None
    """Of forward passes; None for none."""
    normalizer: Normalizer
    """On the device."""


class Task(ABC):
    """One worker's model, its inputs and its measurements; training.loop does all else, the same for every task."""

    config_class: ClassVar[type[PretrainConfig] | type[FinetuneConfig]]
    """Settings of its runs."""
    model: nn.Module
    """What is trained, on the device."""
    layers: Sequence[nn.Module]
    """Its layers, which are compiled, and sharded with FSDP2, one by one."""
    image_model: ImageModelConfig
    """The images that it takes."""
    together: int = 1
    """So many samples in a row of a global batch stay on one worker."""
    flops_per_image: float | None = None
    """Operations of a training step per image, where they are known."""
    look_every: int | None = None
    """Steps between two calls of `look`; None for none."""

    @abstractmethod
    def __init__(self, config: Any, place: Place) -> None:
        """Build the model with the weights that a seed gives; config is of config_class."""

    @abstractmethod
    def build_optimizer(self) -> torch.optim.Optimizer:
        """A fused optimiser; called when the model is in the form in which it trains."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """What the model is called with: normalised images, and what it needs beside them, sliced as a tensor is."""

    @abstractmethod
    def blank(self, count: int) -> tuple[Tensor, Any]:
        """Inputs of the same shapes for so many samples, of zeros."""

    @abstractmethod
    def validate(self, bad: dict[str, str] | None = None) -> dict[str, float]:
        """Metrics over the held-out data, with `validation_loss`. A collective call.

        `bad` takes up this worker's held-out samples that cannot be used: cause by key.
        """

    def look(self, step: int) -> Look | None:
        """What the model shows of itself. A collective call where the model is sharded, of rank 0 alone otherwise."""
        return None


class Assembled(NamedTuple):
    """A task in the form in which it trains."""

    task: Task
    trained: nn.Module
    """What steps are made with: the model, wrapped or sharded where several workers train."""
    optimizer: torch.optim.Optimizer
    micro_steps: int
    """Forward passes per optimiser step."""
    arithmetic: tuple[str, ...]
    """How layers compute, as it turned out, which decides how they round: one entry where all workers are alike."""


def assemble(task_class: type[Task], config: PretrainConfig | FinetuneConfig, place: Place) -> Assembled:
    """Build a task's model, compile its layers and make it parallel, as the settings say. A collective call."""
    task, training = task_class(config, place), config.training
    compiled = should_compile(training.compile, place.device)
    if compiled:
        blank = task.blank(largest_micro_batch(training, place.world_size))
        compiled = compile_layers(task.model, task.layers, blank, place.autocast)
    trained = parallelize(
        task.model,
        task.layers,
        config.scaling.strategy,
        world_size=place.world_size,
        device=place.device,
        autocast=place.autocast,
    )
    micro_steps = micro_steps_of(training, task.model, place.world_size)
    return Assembled(task, trained, task.build_optimizer(), micro_steps, _arithmetic(compiled, place))


def _arithmetic(compiled: bool, place: Place) -> tuple[str, ...]:
    kinds = [f"{layers} layers in {dtype}" for layers in ("eager", "compiled") for dtype in ("float32", "bfloat16")]
    workers = torch.zeros(len(kinds), dtype=torch.int64, device=place.device)
    workers[2 * compiled + (place.autocast is not None)] = 1
    if place.world_size > 1:
        dist.all_reduce(workers)
    return tuple(kind for kind, number in zip(kinds, workers.tolist(), strict=True) if number)
