"""Settings of `crate-ray benchmark`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from crate_ray.config.base import Advanced, PositiveInt, Settings
from crate_ray.config.models import CrateMAEConfig, ModelConfig, PresetName
from crate_ray.config.storage import S3Config

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


class BenchmarkDataConfig(Settings):
    """Measure our loader, stock webdataset and, where installed, spdl and LitData, with the same output."""

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Datasets of images as jobs/prepare.py leaves them: a local folder or s3://bucket/prefix, or several as
    name=address (a mapping in YAML). Ratios are against webdataset on the first one."""
    image_size: PositiveInt = 224
    """Side of the images that come out, in pixels."""
    batch_size: PositiveInt = 64
    """Images per batch."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """Duration of each measurement in seconds, after the first batch and a moment more."""
    repeats: PositiveInt = 3
    """Measurements of each loader, in turns; the fastest counts."""
    processes: Advanced[Annotated[tuple[PositiveInt, ...], Field(min_length=1)]] = (1, 2, 4)
    """Numbers of loader processes that webdataset and LitData are measured with; the fastest counts."""
    memory_bytes: Advanced[PositiveInt] = 2 * 2**30
    """Our loader keeps data up to this many bytes in memory, as in training; 1 makes it stream."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""
    s3: S3Config = S3Config()
    """Object storage."""

    @field_validator("data", mode="before")
    @classmethod
    def _from_mapping(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return tuple(f"{name}={address}" for name, address in value.items())
        return (value,) if isinstance(value, str) else value

    @field_validator("data")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [_named(entry)[0] for entry in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data has {twice[0]!r} twice; give every dataset a name of its own, as name=address")
        return value

    @property
    def datasets(self) -> dict[str, str]:
        """Addresses of the datasets by name."""
        return dict(map(_named, self.data))


def _named(entry: str) -> tuple[str, str]:
    """Name and address; an address without a name is its own."""
    match = _NAMED.fullmatch(entry)
    return (match[1], match[2]) if match else (entry, entry)


class BenchmarkOrderConfig(Settings):
    """Measure what planning costs on very large data, and how well shards that are sorted by class are mixed."""

    num_shards: PositiveInt = 1_000_000
    """Shards of the synthetic dataset that is planned for; its index takes some hundred MB of the temporary folder."""
    shard_samples: Advanced[PositiveInt] = 1000
    """Samples per shard."""
    sample_bytes: Advanced[Annotated[int, Field(ge=512)]] = 110 * 2**10
    """Mean size of a sample in bytes."""
    classes: Advanced[PositiveInt] = 1000
    """Classes of the sorted dataset."""
    class_samples: Advanced[PositiveInt] = 1281
    """Samples of each class."""
    batch_size: PositiveInt = 4096
    """Global batch."""
    workers: PositiveInt = 8
    """Workers of the run."""
    buffer_bytes: Advanced[PositiveInt] = 2**30
    """data.buffer_bytes of each worker."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""


class BenchmarkScalingConfig(Settings):
    """Estimate how a model trains on 8 to 512 GPUs, from the bytes that a step moves. The defaults are H100 nodes."""

    model: ModelConfig = CrateMAEConfig(preset="base")
    """The model, as for pretraining."""
    batch_size: PositiveInt = 4096
    """Global batch; the GPUs share it."""
    gpus: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 16, 32, 64, 128, 256, 512)
    """Numbers of GPUs."""
    peak_flops: Annotated[float, Field(gt=0)] = 989e12
    """Peak of one GPU in FLOP/s, bf16 without sparsity (H100 SXM)."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the peak that the computation alone reaches, as jobs/benchmark.py train measures it."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node."""
    gpu_bytes_per_second: Annotated[float, Field(gt=0)] = 450e9
    """Bandwidth of a GPU's links within the node, one direction (NVLink 4)."""
    node_bytes_per_second: Annotated[float, Field(gt=0)] = 400e9
    """Bandwidth of a node's network, one direction (8 ports of 400 Gbit/s)."""
    latency_seconds: Advanced[Annotated[float, Field(ge=0)]] = 10e-6
    """Latency of one hop between nodes."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""


class BenchmarkOverheadConfig(Settings):
    """Measure what a Ray Train job costs beside training, against the same loop bare under torchrun."""

    data: str | None = None
    """Dataset as jobs/prepare.py leaves it; by default generated shapes of the model's size."""
    samples: PositiveInt = 2000
    """Shapes to generate."""
    model: ModelConfig = CrateMAEConfig(preset="small", image_size=96, patch_size=8)
    """The model, as for pretraining."""
    batch_size: PositiveInt = 16
    """Global batch."""
    workers: PositiveInt = 2
    """Training processes."""
    cpus_per_worker: PositiveInt | None = None
    """Threads of each, on a CPU; by default all that the machine has for it. Fewer leave room for Ray's own processes,
    which otherwise take their share of the cores from the training."""
    steps: PositiveInt = 60
    """Steps of each run."""
    log_every: PositiveInt = 10
    """Steps between logged metrics, and of one measured interval; the first one of each run is left out."""
    rounds: PositiveInt = 2
    """Runs of each kind, in turns; medians over their intervals are compared."""
    checkpoint_preset: PresetName | None = "base"
    """Size of the model whose checkpoints are measured; null to leave that out."""
    checkpoint_batch_size: PositiveInt = 4
    """Its global batch."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.steps < 2 * self.log_every:
            raise ValueError(f"steps is {self.steps}; give at least two intervals of log_every {self.log_every}")
        return self


Contestant = Literal["crate_mae", "plain", "vit_mae", "vit_mae_matched"]


class BenchmarkTrainConfig(Settings):
    """Measure training: CRATE-MAE, its equations written out plainly, and ViT-MAE, each in a process of its own."""

    presets: Annotated[tuple[PresetName, ...], Field(min_length=1)] | None = None
    """Sizes of the models. By default all on a GPU, tiny and small on a CPU."""
    precisions: Annotated[tuple[Literal["bf16", "fp32"], ...], Field(min_length=1)] = ("bf16", "fp32")
    """Autocast to bf16, and plain fp32."""
    contestants: Annotated[tuple[Contestant, ...], Field(min_length=1)] = (
        "crate_mae", "plain", "vit_mae", "vit_mae_matched",
    )  # fmt: skip
    """'crate_mae' as we train it, 'plain' for the same function as its equations read, 'vit_mae' of the same width,
    depth and heads, 'vit_mae_matched' of as many parameters."""
    image_size: PositiveInt = 224
    """Side of the images in pixels; a multiple of 16."""
    batch_size: PositiveInt | None = None
    """Images per step. By default 128 on a GPU, 8 on a CPU."""
    image_sizes: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    """Sides at which time and memory are measured, for the first preset and precision; none to leave that out."""
    image_sizes_batch: Advanced[PositiveInt | None] = None
    """Images per step for that. By default 8 on a GPU, 1 on a CPU."""
    seconds: Annotated[float, Field(gt=0)] = 3.0
    """Duration of each measurement in seconds, after two steps to warm up; at least three steps."""
    repeats: PositiveInt = 1
    """Measurements of each contestant, in turns; the fastest counts."""
    compile: Literal["auto", "layers", "off"] = "auto"
    """training.compile of all but 'plain'."""
    activation_checkpointing: bool = False
    """Train all but 'plain' with training.activation_checkpointing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; 'auto' takes a GPU where there is one."""
    peak_flops: Advanced[Annotated[float, Field(gt=0)] | None] = None
    """FLOP/s that count as 100 % in bf16. By default what the GPU's maker states, or, on a CPU or an unknown GPU, the
    rate of a large matrix product; fp32 is always measured."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""
