"""Settings of training: optimizer, length, workers, checkpoints, tracking."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from crate_ray.bounded import MAX_LEASE_SECONDS
from crate_ray.config.base import Advanced, Fraction, PositiveInt, ServerAddress, Settings

OptimizerName = Literal["adamw", "lion", "muon"]
"""Values of optim.optimizer."""


class OptimConfig(Settings):
    """Optimizer, and its learning rate with linear warm-up and cosine decay, per step."""

    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Learning rate for a batch of 256; the peak learning rate is base_lr × batch_size / 256 (MAE)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate, not scaled by the batch; overrides base_lr."""
    optimizer: Advanced[OptimizerName] = "adamw"
    """Optimizer. 'lion' (arXiv 2302.06675) stores one number per weight, 'adamw' two; it needs a learning rate 3 to 10
    times smaller and a weight decay as many times larger. 'muon' (arXiv 2502.16982) is for the matrices of encoder and
    decoder layers, with AdamW for all other parameters; it takes AdamW's learning rate and weight decay."""
    min_lr: Advanced[Annotated[float, Field(ge=0)]] = 0.0
    """Learning rate at the last step."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Length of the warm-up: a share of the run if it is below 1, else a number of steps."""
    betas: Advanced[tuple[Fraction, Fraction]] = (0.9, 0.95)
    """AdamW's decay rates of the two moment estimates. For Lion, the weights of the momentum in its update and in the
    next momentum, by default 0.9, 0.99."""
    eps: Advanced[Annotated[float, Field(gt=0)]] = 1e-8
    """AdamW's ε."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; biases, norms and tokens have none."""
    clip_norm: Advanced[Annotated[float, Field(gt=0)] | None] = 1.0
    """Largest norm of the gradient of all parameters together; null for no clipping."""

    @model_validator(mode="before")
    @classmethod
    def _fill_lions_betas(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("optimizer") == "lion":
            return {"betas": (0.9, 0.99), **values}
        return values


Compile = Literal["auto", "layers", "autotune", "off"]
"""Values of training.compile."""


class TrainingConfig(Settings):
    """Length, batch and precision of training."""

    batch_size: PositiveInt = 256
    """Global batch: samples per optimizer step over all workers. It does not depend on the number of workers."""
    micro_batch_size: PositiveInt | None = None
    """Most samples in one forward pass of a worker; gradients of larger local batches are accumulated. By default the
    whole local batch."""
    steps: PositiveInt | None = None
    """Optimizer steps of the run; set this or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training data; set this or steps. An epoch of a mixture draws as many samples as its datasets
    hold together."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: 'auto' is bf16 if the device supports it natively, else fp32."""
    bf16_tokens: Advanced[bool] = False
    """With bf16, also keep the tokens between the encoder's layers in bf16 instead of fp32. This halves the memory
    traffic between products on a GPU. docs/performance.md has its effect on the loss."""
    float8: Advanced[bool] = False
    """With bf16, compute the layers' matrix products in float8 with torchao, scaled by row; gradients of weights stay
    in bf16. Needs an H100 or newer, and torchao."""
    compile: Advanced[Compile] = "auto"
    """Compile the model's 'layers' with torch.compile: faster steps, up to a minute longer to start. 'autotune'
    also measures several kernels for each matrix product, some of which do the operations after it, such as ReLU,
    before writing the result; it may take minutes longer to start. On the CPU compiling needs a C++ compiler and
    gains little; 'auto' compiles on a GPU only. If compiling fails, training continues without it and logs a
    warning."""
    cuda_graph: Advanced[bool] = False
    """Capture the whole training step in a CUDA graph, and launch it at once. This helps where launching kernels takes
    longer than running them: small models, small local batches. For one worker on a GPU; otherwise it has no effect."""
    activation_checkpointing: Advanced[bool] = False
    """Keep only the input of each layer for the backward pass, and compute the layer again. This takes a fraction of
    the memory and a third more time. The results do not change."""
    validate_every: PositiveInt | None = None
    """Steps between validations on all held-out samples. By default only after the last step."""
    max_skipped_steps: Advanced[Annotated[int, Field(ge=0)]] = 10
    """Largest number of consecutive steps that may be skipped because their loss or gradient is not finite. With more
    than that, the run stops with an error."""
    profile_steps: Advanced[tuple[PositiveInt, PositiveInt] | None] = None
    """First and last step to profile on rank 0 with torch.profiler, such as [20, 25]. A trace and a table of operators
    are written to profile/ in the run's folder."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either steps or epochs, and not both")
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps is {list(self.profile_steps)}; put the first step first")
        return self


def check_step(training: TrainingConfig, optim: OptimConfig) -> None:
    """Raise ValueError if the settings ask for a step that cannot work."""
    if training.cuda_graph and optim.optimizer == "muon":
        raise ValueError("training.cuda_graph needs optim.optimizer adamw or lion: a step of Muon cannot be captured")


class ScalingConfig(Settings):
    """Workers of a run, and how it recovers from failures."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of training processes. A range such as [2, 8] makes the run elastic: it uses what the cluster has, and
    resumes from its newest checkpoint with another number of workers when nodes come or go. Batches stay the same."""
    resize_seconds: Advanced[Annotated[float, Field(ge=0)]] = 60.0
    """Seconds between checks for new nodes, if workers is a range."""
    strategy: Advanced[Literal["auto", "ddp", "fsdp"]] = "auto"
    """How workers share a model. With 'ddp' each worker holds the whole model. With 'fsdp' (FSDP2), for models that do
    not fit into memory, each worker holds an equal part of weights, gradients and optimizer state, and layers are
    gathered when they are needed. 'auto' is ddp. A run may be resumed with another strategy."""
    gpu: bool | None = None
    """Give each worker a GPU. By default, if the cluster has any."""
    cpus_per_worker: Advanced[PositiveInt | None] = None
    """CPUs that each worker reserves and uses. By default an equal share of the CPUs of all nodes, or of the nodes with
    GPUs."""
    hang_seconds: Advanced[Annotated[float, Field(gt=0)]] = 900.0
    """Seconds without a step after which the run ends with an error that names the worker that hangs."""
    preemption_seconds: Advanced[Annotated[float, Field(gt=0)] | None] = 10.0
    """Seconds between checks for a notice that a node is about to be preempted. After a notice, a checkpoint is saved.
    null for no checks."""
    lease_seconds: Advanced[Annotated[float, Field(ge=1, le=MAX_LEASE_SECONDS)]] = 15.0
    """Seconds after which another driver may take over the run or sweep of a driver that was killed. Only one driver at
    a time may work on a run or sweep."""
    max_failures: Advanced[Annotated[int, Field(ge=-1)]] = 3
    """Number of worker failures from which the run recovers before it ends with an error; -1 for any number."""
    max_preemption_failures: Advanced[Annotated[int, Field(ge=-1)]] = -1
    """Number of node preemptions from which the run recovers; max_failures does not count them. -1 for any number."""
    accelerator_type: Advanced[str | None] = None
    """Train only on nodes with this accelerator, by Ray's name for it, such as H100 or A100-80G."""
    label_selector: Advanced[dict[str, str]] = {}
    """Train only on nodes with these Ray labels, such as {"ray.io/market-type": "spot"}."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number_is_fixed(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"workers {self.min_workers} to {self.max_workers} is not a range; put the smaller number first"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Smallest number of workers."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        """Largest number of workers."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class CheckpointConfig(Settings):
    """When checkpoints are saved, and which of them are kept."""

    every_steps: PositiveInt = 500
    """Steps between checkpoints. The last step always saves one."""
    keep_last: Advanced[PositiveInt] = 2
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Number of best checkpoints to keep in addition: those with the lowest validation loss. If set, the run is
    validated before each checkpoint."""
    keep_best_by: Advanced[Literal["validation_loss", "knn_accuracy", "probe_accuracy"]] = "validation_loss"
    """What makes a checkpoint the best one, for keep_best and <run>@best: the lowest validation loss, or the highest
    accuracy on the labelled datasets of `probe` (pretraining only)."""
    keep_every_hours: Advanced[Annotated[float, Field(gt=0)] | None] = None
    """Hours between checkpoints to keep in addition, starting with the first one."""


class TrackingConfig(Settings):
    """Where and how often a run is logged."""

    uri: ServerAddress | None = None
    """MLflow tracking server, such as http://127.0.0.1:5000; MLFLOW_TRACKING_URI or, without it, a local SQLite file
    mlflow.db by default. A user name and password in it are used, but stored nowhere."""
    experiment: str = "crate-ray"
    """MLflow experiment."""
    log_every: PositiveInt = 10
    """Steps between logged metrics."""
    picture_every: Advanced[PositiveInt | None] = 500
    """Steps between probes of the model on eight fixed held-out samples: pictures of reconstructions, attention and
    layers, metrics by layer (coding rate, share of zeros, Gini index), and signals of whether the model can learn. null
    for none."""
    deliver_seconds: Advanced[Annotated[float, Field(ge=0)]] = 120.0
    """Seconds that a finished run waits until MLflow has received everything. Records that remain are kept on disk, and
    sent when the same job is started again."""
