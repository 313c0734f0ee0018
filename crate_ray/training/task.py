"""A task: what a run trains and how that is measured. Pretraining and fine-tuning differ in their tasks alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crate_ray.config import FinetuneConfig, ImageModelConfig, PretrainConfig
from crate_ray.data.batch import Batch
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.order.mixture import Mixture
from crate_ray.models.exported import Normalizer
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import Storage
from crate_ray.training.parallel import micro_steps_of, parallelize
from crate_ray.training.probe_batch import ProbeResult
from crate_ray.training.step import compile_layers, largest_micro_batch, should_compile


@dataclass(frozen=True)
class WorkerContext:
    """What a task knows of the worker and the run that it belongs to."""

    record: RunRecord
    """The run's record."""
    mixture: Mixture
    """Training data."""
    validation: ShardSet | None
    """Held-out data."""
    rank: int
    world_size: int
    device: torch.device
    """The device that trains."""
    autocast: torch.dtype | None
    """Dtype of autocast in forward passes; None for no autocast."""
    normalizer: Normalizer
    """On the device."""
    run: Storage | None = None
    """The run's folder; None if the run keeps nothing."""


class Task(ABC):
    """One worker's model, its inputs and its measurements. The rest is training.loop's, the same for every task."""

    config_class: ClassVar[type[PretrainConfig] | type[FinetuneConfig]]
    """Settings of its runs."""
    model: nn.Module
    """What is trained, on the device."""
    layers: Sequence[nn.Module]
    """Its layers, which are compiled, and sharded with FSDP2, one by one."""
    image_model: ImageModelConfig
    """The images that it takes."""
    together: int = 1
    """Number of consecutive samples of a global batch that stay on one worker."""
    flops_per_image: float | None = None
    """Floating-point operations of a training step per image, if known."""
    probe_every: int | None = None
    """Steps between two calls of `probe`; None for no calls."""

    @abstractmethod
    def __init__(self, config: Any, context: WorkerContext) -> None:
        """Build the model with the initial weights of the config's seed; config is of config_class."""

    @abstractmethod
    def build_optimizer(self) -> torch.optim.Optimizer:
        """A fused optimizer; called after the model was compiled and made parallel."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Arguments of the model: normalised images, and a second argument that can be sliced as a tensor."""

    @abstractmethod
    def blank(self, count: int) -> tuple[Tensor, Any]:
        """Inputs of zeros for so many samples."""

    @abstractmethod
    def validate(self, bad: dict[str, str] | None = None) -> dict[str, float]:
        """Metrics on the held-out data, by their names in runs.metrics, VALIDATION_LOSS among them. A collective call.

        Adds this worker's unusable held-out samples to `bad`: cause by key.
        """

    def probe(self, step: int) -> ProbeResult | None:
        """Pictures and measures by layer. A collective call if the model is sharded, else for rank 0 alone."""
        return None


class Assembled(NamedTuple):
    """A task, ready to train."""

    task: Task
    trained: nn.Module
    """The module that steps call: the model, wrapped or sharded if several workers train."""
    optimizer: torch.optim.Optimizer
    micro_steps: int
    """Forward passes per optimizer step."""
    arithmetic: tuple[str, ...]
    """How the layers compute, which decides how they round: one entry if all workers are alike."""


def assemble(task_class: type[Task], config: PretrainConfig | FinetuneConfig, context: WorkerContext) -> Assembled:
    """Build a task's model, compile its layers and make it parallel, as configured. A collective call."""
    task, training = task_class(config, context), config.training
    compiled = should_compile(training.compile, context.device)
    if compiled:
        blank = task.blank(largest_micro_batch(training, context.world_size))
        compiled = compile_layers(task.model, task.layers, blank, context.autocast)
    trained = parallelize(
        task.model,
        task.layers,
        config.scaling.strategy,
        world_size=context.world_size,
        device=context.device,
        autocast=context.autocast,
    )
    micro_steps = micro_steps_of(training, task.model, context.world_size)
    return Assembled(task, trained, task.build_optimizer(), micro_steps, _arithmetic(compiled, context))


def _arithmetic(compiled: bool, context: WorkerContext) -> tuple[str, ...]:
    kinds = [f"{layers} layers in {dtype}" for layers in ("eager", "compiled") for dtype in ("float32", "bfloat16")]
    workers = torch.zeros(len(kinds), dtype=torch.int64, device=context.device)
    workers[2 * compiled + (context.autocast is not None)] = 1
    if context.world_size > 1:
        dist.all_reduce(workers)
    return tuple(kind for kind, number in zip(kinds, workers.tolist(), strict=True) if number)
