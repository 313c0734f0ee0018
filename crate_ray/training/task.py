"""A task defines what a run trains and how it is measured. Pretraining and fine-tuning differ only in their tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crate_ray.config import FinetuneConfig, ImageModelConfig, PretrainConfig, TrainingConfig
from crate_ray.data.batch import Batch
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.order.mixture import Mixture
from crate_ray.errors import UserError
from crate_ray.models import CrateMAE
from crate_ray.models.exported import Normalizer
from crate_ray.models.kernels.float8 import supports_float8, use_float8
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import Storage
from crate_ray.training.compilation import compile_layers, should_compile
from crate_ray.training.parallel import micro_steps_of, parallelize
from crate_ray.training.probe_batch import ProbeResult
from crate_ray.training.step import largest_micro_batch


@dataclass(frozen=True)
class WorkerContext:
    """The worker and the run that a task belongs to."""

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
    """Normalisation of the input, on the device."""
    run: Storage | None = None
    """The run's folder; None if the run stores nothing."""


class Task(ABC):
    """One worker's model, its inputs and its measurements. The rest is in training.loop, the same for all tasks."""

    config_class: ClassVar[type[PretrainConfig] | type[FinetuneConfig]]
    """Class of the settings of its runs."""
    model: nn.Module
    """The model to train, on the device."""
    layers: Sequence[nn.Module]
    """Layers of the model. Each is compiled by itself and, with FSDP2, sharded by itself."""
    image_model: ImageModelConfig
    """Size and channels of the model's images."""
    together: int = 1
    """Number of consecutive samples of a global batch that stay on one worker."""
    flops_per_image: float | None = None
    """Floating-point operations of a training step per image, if known."""
    probe_every: int | None = None
    """Steps between two calls of `probe`; None for no calls."""
    measure_every: int | None = None
    """Steps between additional checkpoints, whose features are measured; None for no additional ones."""

    @abstractmethod
    def __init__(self, config: Any, context: WorkerContext) -> None:
        """Build the model with initial weights from the config's seed. `config` is an instance of config_class."""

    @abstractmethod
    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build an optimizer that `train_step` can use. Called after the model was compiled and made parallel."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Arguments of the model: normalised images, and a second argument that can be sliced like a tensor."""

    @abstractmethod
    def blank(self, count: int) -> tuple[Tensor, Any]:
        """Placeholder inputs for `count` samples."""

    @abstractmethod
    def validate(self, bad: dict[str, str] | None = None) -> dict[str, float]:
        """Metrics on the held-out data, by name (see runs.metrics), including VALIDATION_LOSS. A collective call.

        Adds the cause of each unusable held-out sample of this worker to `bad`, by key.
        """

    def probe(self, step: int) -> Callable[[], ProbeResult] | None:
        """Run the model on fixed samples. A collective call if the model is sharded; otherwise only rank 0 calls it.

        Returns on rank 0 a function that gives pictures and measures by layer. It may be called in another thread, one
        at a time, while training goes on.
        """
        return None


class Assembled(NamedTuple):
    """A task that is ready to train."""

    task: Task
    trained: nn.Module
    """The module that training steps call: the model, wrapped or sharded if there are several workers."""
    optimizer: torch.optim.Optimizer
    micro_steps: int
    """Forward passes per optimizer step."""
    arithmetic: tuple[str, ...]
    """How the layers are computed (eager or compiled, dtype), which affects rounding. One entry if all workers agree.
    """
    notes: tuple[str, ...] = ()
    """Sentences about choices that were made, for the log."""


def assemble(task_class: type[Task], config: PretrainConfig | FinetuneConfig, context: WorkerContext) -> Assembled:
    """Build a task's model, compile its layers and make it parallel, as configured. A collective call."""
    task, training = task_class(config, context), config.training
    compiled = should_compile(training.compile, context.device)
    sharded = config.scaling.strategy == "fsdp" and context.world_size > 1
    images = largest_micro_batch(training, context.world_size)
    notes: tuple[str, ...] = ()
    if training.float8:
        if not (supports_float8(context.device) and context.autocast == torch.bfloat16):
            raise UserError(
                "training.float8 needs training.precision bf16 and an NVIDIA GPU since Hopper (H100), and this worker "
                f"trains on {context.device.type} in {context.autocast or torch.float32}; set training.float8 to false"
            )
        use_float8(task.layers)
    if context.device.type == "cuda" and isinstance(task.model, CrateMAE) and context.autocast:
        notes = tuple(task.model.choose_kernels(images, context.autocast))
    compile_with = partial(
        compile_layers,
        layers=task.layers,
        autocast=context.autocast,
        autotune=training.compile == "autotune",
    )
    if compiled and not sharded:
        compiled = compile_with(task.model, inputs=task.blank(images))
    trained = parallelize(
        task.model,
        task.layers,
        config.scaling.strategy,
        world_size=context.world_size,
        device=context.device,
        autocast=context.autocast,
    )
    if compiled and sharded:  # programs for whole weights would not be used
        compile_with(trained, inputs=task.blank(images), required=True)
    micro_steps = micro_steps_of(training, task.model, context.world_size)
    return Assembled(
        task, trained, task.build_optimizer(), micro_steps, _arithmetic(compiled, training, context), notes
    )


def _arithmetic(compiled: bool, training: TrainingConfig, context: WorkerContext) -> tuple[str, ...]:
    bf16 = "float8" if training.float8 else "bfloat16"
    bf16 += ", tokens in bfloat16" if training.bf16_tokens else ""
    kinds = [f"{layers} layers in {dtype}" for layers in ("eager", "compiled") for dtype in ("float32", bf16)]
    workers = torch.zeros(len(kinds), dtype=torch.int64, device=context.device)
    workers[2 * compiled + (context.autocast is not None)] = 1
    if context.world_size > 1:
        dist.all_reduce(workers)
    return tuple(kind for kind, number in zip(kinds, workers.tolist(), strict=True) if number)
