"""Training speed and memory of CRATE-MAE, next to its plain reference model and to ViT-MAE.

Each measurement is a new process, `python -m crate_ray.benchmarks.training`, which reads settings and writes figures as
JSON. It uses plain torch: no Ray, no MLflow, no object storage.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from crate_ray.benchmarks.machine import describe_machine
from crate_ray.config import (
    BenchmarkTrainConfig,
    Contestant,
    CrateMAEConfig,
    ModelConfig,
    OptimConfig,
    PresetName,
    Record,
    ViTMAEConfig,
)
from crate_ray.config.training import Compile
from crate_ray.errors import UserError
from crate_ray.memory import peak_memory, resident_memory
from crate_ray.models import CrateMAE, build_model
from crate_ray.models.flops import gpu_peak_flops, reference_training_flops, training_flops
from crate_ray.models.kernels.float8 import supports_float8, use_float8
from crate_ray.models.reference import ReferenceCrateMAE
from crate_ray.training.compilation import compile_layers, should_compile
from crate_ray.training.cuda_graph import GraphedStep, Step
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.step import prepare_cpu, train_step

Precision = Literal["bf16", "fp32"]

_WARM_UP_STEPS = 2
_CHUNK_SECONDS = 0.2  # a GPU runs asynchronously, so its steps are timed in chunks of this duration


# --- One measurement ------------------------------------------------------------------------------------------------


class Case(Record):
    """Settings of one measurement."""

    contestant: Contestant
    """Which model, and how it is trained."""
    preset: PresetName
    """Size of the model."""
    precision: Precision
    """Autocast or plain fp32."""
    image_size: int
    """Side of the images in pixels."""
    batch_size: int
    """Images per step."""
    seconds: float
    """Duration after the warm-up."""
    compile: Compile
    """training.compile."""
    activation_checkpointing: bool
    """Recompute layers in the backward pass instead of storing their activations."""
    bf16_tokens: bool = False
    """Keep tokens between encoder layers in bf16."""
    float8: bool = False
    """Compute products of layers in float8."""
    cuda_graph: bool = False
    """Capture the step in a CUDA graph."""
    device: Literal["cpu", "cuda"]
    """Device to train on."""


class Measurement(Record):
    """Result of one measurement."""

    images_per_second: float
    """Batch size divided by the median duration of a step."""
    step_seconds: float
    """Median duration of a step."""
    steps: int
    """Number of steps that were timed."""
    peak_memory_bytes: int | None
    """Peak memory during the steps: model, optimiser, gradients and stored activations. On a GPU, memory of its
    tensors; on the CPU, memory of the process without `process_bytes`."""
    process_bytes: int | None
    """Memory of the process before the model was built: interpreter, torch and its libraries."""
    parameters: int
    """Number of trained parameters."""
    flops: int
    """FLOPs of one step, as counted for the MFU."""
    compiled: bool
    """Whether the layers were compiled."""
    start_seconds: float
    """Time to build and compile the model and to make the warm-up steps."""


def model_config(case: Case) -> ModelConfig:
    """The model of a contestant."""
    if case.contestant in ("crate_mae", "plain"):
        return CrateMAEConfig(preset=case.preset, image_size=case.image_size)
    suffix = "-matched" if case.contestant == "vit_mae_matched" else ""
    return ViTMAEConfig.model_validate({"preset": case.preset + suffix, "image_size": case.image_size})


def count_flops(config: ModelConfig, plain: bool, batch_size: int) -> int:
    """FLOPs of one training step."""
    if not plain:
        return training_flops(config, batch_size)
    assert isinstance(config, CrateMAEConfig)
    return reference_training_flops(config, batch_size)


def measure(case: Case) -> Measurement:
    """Train on random images for a while. 'plain' is not compiled, and uses PyTorch's default process and optimiser."""
    plain, device = case.contestant == "plain", torch.device(case.device)
    if device.type == "cpu" and not plain:
        prepare_cpu()
    torch.manual_seed(0)
    config = model_config(case)
    # Count before reading the process's memory: counting imports libraries, which are not memory of the model.
    flops = count_flops(config, plain, case.batch_size)
    process_bytes = resident_memory()
    autocast = torch.bfloat16 if case.precision == "bf16" else None
    images = torch.randn(case.batch_size, config.channels, *config.image_hw, device=device)
    noise = torch.rand(case.batch_size, config.num_patches, device=device)
    compiled, began = False, time.perf_counter()
    model: nn.Module
    optimizer: torch.optim.Optimizer
    if plain:
        assert isinstance(config, CrateMAEConfig)
        model = ReferenceCrateMAE(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    else:
        trained = build_model(config).to(device)
        trained.checkpoint_layers = case.activation_checkpointing
        trained.bf16_tokens = case.bf16_tokens
        if case.float8 and supports_float8(device):
            use_float8([*trained.encoder, *trained.decoder])
        if device.type == "cuda" and autocast and isinstance(trained, CrateMAE):
            trained.choose_kernels(case.batch_size, autocast)
        if should_compile(case.compile, device):
            layers = [*trained.encoder, *trained.decoder]
            blank = (torch.zeros_like(images), torch.zeros_like(noise))
            compiled = compile_layers(trained, layers, blank, autocast, autotune=case.compile == "autotune")
        model = trained
        optimizer = build_optimizer(model, OptimConfig())

    step: Step = partial(
        train_step, model, optimizer,
        batch_size=case.batch_size, clip_norm=OptimConfig().clip_norm, autocast=autocast,
    )  # fmt: skip
    if case.cuda_graph and device.type == "cuda" and not plain:
        step = GraphedStep(step, optimizer)

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            step(images, noise, lr=1e-4)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    steps(_WARM_UP_STEPS)
    start_seconds = time.perf_counter() - began
    _reset_peak_memory(device)
    chunk = 1 if device.type == "cpu" else max(1, round(_CHUNK_SECONDS / steps(1)))
    durations: list[float] = []
    until = time.perf_counter() + case.seconds
    while time.perf_counter() < until or len(durations) < 3:
        durations.append(steps(chunk) / chunk)
    step_seconds = statistics.median(durations)
    return Measurement(
        images_per_second=case.batch_size / step_seconds,
        step_seconds=step_seconds,
        steps=chunk * len(durations),
        peak_memory_bytes=_peak_memory(device, process_bytes),
        process_bytes=process_bytes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=flops,
        compiled=compiled,
        start_seconds=start_seconds,
    )


def _reset_peak_memory(device: torch.device) -> None:
    """Reset the peak, so that the memory of the compiler does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device, process_bytes: int | None) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = peak_memory()
    return None if peak is None or process_bytes is None else peak - process_bytes


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of a large product of square matrices, the best of several: an upper limit for a model."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or best == math.inf:
        began = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


# --- All of them ----------------------------------------------------------------------------------------------------


def compare(config: BenchmarkTrainConfig) -> dict[str, Any]:
    """All figures, as plain data.

    `presets[preset][precision][contestant]` is the fastest `Measurement` with its `mfu`. Next to the contestants are
    `ratio_vs_plain`, the speed of 'crate_mae' divided by that of 'plain', and `memory_vs_plain`, the same for peak
    memory. `ratio_limit` is an upper limit of `ratio_vs_plain`: its value if 'crate_mae' computed only its matrix
    products, at an MFU of 1. `image_sizes` holds measurements by side and contestant.
    """
    device = _device(config)
    presets = config.presets or (("tiny", "small", "base", "large") if device == "cuda" else ("tiny", "small"))
    batch_size = config.batch_size or (128 if device == "cuda" else 8)
    sizes_batch = config.image_sizes_batch or (8 if device == "cuda" else 1)
    peaks = _peak_flops(config, device)

    def run(
        contestant: Contestant, preset: PresetName, precision: Literal["bf16", "fp32"], side: int, batch: int
    ) -> Any:
        case = Case(
            contestant=contestant, preset=preset, precision=precision, image_size=side, batch_size=batch,
            seconds=config.seconds, compile=config.compile, device=device,
            activation_checkpointing=config.activation_checkpointing, bf16_tokens=config.bf16_tokens,
            cuda_graph=config.cuda_graph, float8=config.float8,
        )  # fmt: skip
        found = _in_fresh_process(case)
        if "failed" in found:
            return found
        return found | {"mfu": found["flops"] / found["step_seconds"] / peaks[precision]}

    by_preset: dict[str, Any] = {}
    for preset in presets:
        by_preset[preset] = {}
        for precision in config.precisions:
            runs: dict[str, list[Any]] = {contestant: [] for contestant in config.contestants}
            for _ in range(config.repeats):
                for contestant in config.contestants:
                    runs[contestant].append(run(contestant, preset, precision, config.image_size, batch_size))
            best = {name: max(found, key=lambda one: one.get("images_per_second", 0)) for name, found in runs.items()}
            by_preset[preset][precision] = best | _against_plain(best)
    by_side: dict[str, Any] = {}
    for side in config.image_sizes:
        at_side: dict[str, Any] = {
            c: run(c, presets[0], config.precisions[0], side, sizes_batch) for c in config.contestants
        }
        by_side[str(side)] = at_side | _against_plain(at_side)
    return {
        "presets": by_preset,
        "image_sizes": by_side,
        "peak_flops": peaks,
        "machine": describe_machine()
        | {"threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if device == "cuda" else None},
        "settings": config.model_dump(mode="json", exclude={"json_file"})
        | {"presets": list(presets), "batch_size": batch_size, "image_sizes_batch": sizes_batch, "device": device},
    }


def _against_plain(best: dict[str, Any]) -> dict[str, float]:
    """Ratios of 'crate_mae' to 'plain'; empty unless both ran."""
    ours, plain = best.get("crate_mae", {}), best.get("plain", {})
    ratios: dict[str, float] = {}
    if "images_per_second" in ours and "images_per_second" in plain:
        ratios["ratio_vs_plain"] = ours["images_per_second"] / plain["images_per_second"]
        ratios["ratio_limit"] = ratios["ratio_vs_plain"] / ours["mfu"]
        if ours["peak_memory_bytes"] and plain["peak_memory_bytes"]:
            ratios["memory_vs_plain"] = ours["peak_memory_bytes"] / plain["peak_memory_bytes"]
    return ratios


def _in_fresh_process(case: Case) -> dict[str, Any]:
    """Run a measurement in a new process. If it fails, for example out of memory, 'failed' holds the reason."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "crate_ray.benchmarks.training"],
        input=case.model_dump_json(), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return {"failed": lines[-1] if lines else f"ended with exit code {done.returncode}, perhaps out of memory"}


def _device(config: BenchmarkTrainConfig) -> Literal["cpu", "cuda"]:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU here; use 'cpu' or 'auto'")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def _peak_flops(config: BenchmarkTrainConfig, device: Literal["cpu", "cuda"]) -> dict[str, float]:
    """FLOP/s that count as an MFU of 1, by precision."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    peaks: dict[str, float] = {name: product_rate(torch.device(device), dtypes[name]) for name in config.precisions}
    stated = gpu_peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    if "bf16" in peaks and (config.peak_flops or stated):
        peaks["bf16"] = config.peak_flops or stated or 0.0
    return peaks


if __name__ == "__main__":
    print(measure(Case.model_validate_json(sys.stdin.read())).model_dump_json())
