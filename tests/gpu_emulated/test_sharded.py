"""FSDP2 in bf16 on the device: a step, a probe and the compiled programs. The process group is a fake one, so numbers
mean nothing here; dtypes, devices and the number of programs do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from crate_ray.config import CrateMAEConfig, OptimConfig
from crate_ray.models import build_model
from crate_ray.models.exported import Normalizer
from crate_ray.training.compilation import compile_layers
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.parallel import is_sharded, parallelize, whole_weights
from crate_ray.training.step import train_step
from tests.gpu_emulated.device import recorded, syncs
from tests.programs import recorded_programs

BATCH = 4
CONFIG = CrateMAEConfig(image_size=16, patch_size=4, dim=32, depth=3, num_subspaces=4)
PROGRAMS = 3
"""For each number of samples: encoder layers, the first decoder layer, which gets tokens in fp32, and the others."""


@pytest.fixture
def two_workers() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def sharded() -> Any:
    model = build_model(CONFIG).cuda()
    layers = [*model.encoder, *model.decoder]
    parallelize(model, layers, "fsdp", world_size=2, device=torch.device("cuda"), autocast=torch.bfloat16)
    assert is_sharded(model)
    return model


def inputs(count: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, 16, 16).cuda(), torch.rand(count, CONFIG.num_patches).cuda()


def test_a_step_in_bf16_does_not_wait(two_workers: None) -> None:
    model = sharded()
    optimizer = build_optimizer(model, OptimConfig())
    images, noise = inputs()
    train_step(model, optimizer, images, noise, batch_size=2 * BATCH, world_size=2, lr=1e-3, autocast=torch.bfloat16)
    with recorded() as events:
        train_step(
            model, optimizer, images, noise,
            batch_size=2 * BATCH, world_size=2, lr=1e-3, clip_norm=1.0, autocast=torch.bfloat16,
        )  # fmt: skip
    assert syncs(events) == []
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_probe_runs_on_whole_weights_in_fp32(two_workers: None) -> None:
    weights = whole_weights(sharded())
    replica = build_model(CONFIG)
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in replica.state_dict().items()
    }
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in weights.values())
    replica.cuda().load_state_dict(weights)
    images, noise = inputs()
    assert replica(Normalizer.of((0.5,) * 3, (0.2,) * 3, "cuda")(images), noise).sample_loss.dtype == torch.float32


def test_sharded_layers_are_compiled_once_for_each_kind_and_number_of_samples(
    two_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = recorded_programs(monkeypatch)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    model = sharded()
    layers = [*model.encoder, *model.decoder]
    assert compile_layers(model, layers, inputs(), torch.bfloat16, required=True)
    at_start = len(programs)
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(3):
        train_step(model, optimizer, *inputs(), batch_size=2 * BATCH, world_size=2, lr=1e-3, autocast=torch.bfloat16)
    assert len(programs) == at_start == PROGRAMS
    for _ in range(2):
        train_step(
            model, optimizer, *inputs(2 * BATCH - 1),  # micro-batches of one sample fewer, and of BATCH
            batch_size=4 * BATCH - 1, world_size=2, micro_steps=2, lr=1e-3, autocast=torch.bfloat16,
        )  # fmt: skip
        assert len(programs) == 2 * PROGRAMS
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):  # as in validation
        model(*inputs(1))
    assert len(programs) == 2 * PROGRAMS and not breaks
    assert all("forward" in vars(layer) for layer in layers)  # none went back to uncompiled code
