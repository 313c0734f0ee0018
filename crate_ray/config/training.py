"""Settings of how a run trains: optimiser, length, workers, checkpoints, tracking."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from crate_ray.config.base import Advanced, Fraction, PositiveInt, Settings


class OptimConfig(Settings):
    """AdamW with linear warm-up and cosine decay, per step."""

    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Learning rate for a batch of 256; the peak rate is base_lr × batch_size / 256 (MAE)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate as it is; overrides base_lr."""
    min_lr: Advanced[Annotated[float, Field(ge=0)]] = 0.0
    """Learning rate at the last step."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up: a share of the run below 1, a number of steps from 1 on."""
    betas: Advanced[tuple[Fraction, Fraction]] = (0.9, 0.95)
    """AdamW's decay rates of the two moment estimates."""
    eps: Advanced[Annotated[float, Field(gt=0)]] = 1e-8
    """AdamW's ε."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; biases, norms and tokens have none."""
    clip_norm: Advanced[Annotated[float, Field(gt=0)] | None] = 1.0
    """Largest norm of the whole gradient; null for no clipping."""


class TrainingConfig(Settings):
    """How long, how large and how precise."""

    batch_size: PositiveInt = 256
    """Global batch: samples per optimiser step over all workers. Part of the experiment, not of the cluster."""
    micro_batch_size: PositiveInt | None = None
    """Most samples that one worker puts through the model at once; larger local batches are accumulated. By default the
    whole local batch."""
    steps: PositiveInt | None = None
    """Optimiser steps of the run; set this or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training data; set this or steps. Of a mixture: times that so many samples are drawn as its
    datasets hold together."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: 'auto' takes bf16 where the device computes in it, else fp32."""
    compile: Advanced[Literal["auto", "layers", "off"]] = "auto"
    """Compile the model's 'layers' with torch.compile, which takes up to a minute when a run starts and needs a C++
    compiler on the CPU; 'auto' does on a GPU (on the CPU it gains little). Where it fails, training goes on without and
    says so."""
    activation_checkpointing: Advanced[bool] = False
    """Keep only the input of each layer for the backward pass and compute the layer twice: a fraction of the memory for
    a third more time. The numbers stay the same."""
    validate_every: PositiveInt | None = None
    """Steps between validations on all held-out samples (and once at the end); only at the end by default."""
    max_skipped_steps: Advanced[Annotated[int, Field(ge=0)]] = 10
    """Steps in a row that may be skipped because their loss or gradient is not finite: they change nothing and are
    counted. After more of them the run stops."""
    profile_steps: Advanced[tuple[PositiveInt, PositiveInt] | None] = None
    """Profile the first worker in the steps from the first number to the second with torch.profiler, such as [20, 25]:
    a trace and a table of operators are written to profile/ in the run's folder."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either steps or epochs, and not both")
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps is {list(self.profile_steps)}; give the first step first")
        return self


class ScalingConfig(Settings):
    """The Ray Train worker group."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of training processes. Or the least and the most of them, such as [2, 8]: the run takes what the cluster
    has, and goes on from its newest checkpoint with another number when nodes come or go. Batches stay the same."""
    resize_seconds: Advanced[Annotated[float, Field(ge=0)]] = 60.0
    """Seconds between two looks for nodes that came, where workers is a range."""
    strategy: Advanced[Literal["auto", "ddp", "fsdp"]] = "auto"
    """How workers share a model: 'ddp', each holds all of it; 'fsdp' (FSDP2), each holds and updates an equal part of
    weights, gradients and optimiser state, and layers are gathered as they are needed: for models that do not fit.
    'auto' is ddp. A run may go on with another one."""
    gpu: bool | None = None
    """One GPU per worker; by default where the cluster has GPUs for all of them."""
    cpus_per_worker: Advanced[PositiveInt | None] = None
    """CPUs that each worker reserves and computes on; by default an equal share of the cluster's."""
    hang_seconds: Advanced[Annotated[float, Field(gt=0)]] = 900.0
    """Seconds without a step after which the run ends with an error that names the worker to blame."""
    preemption_seconds: Advanced[Annotated[float, Field(gt=0)] | None] = 10.0
    """Seconds between looks for a notice that a node will be taken away: a checkpoint is saved then. null: never."""
    lease_seconds: Advanced[Annotated[float, Field(ge=1)]] = 15.0
    """One driver at a time works on a run, or on a sweep. One that was killed keeps it for so many seconds."""
    max_failures: Advanced[Annotated[int, Field(ge=-1)]] = 3
    """Worker failures to recover from before the run ends with an error; -1 for any number."""
    max_preemption_failures: Annotated[int, Field(ge=-1)] = -1
    """Preemptions of nodes to recover from, which max_failures does not count; -1 for any number."""
    accelerator_type: str | None = None
    """Train only on nodes with this accelerator, by Ray's name for it, such as H100 or A100-80G."""
    label_selector: dict[str, str] = {}
    """Train only on nodes with these Ray labels, such as {"ray.io/market-type": "spot"}."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number_is_fixed(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"workers {self.min_workers} to {self.max_workers} is no range; give the smaller number first"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Least number of workers."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        """Largest number of workers."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class CheckpointConfig(Settings):
    """When state is saved, and how much of it is kept."""

    every_steps: PositiveInt = 500
    """Steps between checkpoints; there is always one at the end."""
    keep_last: Advanced[PositiveInt] = 2
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Number of checkpoints with the least validation loss to keep besides; there is a validation before each
    checkpoint then."""
    keep_every_hours: Advanced[Annotated[float, Field(gt=0)] | None] = None
    """Keep one checkpoint for each so many hours of the run besides, the first one included."""


class TrackingConfig(Settings):
    """Where runs are recorded, and how often."""

    uri: str | None = None
    """MLflow tracking server, such as http://127.0.0.1:5000; MLFLOW_TRACKING_URI or, without it, a local SQLite file
    mlflow.db by default."""
    experiment: str = "crate-ray"
    """MLflow experiment."""
    log_every: PositiveInt = 10
    """Steps between logged metrics."""
    picture_every: Advanced[PositiveInt | None] = 500
    """Steps between looks at eight fixed held-out samples (and once at the end): pictures of reconstructions, attention
    and layers, and metrics by layer (coding rate, share of zeros, Gini index); null for none."""
    deliver_seconds: Advanced[Annotated[float, Field(ge=0)]] = 120.0
    """How long a run that is done waits for MLflow to take all records. What it did not take is kept on disk, and sent
    when the same job is started again."""
