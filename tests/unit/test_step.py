"""The training step: however a global batch is cut over micro-batches and workers, its gradient is that of the whole.
Schedule, optimiser groups, clipping, mask noise and normalisation are what they say."""

from __future__ import annotations

import gc
import math
import socket
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from crate_ray.config import (
    CrateMAEConfig,
    DataConfig,
    FinetuneConfig,
    OptimConfig,
    OptimizerName,
    PretrainConfig,
    TrainingConfig,
    ViTMAEConfig,
)
from crate_ray.data.batch import Batch
from crate_ray.data.order.sequence import worker_slots
from crate_ray.finetuning.batches import TrainingBatches
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import Normalizer
from crate_ray.models.flops import training_flops
from crate_ray.training.optimizer import build_optimizer, learning_rate, peak_learning_rate
from crate_ray.training.parallel import parallelize, settle
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.step import (
    autocast_dtype,
    discard_step,
    mask_noise,
    micro_batches,
    num_micro_steps,
    probe_noise,
    train_step,
)
from crate_ray.training.task import WorkerContext

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=1, sparsity_lambda=0.1)


def model64(config: CrateMAEConfig | ViTMAEConfig = CONFIG) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build_model(config).double()


def batch64(size: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 8, 8, generator=random, dtype=torch.float64)
    return images, mask_noise(0, np.zeros(size, int), np.arange(size), CONFIG.num_patches)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def close(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-12) -> bool:
    return len(left) == len(right) and all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(left, right, strict=True)
    )


def no_update(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0, fused=True)


# --- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "micro_batch_size"), [(1, 8), (1, 3), (2, 2), (3, 2), (5, 1), (8, 4)])
def test_micro_batches_and_workers_give_the_gradient_of_the_whole_batch(workers: int, micro_batch_size: int) -> None:
    batch_size = 8  # n / 8 is exact in the float32 in which samples are weighted
    model, (images, noise) = model64(), batch64(batch_size)
    loss = model(images, noise).loss
    loss.backward()
    expected = gradients(model)
    expected_norm = torch.stack([g.norm() for g in expected]).norm()

    training = TrainingConfig(steps=1, batch_size=batch_size, micro_batch_size=micro_batch_size)
    micro_steps = num_micro_steps(training, workers)
    summed: list[Tensor] = []
    loss_sum = 0.0
    for worker in range(workers):
        start, stop = worker_slots(batch_size, worker, workers)
        sizes = [part.stop - part.start for part in micro_batches(stop - start, micro_steps)]
        assert len(sizes) == micro_steps and max(sizes) <= micro_batch_size and sum(sizes) == stop - start
        assert sizes[-1] > 0  # where DistributedDataParallel synchronises
        part_sum, norm = train_step(
            model,
            no_update(model),
            images[start:stop],
            noise[start:stop],
            batch_size=batch_size,
            world_size=workers,
            micro_steps=micro_steps,
            lr=0.0,
        )
        loss_sum += part_sum.item()
        own = gradients(model)
        assert norm.item() == pytest.approx(torch.stack([g.norm() for g in own]).norm().item(), rel=1e-6)
        summed = [a + b for a, b in zip(summed, own, strict=True)] if summed else own
    assert close([g / workers for g in summed], expected)  # the average over the workers is what DDP takes
    assert loss_sum / batch_size == pytest.approx(loss.item(), rel=1e-6)
    if workers == 1:
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-6)


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_clipping_scales_the_whole_gradient_to_its_norm(micro_steps: int) -> None:
    model, (images, noise) = model64(), batch64(8)
    arguments: Any = {"batch_size": 8, "micro_steps": micro_steps, "lr": 0.0}
    _, norm = train_step(model, no_update(model), images, noise, **arguments)
    whole = gradients(model)
    _, same_norm = train_step(model, no_update(model), images, noise, **arguments, clip_norm=norm.item() / 4)
    clipped = gradients(model)
    assert same_norm == norm  # the norm is reported as it was before clipping
    assert close(clipped, [g / 4 for g in whole], 1e-5)
    train_step(model, no_update(model), images, noise, **arguments, clip_norm=norm.item() * 4)
    assert close(gradients(model), whole)


def test_a_step_is_adamws() -> None:
    optim = OptimConfig(lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    images, noise = batch64(8)
    ours, theirs = model64(), model64()
    optimizer = build_optimizer(ours, optim)
    matrices = [p for p in theirs.parameters() if p.ndim > 1 and p.shape[:2] != (1, 1)]
    vectors = [p for p in theirs.parameters() if not any(p is m for m in matrices)]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.8, 0.9),
        eps=1e-6,
        foreach=False,
        fused=False,
    )
    for _ in range(3):
        train_step(ours, optimizer, images, noise, batch_size=8, micro_steps=2, lr=3e-3)
        reference.zero_grad()
        theirs(images, noise).loss.backward()
        reference.step()
    assert close(list(ours.parameters()), list(theirs.parameters()), 1e-10)


def test_a_discarded_step_leaves_nothing_behind() -> None:
    model, (images, noise) = model64(), batch64(3)
    before = [p.clone() for p in model.parameters()]
    discard_step(model, images, noise)
    assert gradients(model) == []
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_autocast_computes_in_bf16_and_keeps_weights_and_loss_in_fp32() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype("fp32", cpu) is None and autocast_dtype("bf16", cpu) == torch.bfloat16
    torch.manual_seed(0)
    model = build_model(CONFIG)
    images, noise = batch64(8)
    _, norm = train_step(model, no_update(model), images.float(), noise, batch_size=8, lr=0.0)
    full = gradients(model)
    loss_sum, half_norm = train_step(
        model, no_update(model), images.float(), noise, batch_size=8, lr=0.0, autocast=torch.bfloat16
    )
    half = gradients(model)
    assert loss_sum.dtype == torch.float32 and all(g.dtype == torch.float32 for g in half)
    assert not close(full, half, 1e-5) and half_norm.item() == pytest.approx(norm.item(), rel=0.05)


# --- Two processes --------------------------------------------------------------------------------------------------

STEPS, POISONED, GLOBAL_BATCH, ACCUMULATION = 4, 1, 5, 2
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)


def run_steps(model: torch.nn.Module, rank: int, world: int) -> None:
    """One process alone leaves out a step, in which one of several has a sample that is not finite."""
    # The parameters of the step are those of the module under DistributedDataParallel.
    optimizer = build_optimizer(model, OPTIM)
    start, stop = worker_slots(GLOBAL_BATCH, rank, world)
    for step in range(STEPS):
        images, noise = batch64(GLOBAL_BATCH)
        images = images + step
        if step == POISONED:
            if world == 1:
                continue
            images[-1] = math.nan
        train_step(
            model,
            optimizer,
            images[start:stop],
            noise[start:stop],
            batch_size=GLOBAL_BATCH,
            world_size=world,
            micro_steps=ACCUMULATION,
            lr=1e-2,
            clip_norm=0.5,
        )


def ddp_worker(rank: int, world: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timeout)
    model = model64()
    layers = [*model.encoder, *model.decoder]
    ddp = parallelize(model, layers, "ddp", world_size=world, device=torch.device("cpu"))
    assert isinstance(ddp, DistributedDataParallel) and ddp.static_graph
    settle(ddp, *batch64(1))
    run_steps(ddp, rank, world)
    buckets = {g.untyped_storage().data_ptr() for p in model.parameters() if (g := p.grad) is not None}
    assert len(buckets) == 1  # so small a model has one, and its gradients lie in it
    torch.save([p.detach() for p in model.parameters()], f"{path}/{rank}.pt")
    dist.barrier()
    del ddp
    gc.collect()  # gloo can deadlock in destroy_process_group otherwise
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_two_processes_with_uneven_batches_take_the_steps_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    second = mp.get_context("spawn").Process(target=ddp_worker, args=(1, 2, port, str(tmp_path)), daemon=True)
    second.start()
    ddp_worker(0, 2, port, str(tmp_path))
    second.join(timeout=60)
    assert second.exitcode == 0
    alone = model64()
    start = [p.clone() for p in alone.parameters()]
    run_steps(alone, 0, 1)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
    assert close(ranks[0], list(alone.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(start, ranks[0], strict=True))


# --- Schedule and optimiser -----------------------------------------------------------------------------------------


@given(
    st.integers(2, 400),
    st.one_of(st.floats(0, 0.9), st.integers(1, 50).map(float)),
    st.floats(1e-6, 1),
    st.floats(0, 1),
)
def test_learning_rate_warms_up_and_falls_to_its_minimum(steps: int, warmup: float, peak: float, low: float) -> None:
    optim = OptimConfig(lr=peak, warmup=warmup, min_lr=low * peak)
    rates = [learning_rate(step, steps, optim, 256) for step in range(steps)]
    length = round(warmup * steps) if warmup < 1 else int(warmup)
    rise, fall = rates[:length], rates[length:]
    assert rise == pytest.approx([peak * (i + 1) / length for i in range(len(rise))])
    if not fall:
        return
    assert fall[0] == pytest.approx(peak)
    assert all(a >= b for a, b in pairwise(fall))
    if len(fall) > 1:
        assert fall[-1] == pytest.approx(low * peak, abs=1e-12)
    if len(fall) % 2 == 1 and len(fall) > 1:  # a cosine is half way down in its middle
        assert fall[len(fall) // 2] == pytest.approx((peak + low * peak) / 2)


def test_peak_rate_scales_with_the_batch_unless_it_is_given() -> None:
    assert peak_learning_rate(OptimConfig(base_lr=1e-3), 4096) == pytest.approx(1.6e-2)
    assert peak_learning_rate(OptimConfig(base_lr=1e-3, lr=0.5), 4096) == 0.5
    assert learning_rate(5, 100, OptimConfig(base_lr=1e-3, warmup=5), 512) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG.model_copy(update={"depth": 2, "decoder_depth": 2, "decoder_maps": "tied"}),
        CONFIG,
        ViTMAEConfig(image_size=8, patch_size=2, dim=16, num_heads=2, depth=1),
    ],
    ids=["tied", "free", "vit"],
)
def test_biases_norms_and_tokens_do_not_decay(config: CrateMAEConfig | ViTMAEConfig) -> None:
    model = build_model(config)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    free = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    free |= {id(m.bias) for m in model.modules() if getattr(m, "bias", None) is not None}
    free |= {id(model.cls_token), id(model.mask_token)}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if id(parameter) in free else 0.3), name
    assert 0 < len(free) < len(decay)


# --- Noise and normalisation ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9), st.integers(0, 2**63), st.integers(0, 10**4))
def test_mask_noise_is_the_samples_own(samples: list[int], seed: int, epoch: int) -> None:
    epochs = np.full(len(samples), epoch)
    together = mask_noise(seed, epochs, np.array(samples), 12)
    assert together.dtype == torch.float32 and together.shape == (len(samples), 12)
    alone = torch.cat([mask_noise(seed, epochs[:1], np.array([sample]), 12) for sample in samples])
    assert torch.equal(together, alone)
    assert torch.equal(probe_noise(np.array(samples), 12)[-1:], probe_noise(np.array(samples[-1:]), 12))
    for other in (
        mask_noise(seed + 1, epochs, np.array(samples), 12),
        mask_noise(seed, epochs + 1, np.array(samples), 12),
    ):
        assert not (other == together).any()


def test_mask_noise_is_uniform_and_every_patch_is_masked_equally_often() -> None:
    from scipy.stats import kstest  # here, as the second process need not wait for it

    noise = mask_noise(3, np.full(2000, 7), np.arange(2000), 16)
    assert 0 <= noise.min() and noise.max() <= 1
    assert kstest(noise.numpy().ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(noise.numpy().T)[~np.eye(16, dtype=bool)]
    assert np.abs(correlation).max() < 5 / math.sqrt(2000)
    visible = (noise.argsort(1).argsort(1) < 4).float().mean(0)
    assert (visible - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 2000)


def test_normaliser_scales_bytes_and_undoes_itself() -> None:
    normalizer = Normalizer.of((0.5, 0.25, 0.0), (0.5, 0.1, 2.0))
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalised = normalizer(images)
    assert normalised.dtype == torch.float32
    expected = (images[:, 1].double() / 255 - 0.25) / 0.1
    assert torch.allclose(normalised[:, 1].double(), expected, atol=1e-5)
    assert torch.equal((normalizer.undo(normalised) * 255).round().to(torch.uint8), images)
    grid = torch.randn(2, 3, 5, 6, dtype=torch.float64) * 100  # numbers that are no bytes stay on their scale
    assert torch.allclose(normalizer(grid)[:, 2], (grid[:, 2] / 2.0).float())
    assert torch.allclose(normalizer.undo(normalizer(grid)), grid.float(), atol=1e-4)


# --- Speed ----------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the program wait for a GPU: numbers from tensors, shapes that depend on values."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().partition("::")[2].partition(".")[0] not in self.refused, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("checkpointed", "optimizer"), [(False, "adamw"), (True, "adamw"), (False, "lion"), (False, "muon")]
)
@pytest.mark.parametrize("config", [CONFIG, ViTMAEConfig(image_size=8, patch_size=2, dim=16, num_heads=2, depth=1)])
def test_a_step_never_waits_for_the_device(
    config: CrateMAEConfig | ViTMAEConfig, checkpointed: bool, optimizer: OptimizerName
) -> None:
    model = build_model(config)
    model.checkpoint_layers = checkpointed
    built, (images, noise) = build_optimizer(model, OptimConfig(optimizer=optimizer)), batch64(4)
    step: dict[str, Any] = {"batch_size": 4, "micro_steps": 2, "lr": 1e-3, "clip_norm": 1.0, "autocast": torch.bfloat16}
    with pytest.raises(AssertionError), NoWaiting():
        images.sum().item()
    with NoWaiting():
        train_step(model, built, images.float(), noise, **step)


class Copies(TorchDispatchMode):
    """Whether each copy to another device is one that the program does not wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            self.found.append(kwargs.get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_what_it_is_given() -> None:
    device, order = torch.device("meta"), SimpleNamespace(seed=0)
    normalizer = Normalizer.of((0.0,) * 3, (1.0,) * 3, device)
    context = WorkerContext(
        cast(Any, SimpleNamespace(order=order)), cast(Any, None), None, 0, 1, device, None, normalizer
    )
    numbers, images = np.arange(4), torch.empty(4, 3, 8, 8, device=device)
    batch = Batch(0, numbers, images, numbers, ["a", "b", "c", "d"], numbers)
    training = TrainingConfig(batch_size=4, steps=1)
    task = PretrainTask(PretrainConfig(data=DataConfig(train="x"), model=CONFIG, training=training), context)
    tuning = FinetuneConfig.model_validate(
        {"model": "x", "data": {"train": "x"}, "drop_path": 0.1, "augment": {"randaugment": 0, "mixup": 0.8}}
    )
    with Copies() as copies:
        task.inputs(batch)
        TrainingBatches(tuning, 5, [1, 1], normalizer, (0, 4))(batch)
    assert copies.found == [True, True, True]  # mask noise; targets and factors of drop path
    # ISTA of so many tokens takes one product, of one image's it takes two.
    assert task.flops_per_image == training_flops(CONFIG, 4) / 4 < training_flops(CONFIG, 1)
