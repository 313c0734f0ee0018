"""Settings of `crate-ray benchmark`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from crate_ray.config.base import Advanced, PositiveInt, Settings
from crate_ray.config.models import CrateMAEConfig, ModelConfig, PresetName
from crate_ray.config.storage import S3Config
from crate_ray.config.training import Compile, TrackingConfig

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


class BenchmarkDataConfig(Settings):
    """Measure data loading with our loader, stock webdataset and, if installed, spdl and LitData."""

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Prepared datasets of images: a local folder or s3://bucket/prefix, or several as name=address (a mapping in
    YAML). Speeds are also compared with webdataset on the first one."""
    image_size: PositiveInt = 224
    """Side of the loaded images in pixels."""
    batch_size: PositiveInt = 64
    """Images per batch."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds of each measurement, after a short warm-up."""
    repeats: PositiveInt = 3
    """Measurements of each loader, in turns; the fastest is reported."""
    processes: Advanced[Annotated[tuple[PositiveInt, ...], Field(min_length=1)]] = (1, 2, 4)
    """Numbers of loader processes to try for webdataset and LitData; the fastest is reported."""
    memory_bytes: Advanced[PositiveInt] = 2 * 2**30
    """Largest dataset that our loader keeps in memory, as in training; 1 makes it stream."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """JSON file to write all results to."""
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
            raise ValueError(f"data has {twice[0]!r} twice; give every dataset its own name, as name=address")
        return value

    @property
    def datasets(self) -> dict[str, str]:
        """Addresses of the datasets by name."""
        return dict(map(_named, self.data))


def _named(entry: str) -> tuple[str, str]:
    """Name and address. Without a name, the address is the name."""
    match = _NAMED.fullmatch(entry)
    return (match[1], match[2]) if match else (entry, entry)


class BenchmarkOrderConfig(Settings):
    """Measure the cost of planning the order of a very large dataset, and how well the order mixes sorted shards."""

    num_shards: PositiveInt = 1_000_000
    """Shards of the synthetic dataset; its index takes some hundred MB in the temporary folder."""
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
    """JSON file to write all results to."""


class BenchmarkScalingConfig(Settings):
    """Estimate training on 8 to 512 GPUs from the bytes that a step sends. The defaults describe nodes of H100s."""

    model: ModelConfig = CrateMAEConfig(preset="base")
    """Model, as for pretraining."""
    batch_size: PositiveInt = 4096
    """Global batch, over all GPUs."""
    gpus: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 16, 32, 64, 128, 256, 512)
    """Numbers of GPUs."""
    peak_flops: Annotated[float, Field(gt=0)] = 989e12
    """Peak of one GPU in FLOP/s, bf16 without sparsity (H100 SXM)."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the peak FLOP/s that computation reaches. The default is assumed, not measured; measure yours with
    `crate-ray benchmark train`."""
    gpus_per_node: PositiveInt = 8
    """GPUs per node."""
    gpu_bytes_per_second: Annotated[float, Field(gt=0)] = 450e9
    """Bandwidth of a GPU's links within the node, in one direction (NVLink 4)."""
    node_bytes_per_second: Annotated[float, Field(gt=0)] = 400e9
    """Bandwidth of a node's network, in one direction (8 ports of 400 Gbit/s)."""
    latency_seconds: Advanced[Annotated[float, Field(ge=0)]] = 10e-6
    """Latency of one hop between nodes."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """JSON file to write all results to."""


class BenchmarkRooflineConfig(Settings):
    """Estimate the least time of a training step on a GPU from the FLOPs and bytes of its operations.

    Needs a CUDA device to record a step; `python -m tests.gpu_emulated.roofline` uses an emulated one. The defaults
    describe an H200.
    """

    presets: Annotated[tuple[PresetName, ...], Field(min_length=1)] = ("tiny", "small", "base", "large")
    """Sizes of CRATE-MAE."""
    image_size: PositiveInt = 224
    """Side of the images in pixels; a multiple of 16."""
    batch_size: PositiveInt = 256
    """Images per step."""
    bf16_tokens: bool = False
    """Estimate steps with training.bf16_tokens."""
    peak_flops: Annotated[float, Field(gt=0)] = 989e12
    """Peak of the GPU in FLOP/s, bf16 without sparsity. The MFU is a share of it."""
    bytes_per_second: Annotated[float, Field(gt=0)] = 4.8e12
    """Peak rate of the GPU's memory."""
    reached: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of both peaks that good kernels reach; 1 for the limit that the peaks themselves set."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """JSON file to write all results to."""


class BenchmarkOverheadConfig(Settings):
    """Measure the overhead of a Ray Train job, compared with the same loop under torchrun."""

    data: str | None = None
    """Prepared dataset; by default generated shapes of the model's size."""
    samples: PositiveInt = 2000
    """Number of shapes to generate."""
    model: ModelConfig = CrateMAEConfig(preset="small", image_size=96, patch_size=8)
    """Model, as for pretraining."""
    batch_size: PositiveInt = 16
    """Global batch."""
    workers: PositiveInt = 2
    """Number of training processes."""
    cpus_per_worker: PositiveInt | None = None
    """CPU threads of each process; by default an equal share of the machine's. With fewer threads, cores are left for
    Ray's own processes, which otherwise compete with the training."""
    steps: PositiveInt = 60
    """Steps of each run."""
    log_every: PositiveInt = 10
    """Steps between logged metrics, which is also the measured interval. The first interval of each run is left out."""
    rounds: PositiveInt = 2
    """Runs of each kind, in turns. The medians of their intervals are compared."""
    checkpoint_preset: PresetName | None = "base"
    """Size of the model whose checkpoints are measured; null to measure none."""
    checkpoint_batch_size: PositiveInt = 4
    """Global batch of that model."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """JSON file to write all results to."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.steps < 2 * self.log_every:
            raise ValueError(f"steps is {self.steps}; give at least two intervals of log_every {self.log_every}")
        return self


class BenchmarkServeConfig(Settings):
    """Measure `crate-ray serve` next to `mlflow models serve` of the same model, and next to plain calls."""

    model: str | None = None
    """Model, as for `crate-ray serve`; by default fresh weights of `preset`."""
    preset: PresetName = "tiny"
    """Size of a CRATE-MAE with fresh weights, for images of 224 × 224."""
    picture_side: PositiveInt = 500
    """Side of the JPEGs that are sent, in pixels."""
    clients: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8, 32)
    """Numbers of clients at the same time. Each sends one picture a request, and the next one after the answer."""
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds of each measurement."""
    repeats: PositiveInt = 3
    """Measurements of each contestant, in turns; the fastest is reported."""
    batch_size: PositiveInt = 32
    """batch_size of `crate-ray serve`, and pictures in a plain call."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """JSON file to write all results to."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, for models:/ and runs:/."""
    s3: S3Config = S3Config()
    """Object storage."""


Contestant = Literal["crate_mae", "plain", "vit_mae", "vit_mae_matched"]


class BenchmarkTrainConfig(Settings):
    """Measure training speed and memory of CRATE-MAE, of its plain reference model, and of ViT-MAE."""

    presets: Annotated[tuple[PresetName, ...], Field(min_length=1)] | None = None
    """Sizes of the models; by default all on a GPU, tiny and small on a CPU."""
    precisions: Annotated[tuple[Literal["bf16", "fp32"], ...], Field(min_length=1)] = ("bf16", "fp32")
    """Precisions: autocast to bf16, or fp32."""
    contestants: Annotated[tuple[Contestant, ...], Field(min_length=1)] = (
        "crate_mae", "plain", "vit_mae", "vit_mae_matched",
    )  # fmt: skip
    """Models: 'crate_mae' as trained, 'plain' for the reference model, which computes its equations as written,
    'vit_mae' of the same width, depth and heads, 'vit_mae_matched' with the same parameter count."""
    image_size: PositiveInt = 224
    """Side of the images in pixels; a multiple of 16."""
    batch_size: PositiveInt | None = None
    """Images per step; by default 128 on a GPU, 8 on a CPU."""
    image_sizes: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    """Image sides for further measurements of time and memory, with the first preset and precision."""
    image_sizes_batch: Advanced[PositiveInt | None] = None
    """Images per step of the measurements by image size; by default 8 on a GPU, 1 on a CPU."""
    seconds: Annotated[float, Field(gt=0)] = 3.0
    """Seconds of each measurement, after two warm-up steps; at least three steps."""
    repeats: PositiveInt = 1
    """Measurements of each model, in turns; the fastest is reported."""
    compile: Compile = "auto"
    """training.compile for all models except 'plain'."""
    activation_checkpointing: bool = False
    """Train all models except 'plain' with training.activation_checkpointing."""
    bf16_tokens: bool = False
    """Train all models except 'plain' with training.bf16_tokens."""
    float8: bool = False
    """Train all models except 'plain' with training.float8, where the GPU supports it."""
    cuda_graph: bool = False
    """Train all models except 'plain' with training.cuda_graph, on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; 'auto' is a GPU if there is one."""
    peak_flops: Advanced[Annotated[float, Field(gt=0)] | None] = None
    """FLOP/s that count as 100 % MFU in bf16; by default those of the GPU's data sheet, or the measured rate of a large
    matrix product on a CPU or an unknown GPU. The rate for fp32 is always measured."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """JSON file to write all results to."""
