"""The parts of the GPU check. Each runs in a process of its own and prints its results as JSON: see check.py."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DRY = os.environ.get("CRATE_RAY_GPU_CHECK") == "dry"
"""Rehearse on the emulated device of tests/gpu_emulated, at small sizes. Times mean nothing then."""
if DRY:
    from tests.gpu_emulated import device as emulated

    emulated.install()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from crate_ray.config import CrateMAEConfig, ModelConfig, OptimConfig, ViTMAEConfig  # noqa: E402
from crate_ray.models import build_model  # noqa: E402
from crate_ray.models.reference import ReferenceCrateMAE  # noqa: E402
from crate_ray.training.compilation import compile_layers  # noqa: E402
from crate_ray.training.cuda_graph import GraphedStep  # noqa: E402
from crate_ray.training.optimizer import build_optimizer  # noqa: E402
from crate_ray.training.staging import HostCopies  # noqa: E402
from crate_ray.training.step import train_step  # noqa: E402

Results = dict[str, Any]

CUDA = torch.device("cuda", 0)
SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2}
PRESETS = ("tiny",) if DRY else ("tiny", "small", "base", "large")
BATCH, SIDE = (2, 32) if DRY else (256, 224)
BF16, CLIP = torch.bfloat16, 1.0

if DRY:  # inductor needs a driver
    torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]


def switches() -> dict[str, ModelConfig]:
    """Small models with every switch that changes what is computed."""
    crate = CrateMAEConfig(**SMALL, num_subspaces=4)
    return {
        "crate_mae": crate,
        "linear attention": crate.model_copy(update={"attention": "linear"}),
        "tied output map": crate.model_copy(update={"output_map": "tied"}),
        "tied decoder": crate.model_copy(update={"decoder_maps": "tied"}),
        "visible tokens": crate.model_copy(update={"encoder_tokens": "visible"}),
        "vit_mae": ViTMAEConfig(**SMALL, num_heads=4, decoder_dim=32, decoder_depth=1, decoder_num_heads=4),
    }


def inputs(config: ModelConfig, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random images and noise on the device, the same at each call."""
    random = torch.Generator().manual_seed(1)
    images = torch.randn(batch, config.channels, *config.image_hw, generator=random, dtype=dtype)
    return images.to(CUDA), torch.rand(batch, config.num_patches, generator=random, dtype=dtype).to(CUDA)


def new_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A model on the device; its weights depend on its settings only."""
    torch.manual_seed(0)
    return build_model(config).to(CUDA, dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def seconds_of(work: Callable[[], Any], at_least: float = 0.5) -> float:
    """Median duration of some work on the device, after a warm-up."""
    for _ in range(3):
        work()
    durations, until = [], time.perf_counter() + (0.01 if DRY else at_least)
    while time.perf_counter() < until or len(durations) < 3:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        durations.append(start.elapsed_time(end) / 1e3)
    return statistics.median(durations)


# --- What the machine can do ----------------------------------------------------------------------------------------


def machine() -> Results:
    """Names and versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpus": len(os.sched_getaffinity(0)),
    }


def ceilings() -> Results:
    """The fastest copy and the fastest product: limits for everything else."""
    values = torch.empty(2**16 if DRY else 2**30, device=CUDA, dtype=torch.uint8)
    other = torch.empty_like(values)
    side = 64 if DRY else 8192
    left, right = (torch.randn(side, side, device=CUDA, dtype=BF16) for _ in range(2))
    return {
        "copy_bytes_per_second": 2 * values.numel() / seconds_of(lambda: other.copy_(values)),
        "bf16_flops": 2 * side**3 / seconds_of(lambda: left @ right),
    }


# --- Right numbers --------------------------------------------------------------------------------------------------


def parity() -> Results:
    """In float64 the model is its plain form; bf16 is near it; so are compiled layers."""
    config = CrateMAEConfig(**SMALL, num_subspaces=4)
    plain = ReferenceCrateMAE(config).to(CUDA, torch.float64)
    model = new_model(config, torch.float64)
    model.load_state_dict(plain.state_dict())
    given = inputs(config, 4, torch.float64)
    losses = [m(*given).sample_loss.sum() for m in (plain, model)]
    for loss in losses:
        loss.backward()
    gradients = [[p.grad for p in m.parameters()] for m in (plain, model)]
    found: Results = {
        "float64_loss": relative(losses[1], losses[0]),
        "float64_gradients": max(relative(b, a) for a, b in zip(*gradients, strict=True)),
    }
    for name, switch in switches().items():
        expected = new_model(switch)(*inputs(switch, 4)).sample_loss
        with torch.autocast("cuda", dtype=BF16):
            found[f"bf16 {name}"] = relative(new_model(switch)(*inputs(switch, 4)).sample_loss, expected)
    return found


def compiled() -> Results:
    """Compiled layers of every model give what eager ones give: losses and gradients in bf16, and the same programs for
    uneven batches."""
    found: Results = {}
    for name, config in switches().items():
        eager, other = new_model(config), new_model(config)
        layers = [*other.encoder, *other.decoder]
        torch._dynamo.reset()
        worked = compile_layers(other, layers, inputs(config, 4), BF16)
        losses = []
        for model in (eager, other):
            with torch.autocast("cuda", dtype=BF16):
                loss = model(*inputs(config, 4)).sample_loss.sum()
            loss.backward()
            losses.append(loss)
        gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (eager, other)]
        found[name] = {
            "compiled": worked,
            "loss": relative(losses[1], losses[0]),
            "gradients": ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item(),
        }
    return found


def no_waiting() -> Results:
    """Twenty steps in which the host may not wait for the device; any wait is an error."""
    found = {}
    for name, config in switches().items():
        model = new_model(config)
        optimizer = build_optimizer(model, OptimConfig())
        given = inputs(config, 4)
        step = partial(
            train_step, model, optimizer, *given, batch_size=4, micro_steps=2, lr=1e-4, clip_norm=CLIP, autocast=BF16
        )
        step()
        if not DRY:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                loss, norm = step()
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")
        found[name] = {"loss": loss.item(), "norm": norm.item()}
    return found


def not_finite() -> Results:
    """A step whose loss is not finite changes nothing."""
    config = CrateMAEConfig(**SMALL, num_subspaces=4)
    model = new_model(config)
    optimizer = build_optimizer(model, OptimConfig())
    images, noise = inputs(config, 4)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer, images * math.nan, noise, batch_size=4, lr=1.0, autocast=BF16)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train_step(model, optimizer, images, noise, batch_size=4, lr=1.0, autocast=BF16)
    changed = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return {"unchanged": unchanged, "next_step_works": changed}


def graphed() -> Results:
    """Steps in a CUDA graph give the losses and weights of plain steps, with new inputs and learning rates."""
    found: Results = {}
    for name, config in switches().items():
        results = []
        for captured in (False, True):
            model = new_model(config)
            optimizer = build_optimizer(model, OptimConfig(eps=1e-2))
            step: Any = partial(train_step, model, optimizer, batch_size=4, clip_norm=CLIP, autocast=BF16)
            step = GraphedStep(step, optimizer) if captured else step
            images, noise = inputs(config, 4)
            sums = [step(images * scale, noise.roll(i, 1), lr=1e-3 / (i + 1))[0] for i, scale in enumerate((1, 2, 3))]
            results.append((torch.stack(sums), torch.cat([p.flatten() for p in model.parameters()])))
        (losses, weights), (their_losses, their_weights) = results
        found[name] = {
            "captured": step.is_captured,
            "losses": relative(their_losses, losses),
            "weights": relative(their_weights, weights),
        }
    return found


def ddp() -> Results:
    """DDP over NCCL with one process gives the step of one process."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    config = CrateMAEConfig(**SMALL, num_subspaces=4)
    if DRY:
        return {"skipped": "there is no NCCL without a GPU"}
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    alone, inner = new_model(config), new_model(config)
    # As parallel.parallelize wraps it for several workers.
    wrapped = DistributedDataParallel(inner, static_graph=True, gradient_as_bucket_view=True, broadcast_buffers=False)
    for model in (alone, wrapped):
        optimizer = build_optimizer(model, OptimConfig(eps=1e-2))
        for _ in range(3):
            train_step(model, optimizer, *inputs(config, 4), batch_size=4, lr=1e-3, clip_norm=CLIP, autocast=BF16)
    difference = max(relative(b, a) for a, b in zip(alone.parameters(), inner.parameters(), strict=True))
    del wrapped
    dist.destroy_process_group()
    return {"difference": difference}


def checkpoint() -> Results:
    """Weights and optimizer state of the base model: copied while training goes on, written, restored bit by bit."""
    from crate_ray.runs.checkpoint_files import (
        STATE_FILE,
        CheckpointState,
        checkpoint_tensors,
        own_part,
        restore_checkpoint,
        write_part,
    )

    config = CrateMAEConfig(**SMALL, num_subspaces=4) if DRY else CrateMAEConfig(preset="base")
    models = [new_model(config) for _ in range(2)]
    optimizers = [build_optimizer(model, OptimConfig()) for model in models]
    given = inputs(config, 2)
    train_step(models[0], optimizers[0], *given, batch_size=2, lr=1e-3)
    copies = HostCopies(CUDA)
    tensors = own_part(checkpoint_tensors(models[0], optimizers[0]), 0, 1)
    copies.copy(tensors)  # the first copy allocates pinned memory
    began = time.perf_counter()
    copy = copies.copy(tensors)
    copied = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_part(Path(folder), copy, 0, 1)
        written = time.perf_counter()
        record = shapes_run(Path(folder)).record
        state = CheckpointState(step=1, run=record, world_size=1, torch_version=torch.__version__)
        (Path(folder) / STATE_FILE).write_text(state.model_dump_json())
        restore_checkpoint(Path(folder), models[1], optimizers[1])
    saved, restored = (checkpoint_tensors(m, o) for m, o in zip(models, optimizers, strict=True))
    return {
        "bitwise": all(torch.equal(saved[name], restored[name]) for name in saved),
        "blocking_seconds": copied - began,
        "write_seconds": written - copied,
    }


def shapes_run(folder: Path, **settings: Any) -> Any:
    """Pack the built-in shapes into a folder, and open a run on them."""
    from crate_ray.config import PrepareConfig, PretrainConfig
    from crate_ray.data.prepare.builtin import shapes_source
    from crate_ray.data.prepare.packing import pack
    from crate_ray.runs.pretraining import open_run
    from crate_ray.storage.interface import open_storage

    prepared = PrepareConfig(source="shapes", output=(folder / "shapes").as_posix())
    count = 60 if DRY else 4000
    pack(shapes_source("all", count, 32, 0), open_storage(prepared.output, prepared.s3), prepared)
    config = {
        "storage": (folder / "runs").as_posix(),
        "data": {"train": prepared.output},
        "model": SMALL | {"num_subspaces": 4},
        "training": {"steps": 6 if DRY else 200, "batch_size": 10 if DRY else 256},
        "optim": {"lr": 1e-3},
        "tracking": {"log_every": 2 if DRY else 20},
    }
    return open_run(PretrainConfig.model_validate(config | settings))


def loop() -> Results:
    """The job's own loop, from shards to weights, with compiled layers: its losses fall, and it reports a speed."""
    from crate_ray.training.bare_loop import train as train_loop
    from crate_ray.training.pretraining import PretrainTask

    class Listener:
        def __init__(self) -> None:
            self.logged: dict[int, dict[str, float]] = {}

        def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
            self.logged[step] = self.logged.get(step, {}) | values

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    listener: Any = Listener()
    with tempfile.TemporaryDirectory() as folder:
        run = shapes_run(Path(folder))
        train_loop(PretrainTask, run.config, run.record, run.total_steps, listeners=[listener])
    first, last = (listener.logged[step] for step in (min(listener.logged), max(listener.logged)))
    return {"first": first, "last": last}


def cifar() -> Results:
    """CIFAR-10: pretraining for the time that is left, then a linear probe on the mean of the last tokens."""
    from crate_ray.config import PretrainConfig
    from crate_ray.data.format.dataset import load_dataset
    from crate_ray.evaluation.evaluated_model import EvaluatedModel
    from crate_ray.evaluation.feature_source import InProcess
    from crate_ray.evaluation.torch_probe import fit_path
    from crate_ray.models.exported import ModelDescription
    from crate_ray.runs.export import describe
    from crate_ray.runs.pretraining import open_run
    from crate_ray.serving import FeaturePoint
    from crate_ray.storage.interface import open_storage
    from crate_ray.training.bare_loop import train as train_loop
    from crate_ray.training.pretraining import PretrainTask

    data = Path(os.environ.get("CRATE_RAY_GPU_CIFAR", "none"))
    if not (data / "train").is_dir():
        return {"skipped": f"no CIFAR-10 in {data}"}
    steps, seconds = (4, 1.0) if DRY else (300, float(os.environ.get("CRATE_RAY_GPU_SECONDS", "60")))
    settings: dict[str, Any] = {
        "data": {"train": str(data / "train")},
        "model": {"image_size": 32, "patch_size": 4, "dim": 256, "depth": 3, "num_subspaces": 8},
        "training": {"steps": steps, "batch_size": 64 if DRY else 512},
        "optim": {"lr": 2e-3},
    }
    found: Results = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, steps: int) -> Any:
            settings["training"]["steps"] = steps
            config = PretrainConfig.model_validate({"name": name, "storage": folder} | settings)
            opened = open_run(config)
            done = train_loop(PretrainTask, opened.config, opened.record, opened.total_steps)
            return opened, done

        began = time.perf_counter()
        run("short", steps)  # how long do steps take?
        per_step = (time.perf_counter() - began) / steps
        opened, done = run("long", 4 if DRY else max(steps, int(seconds / per_step)))
        found["steps"] = opened.total_steps
        description: ModelDescription = describe(opened.record, opened.total_steps)
        shards = [load_dataset(open_storage(str(data / part), opened.config.s3)) for part in ("train", "test")]
        for name, weights in (("trained", done.weights), ("untrained", None)):
            torch.manual_seed(0)
            model = build_model(opened.config.model)
            if weights is not None:
                model.load_state_dict(weights)
            evaluated = EvaluatedModel(name, model, description)
            (train,), (test,) = (InProcess().encoder(evaluated, part, [FeaturePoint()], None) for part in shards)
            # One strength: none is chosen on the images that are reported.
            (probe,) = fit_path(train.features, train.labels, (1e-2,), num_classes=10, device=CUDA)
            found[name] = float((probe.predict(test.features) == test.labels).mean())
    return found


# --- Speed ----------------------------------------------------------------------------------------------------------


def measured(preset: str, **settings: Any) -> Results:
    """Speed and memory of steps in bf16; settings are those of a Case."""
    from crate_ray.benchmarks.training import Case, measure
    from crate_ray.models.flops import gpu_peak_flops

    usual = {
        "contestant": "crate_mae", "preset": preset, "precision": "bf16", "image_size": SIDE, "batch_size": BATCH,
        "seconds": 0.1 if DRY else 4, "compile": "layers", "activation_checkpointing": False, "device": "cuda",
    }  # fmt: skip
    figures = measure(Case.model_validate(usual | settings)).model_dump()
    if peak := gpu_peak_flops(torch.cuda.get_device_name(0)):
        figures["mfu"] = figures["flops"] / figures["step_seconds"] / peak
    return figures


def train(preset: str) -> Results:
    """Steps of one preset: CRATE-MAE compiled and eager, its plain form, ViT-MAE."""
    found: Results = {}
    for contestant, compiles in (("crate_mae", True), ("crate_mae", False), ("plain", False), ("vit_mae", True)):
        name = f"{contestant} {'compiled' if compiles else 'eager'}"
        settings = {"contestant": contestant, "compile": "layers" if compiles else "off"}
        try:
            found[name] = measured(preset, **settings)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found[name] = measured(preset, **settings, batch_size=BATCH // 4) | {"batch_size": BATCH // 4}
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return found


def train_with(option: str, **settings: Any) -> Results:
    """Steps of the base model with an option for GPUs."""
    if option == "float8" and importlib.util.find_spec("torchao") is None:
        return {"skipped": "there is no torchao"}
    return {option: measured("tiny" if DRY else "base", **settings)}


def mssa() -> Results:
    """The Triton kernel of self-attention against PyTorch's: right, and faster? It is used where it is."""
    from crate_ray.models.kernels.attention import choose_self_attention

    shapes = {"dry": (1, 2, 17, 16)} if DRY else {"base": (256, 12, 197, 64), "large": (256, 16, 197, 64)}
    shapes |= {} if DRY else {"small": (256, 12, 197, 48), "CIFAR": (512, 8, 65, 32), "448 px": (32, 12, 785, 64)}
    return {name: choose_self_attention(*shape, BF16) for name, shape in shapes.items()}


def small_batches() -> Results:
    """Steps at small local batches, where launching kernels may take longer than running them."""
    found = {}
    for preset, batch, side in (("tiny", 2, 32),) if DRY else (("tiny", 32, 224), ("tiny", 128, 32), ("base", 16, 224)):
        for graph in (False, True):
            name = f"{preset}, {batch} images of {side}{', CUDA graph' if graph else ''}"
            found[name] = measured(preset, batch_size=batch, image_size=side, cuda_graph=graph)
    return found


def attention() -> Results:
    """Self-attention with query = key = value, forward and backward, by each backend that takes it."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found: Results = {}
    shapes = {"dry": (2, 2, 17, 8)} if DRY else {"base": (256, 12, 197, 64), "large": (256, 16, 197, 64)}
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for name, shape in shapes.items():
        x = torch.randn(shape, device=CUDA, dtype=BF16, requires_grad=True)
        for backend in [SDPBackend.MATH] if DRY else backends:

            def both(x: Tensor = x, backend: Any = backend) -> None:
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(x, x, x).sum().backward()
                x.grad = None

            try:
                found[f"{name} {backend.name}"] = seconds_of(both)
            except RuntimeError as error:
                found[f"{name} {backend.name}"] = str(error).splitlines()[0][:200]
    return found


def profile() -> Results:
    """Where the time of three steps of the base model goes, by kernel; the trace is written to OUT."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    config = CrateMAEConfig(**SMALL, num_subspaces=4) if DRY else CrateMAEConfig(preset="base")
    model: nn.Module = new_model(config)
    given = inputs(config, BATCH)
    compile_layers(model, [*model.encoder, *model.decoder], given, BF16)  # type: ignore[misc]
    optimizer = build_optimizer(model, OptimConfig())
    step = partial(train_step, model, optimizer, *given, batch_size=BATCH, lr=1e-4, clip_norm=CLIP, autocast=BF16)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + ([] if DRY else [ProfilerActivity.CUDA])
    with profiler(activities=activities) as trace:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    by = "self_cpu_time_total" if DRY else "self_cuda_time_total"
    table = trace.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
    (Path(os.environ["OUT"]) / "profile.txt").write_text(table)
    return {"table": "profile.txt"}


def decode() -> Results:
    """JPEGs decoded on the device beside a loop of products: the CPU's pixels, and images per second."""
    import io

    import numpy as np
    from PIL import Image

    from crate_ray.data.decode.samples import decode_batch
    from crate_ray.data.decode.transforms import centre_crops

    try:
        import torchvision.io  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return {"skipped": f"torchvision cannot be imported: {error}"}
    from crate_ray.data.decode.nvjpeg import decode_batch_cuda

    random, contents = np.random.default_rng(0), []
    for _ in range(64):
        coarse = Image.fromarray(random.integers(0, 255, (12, 16, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())

    def crop(heights: Any, widths: Any) -> Any:
        return centre_crops(heights, widths, (224, 224))

    expected = torch.zeros(len(contents), 3, 224, 224, dtype=torch.uint8)
    decode_batch(contents, "image", crop, expected)
    found = torch.zeros_like(expected, device=CUDA)
    side = torch.cuda.Stream()
    matrix = torch.randn(4096, 4096, device=CUDA, dtype=BF16)
    differences, began, rounds = [], time.perf_counter(), 20
    for _ in range(rounds):
        for _ in range(5):
            matrix @ matrix
        with torch.cuda.stream(side):
            decode_batch_cuda(contents, "image", crop, found)
        side.synchronize()
        differences.append((found.cpu().float() - expected.float()).abs().mean().item())
    seconds = time.perf_counter() - began
    return {"mean_difference": max(differences), "images_per_second": rounds * len(contents) / seconds}


PARTS: dict[str, Callable[[], Results]] = {
    "machine": machine,
    "ceilings": ceilings,
    "parity": parity,
    "no_waiting": no_waiting,
    "not_finite": not_finite,
    "graphed": graphed,
    "ddp": ddp,
    "checkpoint": checkpoint,
    "compiled": compiled,
    "loop": loop,
    **{f"train_{preset}": partial(train, preset) for preset in PRESETS},
    "base_bf16_tokens": partial(train_with, "bf16 tokens", bf16_tokens=True),
    "base_float8": partial(train_with, "float8", bf16_tokens=True, float8=True),
    "base_autotuned": partial(train_with, "autotuned", bf16_tokens=True, compile="autotune"),
    "attention": attention,
    "mssa": mssa,
    "small_batches": small_batches,
    "profile": profile,
    "decode": decode,
    "cifar": cifar,
}


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]]()))
