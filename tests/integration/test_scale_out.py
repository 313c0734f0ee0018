"""Real processes over gloo: a run goes on with another number of workers, from DDP to FSDP2 and back, and with workers
that Ray adds and takes away while it trains."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import ray
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from torch import Tensor

from crate_ray.config import CrateMAEConfig, OptimConfig, PrepareConfig, PretrainConfig, TrainingConfig
from crate_ray.data.builtin import digits_source
from crate_ray.data.loader import training_loader
from crate_ray.data.order import worker_slots
from crate_ray.data.packing import pack
from crate_ray.data.storage import LocalStorage, open_storage
from crate_ray.models import build_model
from crate_ray.tracking.initial import initial_weights
from crate_ray.training.checkpoint import (
    STATE_FILE,
    CheckpointState,
    checkpoint_tensors,
    commit_checkpoint,
    committed,
    fetch_newest,
    load_weights,
    own_part,
    read_tensors,
    restore_checkpoint,
    upload_part,
    write_part,
)
from crate_ray.training.listener import Listener
from crate_ray.training.parallel import micro_steps_of, parallelize, settle
from crate_ray.training.run import Run, open_run, pretrain, start_from
from crate_ray.training.step import build_optimizer, learning_rate, train_step
from crate_ray.training.telemetry import keys_digest
from tests.jobs import forkserver
from tests.unit.test_checkpoint import RECORD

STEPS = 6
TRAINING = TrainingConfig(batch_size=7, micro_batch_size=1, steps=STEPS)  # uneven, and with accumulation
OPTIM = OptimConfig(lr=1e-2, warmup=2, weight_decay=0.1)


class Phase(NamedTuple):
    """So many workers that train up to a step."""

    workers: int
    strategy: Literal["ddp", "fsdp"]
    until: int


def work(rank: int, phase: Phase, folder: Path, rendezvous: str, config: CrateMAEConfig, dtype: torch.dtype) -> None:
    """One worker: go on from the newest checkpoint and write another at the end."""
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


@pytest.mark.parametrize(("workers", "strategy"), [(2, "ddp"), (3, "ddp"), (3, "fsdp")])
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


@pytest.mark.parametrize("path", PATHS)
def test_a_run_whose_workers_change_ends_as_one_worker_alone(path: str, tmp_path: Path) -> None:
    """In float64, where another order of summation is far below what a wrong weight or a lost moment would change."""
    decoder_maps, phases = PATHS[path]
    config = MODEL.model_copy(update={"decoder_maps": decoder_maps})
    alone = train(tmp_path / "alone", Phase(1, "ddp", STEPS), config=config, dtype=torch.float64)
    changed = train(tmp_path / "changed", *phases, config=config, dtype=torch.float64)
    assert alone.keys() == changed.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(changed[name], expected, rtol=1e-9, atol=1e-12, msg=name)


# --- On Ray ---------------------------------------------------------------------------------------------------------


class Follower(Listener):
    """Keeps every metric by step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {}
        self.pictures: list[tuple[int, str]] = []

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value

    def picture(self, step: int, name: str, png: bytes) -> None:
        self.pictures.append((step, name))

    def bad_samples(self, step: int, causes: dict[str, str]) -> None:
        raise AssertionError(causes)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", split="test", output=str(tmp_path_factory.mktemp("digits")))
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    return config.output


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray of one node with room for two workers, to which nodes may be added."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
        patch.setenv("RAY_health_check_period_ms", "1000")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(cluster.address, logging_level=logging.WARNING)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def settings(folder: Path, digits: str, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "name": "run",
        "storage": str(folder),
        "data": {"train": digits, "validation": digits, "crop_scale": [0.5, 1]},
        "model": {"image_size": 8, "patch_size": 2, "channels": 1, "dim": 16, "depth": 1, "num_subspaces": 2},
        "training": {"batch_size": 22, "micro_batch_size": 4, "steps": 12, "validate_every": 8, "precision": "fp32"},
        "optim": {"lr": 0.003},
        "scaling": {"workers": 2, "cpus_per_worker": 1},
        "checkpoint": {"every_steps": 3, "keep_last": 1},
        "tracking": {"log_every": 1, "picture_every": 6},
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return PretrainConfig.model_validate(values)


def follow(config: PretrainConfig) -> tuple[Run, Follower]:
    run, follower = start_from(open_run(config), lambda reference: initial_weights(reference, config)), Follower()
    pretrain(run, [follower])
    return run, follower


def test_fsdp_trains_as_ddp_does_and_keeps_the_best_checkpoints(cluster: Cluster, digits: str, tmp_path: Path) -> None:
    _, ddp = follow(settings(tmp_path / "ddp", digits))
    sharded = settings(
        tmp_path / "fsdp", digits, scaling={"strategy": "fsdp"}, checkpoint={"keep_best": 2, "keep_last": 1}
    )
    run, fsdp = follow(sharded)
    for name in ("loss", "gradient_norm", "batch_digest"):
        assert fsdp.values[name] == pytest.approx(ddp.values[name], rel=1e-3), name
    assert fsdp.values["validation_loss"].keys() == {3, 6, 8, 9, 12} and ddp.values["validation_loss"].keys() == {8, 12}
    assert fsdp.values["validation_loss"][12] == pytest.approx(ddp.values["validation_loss"][12], rel=1e-3)
    names = ("reconstruction", "attention", "layers")
    assert fsdp.pictures == ddp.pictures == [(step, name) for step in (0, 6, 12) for name in names]
    for name in ("coding_rate/layer_01", "gini/layer_01"):
        assert fsdp.values[name].keys() == {0, 6, 12}
        assert fsdp.values[name] == pytest.approx(ddp.values[name], rel=1e-3), name
    assert fsdp.values["checkpoint_background_seconds"].keys() == {3, 6, 9, 12}
    # Both parts of the sharded model together are the model.
    _, weights = load_weights(run.storage)
    build_model(sharded.model).load_state_dict(weights)
    best = sorted((3, 6, 9, 12), key=fsdp.values["validation_loss"].__getitem__)[:2]
    assert [commit.step for commit in committed(run.storage)] == sorted({12, *best}, reverse=True)
    folders = {path.parent.name for path in (tmp_path / "fsdp" / "run").glob("attempt-001/*/state.json")}
    assert folders == {commit.directory.split("/")[1] for commit in committed(run.storage)}
    # Another run starts where it ended, which its first loss shows, with a schedule of its own.
    start = {"init_from": run.storage.uri, "scaling": {"strategy": "fsdp"}, "training": {"steps": 1}}
    _, another = follow(settings(tmp_path / "another", digits, **start))
    assert another.values["loss"][1] < 0.95 * ddp.values["loss"][1]


@pytest.mark.timeout(600)
def test_a_node_joins_and_a_node_leaves_while_a_run_trains(cluster: Cluster, digits: str, tmp_path: Path) -> None:
    steps = 400
    common: dict[str, Any] = {
        "model": {"dim": 96, "depth": 4},
        "training": {"batch_size": 60, "micro_batch_size": 8, "steps": steps, "validate_every": steps},
        "checkpoint": {"every_steps": 10, "keep_last": 1000},
        "tracking": {"picture_every": None},
    }
    config = settings(
        tmp_path / "elastic", digits, scaling={"workers": [2, 3], "resize_seconds": 1, "max_failures": 2}, **common
    )
    run = open_run(config)
    sizes: list[int] = []

    def wait_for(workers: int, after: int = 0) -> int:
        """Until so many workers have committed a checkpoint later than a step; its step."""
        for _ in range(2000):
            for commit in committed(run.storage):
                state = CheckpointState.model_validate_json(run.storage.read(f"{commit.directory}/{STATE_FILE}"))
                if commit.step > after and state.world_size == workers:
                    sizes.append(workers)
                    return commit.step
            assert not training.done(), f"the run ended before {workers} workers had a checkpoint: {training.result()}"
            time.sleep(0.1)
        raise AssertionError(f"no checkpoint of {workers} workers after step {after}")

    elastic = Follower()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(pretrain, run, [elastic])
        step = wait_for(2)
        node = cluster.add_node(num_cpus=1)
        step = wait_for(3, step)
        cluster.remove_node(node, allow_graceful=False)
        wait_for(2, step)
        training.result()
    assert sizes == [2, 3, 2]
    assert elastic.values["batch_digest"] == batch_digests(run, steps)
    assert elastic.values["validation_loss"][steps] < 0.9 * elastic.values["loss"][1]


def batch_digests(run: Run, steps: int) -> dict[int, float]:
    """Digests of the batches of one worker alone, by step."""
    config, order = run.config, run.record.order
    with training_loader(run.mixture, order, config.model, config.data, steps=range(steps)) as loader:
        return {batch.step + 1: float(keys_digest(batch.keys, 0)) for batch in loader}
