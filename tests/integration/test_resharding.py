"""Real processes over gloo: a run resumes with another number of workers, and from DDP to FSDP2 and back."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from crate_ray.config import CrateMAEConfig, OptimConfig, OptimizerName, TrainingConfig
from crate_ray.data.order.sequence import worker_slots
from crate_ray.models import build_model
from crate_ray.runs.checkpoint_files import (
    STATE_FILE,
    CheckpointState,
    checkpoint_tensors,
    own_part,
    read_tensors,
    restore_checkpoint,
    write_part,
)
from crate_ray.runs.commits import commit_checkpoint, committed, fetch_newest, upload_part
from crate_ray.storage.local import LocalStorage
from crate_ray.training.lion import Lion
from crate_ray.training.muon import MuonWithAdamW
from crate_ray.training.optimizer import build_optimizer, learning_rate
from crate_ray.training.parallel import micro_steps_of, parallelize, settle
from crate_ray.training.step import train_step
from tests.jobs import forkserver
from tests.unit.test_checkpoint import RECORD

STEPS = 6
TRAINING = TrainingConfig(batch_size=7, micro_batch_size=1, steps=STEPS)  # uneven, and with accumulation
OPTIMS = {name: OptimConfig(optimizer=name, lr=1e-2, warmup=2, weight_decay=0.1) for name in get_args(OptimizerName)}


class Phase(NamedTuple):
    """A number of workers that train up to a step."""

    workers: int
    strategy: Literal["ddp", "fsdp"]
    until: int
    optimizer: OptimizerName = "adamw"


def work(rank: int, phase: Phase, folder: Path, rendezvous: str, config: CrateMAEConfig, dtype: torch.dtype) -> None:
    """One worker: resume from the newest checkpoint, and write another at the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=phase.workers)
    torch.manual_seed(0)
    model = build_model(config).to(dtype)
    cpu = torch.device("cpu")
    trained = parallelize(model, [*model.encoder, *model.decoder], phase.strategy, world_size=phase.workers, device=cpu)
    optim = OPTIMS[phase.optimizer]
    optimizer = build_optimizer(model, optim)
    run, local, done = LocalStorage(folder), folder.with_name(f"local-{rank}-{uuid.uuid4().hex}"), 0
    if fetch_newest(run, local / "restore") is not None:
        done = restore_checkpoint(local / "restore", model, optimizer).step
    settle(trained, torch.zeros(1, 3, 8, 8, dtype=dtype), torch.zeros(1, 16))
    first, stop = worker_slots(TRAINING.batch_size, rank, phase.workers)
    for step in range(done, phase.until):
        random = torch.Generator().manual_seed(step)
        images = torch.randn(TRAINING.batch_size, 3, 8, 8, generator=random, dtype=dtype)[first:stop]
        noise = torch.rand(TRAINING.batch_size, 16, generator=random)[first:stop]
        train_step(
            trained,
            optimizer,
            images,
            noise,
            batch_size=TRAINING.batch_size,
            world_size=phase.workers,
            micro_steps=micro_steps_of(TRAINING, model, phase.workers),
            lr=learning_rate(step, STEPS, optim, TRAINING.batch_size),
            clip_norm=0.5,
        )
    write_part(local / "part", own_part(checkpoint_tensors(model, optimizer), rank, phase.workers), rank, phase.workers)
    directory = f"attempt-001/step-{phase.until:08d}-{Path(rendezvous).name}"
    if rank == 0:
        state = CheckpointState(step=phase.until, run=RECORD, world_size=phase.workers, torch_version="2")
        (local / "part" / STATE_FILE).write_text(state.model_dump_json())
    upload_part(run, directory, local / "part", rank, phase.workers)
    if rank == 0:
        commit_checkpoint(run, directory, phase.until, phase.workers, timeout=60)
    shutil.rmtree(local)
    dist.barrier()
    del trained
    dist.destroy_process_group()


MODEL = CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=2)


def train(
    folder: Path, *phases: Phase, config: CrateMAEConfig = MODEL, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Go through phases, each in processes of its own; all tensors of the last one's checkpoint."""
    processes = forkserver()
    for phase in phases:
        rendezvous = (folder.parent / uuid.uuid4().hex).as_posix()
        group = [
            processes.Process(target=work, args=(rank, phase, folder, rendezvous, config, dtype))
            for rank in range(phase.workers)
        ]
        for process in group:
            process.start()
        for process in group:
            process.join(120)
        try:
            assert [process.exitcode for process in group] == [0] * phase.workers, phase
        finally:
            for process in group:
                process.kill()
    return tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint."""
    fetched = folder.with_name(uuid.uuid4().hex)
    assert fetch_newest(LocalStorage(folder), fetched) is not None
    return read_tensors(fetched)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise the same."""
    assert a.keys() == b.keys() and any("/exp_avg" in name for name in a)
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("workers", "strategy", "optimizer"),
    [
        pytest.param(2, "ddp", "adamw", marks=pytest.mark.daily),
        pytest.param(3, "ddp", "adamw", marks=pytest.mark.daily),
        (3, "fsdp", "adamw"),
        pytest.param(3, "fsdp", "lion", marks=pytest.mark.daily),
        pytest.param(3, "fsdp", "muon", marks=pytest.mark.daily),
    ],
)
def test_resumed_on_the_same_number_of_workers_a_run_ends_bitwise_the_same(
    workers: int, strategy: Literal["ddp", "fsdp"], optimizer: OptimizerName, tmp_path: Path
) -> None:
    undisturbed = train(tmp_path / "a", Phase(workers, strategy, STEPS, optimizer))
    resumed = train(tmp_path / "b", Phase(workers, strategy, 3, optimizer), Phase(workers, strategy, STEPS, optimizer))
    assert differing(undisturbed, resumed) == []


def test_a_checkpoint_passes_bitwise_through_other_numbers_of_workers_and_strategies(tmp_path: Path) -> None:
    saved = train(tmp_path / "run", Phase(2, "ddp", 2))
    for workers, strategy in ((3, "fsdp"), (1, "ddp"), (2, "fsdp"), (3, "ddp")):
        assert differing(saved, train(tmp_path / "run", Phase(workers, strategy, 2))) == []
    assert [commit.step for commit in committed(LocalStorage(tmp_path / "run"))] == [2] * 5


PATHS = {
    "2, 3 and 1 workers": ("free", [Phase(2, "ddp", 2), Phase(3, "ddp", 4), Phase(1, "ddp", 6)]),
    "ddp, fsdp, ddp": ("free", [Phase(2, "ddp", 2), Phase(2, "fsdp", 4), Phase(2, "ddp", 6)]),
    "fsdp on 3, 1 and 2 workers": ("tied", [Phase(3, "fsdp", 2), Phase(1, "fsdp", 4), Phase(2, "fsdp", 6)]),
}


@pytest.mark.parametrize(
    "path", [p if p.startswith("fsdp") else pytest.param(p, marks=pytest.mark.daily) for p in PATHS]
)
def test_a_run_whose_workers_change_ends_as_one_worker_alone(path: str, tmp_path: Path) -> None:
    """In float64, where another order of summation is far below what a wrong weight or a lost moment would change."""
    decoder_maps, phases = PATHS[path]
    config = MODEL.model_copy(update={"decoder_maps": decoder_maps})
    alone = train(tmp_path / "alone", Phase(1, "ddp", STEPS), config=config, dtype=torch.float64)
    changed = train(tmp_path / "changed", *phases, config=config, dtype=torch.float64)
    assert alone.keys() == changed.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(changed[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def sharded_step(rank: int, rendezvous: str) -> None:
    """On each of two workers: a step of Muon and Lion with sharded parameters is that with whole ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for shape in ((25, 16), (16, 25), (16, 16)):  # also with unequal shards
        weight = torch.randn(shape)
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        gradient = left * torch.linspace(1, 2, 16) @ right  # far from singular: no direction is all rounding
        ends = []
        for place in (lambda t: t, lambda t: distribute_tensor(t, mesh, [Shard(0)])):
            muon, lion, other = (nn.Parameter(place(weight.clone())) for _ in range(3))
            for parameter in (muon, lion, other):
                parameter.grad = place(gradient.clone())
            group = {"weight_decay": 0.1}
            groups = [{"params": [p], **group} for p in (muon, other, lion)]
            optimizers = [
                MuonWithAdamW(groups[:1], groups[1:2], betas=(0.9, 0.95), eps=1e-8),
                Lion(groups[2:], (0.9, 0.99)),
            ]
            for found_inf in (0.0, 1.0):
                for optimizer in optimizers:
                    optimizer.found_inf = torch.tensor(found_inf)
                    optimizer.param_groups[0]["lr"] = 0.1
                    optimizer.step()
            ends.append([t.full_tensor() if isinstance(t, DTensor) else t for t in (muon.detach(), lion.detach())])
        (muon, lion), (sharded_muon, sharded_lion) = ends
        assert torch.equal(lion, sharded_lion)
        kept = weight * (1 - 0.1 * 0.1)
        assert torch.dist(muon, sharded_muon) < 0.03 * torch.dist(muon, kept)  # products are in bf16
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.daily
def test_a_sharded_step_of_lion_and_muon_is_that_of_whole_weights(tmp_path: Path) -> None:
    group = [
        forkserver().Process(target=sharded_step, args=(rank, (tmp_path / "rendezvous").as_posix())) for rank in (0, 1)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert [process.exitcode for process in group] == [0, 0]
