"""Real processes over gloo: a run resumes with another number of workers, and from DDP to FSDP2 and back."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray.config import CrateMAEConfig, OptimConfig, TrainingConfig
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
from crate_ray.training.optimizer import build_optimizer, learning_rate
from crate_ray.training.parallel import micro_steps_of, parallelize, settle
from crate_ray.training.step import train_step
from tests.jobs import forkserver
from tests.unit.test_checkpoint import RECORD

STEPS = 6
TRAINING = TrainingConfig(batch_size=7, micro_batch_size=1, steps=STEPS)  # uneven, and with accumulation
OPTIM = OptimConfig(lr=1e-2, warmup=2, weight_decay=0.1)


class Phase(NamedTuple):
    """A number of workers that train up to a step."""

    workers: int
    strategy: Literal["ddp", "fsdp"]
    until: int


def work(rank: int, phase: Phase, folder: Path, rendezvous: str, config: CrateMAEConfig, dtype: torch.dtype) -> None:
    """One worker: resume from the newest checkpoint, and write another at the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=phase.workers)
    torch.manual_seed(0)
    model = build_model(config).to(dtype)
    cpu = torch.device("cpu")
    trained = parallelize(model, [*model.encoder, *model.decoder], phase.strategy, world_size=phase.workers, device=cpu)
    optimizer = build_optimizer(model, OPTIM)
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
            lr=learning_rate(step, STEPS, OPTIM, TRAINING.batch_size),
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
    assert a.keys() == b.keys() and any("/exp_avg_sq" in name for name in a)
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("workers", "strategy"), [pytest.param(2, "ddp", marks=pytest.mark.daily), (3, "ddp"), (3, "fsdp")]
)
def test_resumed_on_the_same_number_of_workers_a_run_ends_bitwise_the_same(
    workers: int, strategy: Literal["ddp", "fsdp"], tmp_path: Path
) -> None:
    undisturbed = train(tmp_path / "a", Phase(workers, strategy, STEPS))
    resumed = train(tmp_path / "b", Phase(workers, strategy, 3), Phase(workers, strategy, STEPS))
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
    "path", [pytest.param(p, marks=pytest.mark.daily) if "workers" in p and "fsdp" not in p else p for p in PATHS]
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
