"""On Ray Train: FSDP2 trains as DDP does, and an elastic run gains and loses workers."""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from crate_ray.config import PrepareConfig, PretrainConfig, S3Config
from crate_ray.data.loader import training_loader
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.runs import metrics
from crate_ray.runs.checkpoint_files import STATE_FILE, CheckpointState
from crate_ray.runs.commits import committed, load_weights
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import driver_lease
from crate_ray.runs.pretraining import Run, open_run, start_from
from crate_ray.storage.interface import open_storage
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.ray.driver import train_on_ray
from crate_ray.training.ray.mailbox import Mailbox
from crate_ray.training.ray.reporter import RayReporter
from crate_ray.training.telemetry import keys_digest
from tests.jobs import RayCluster, kill_node

pytestmark = pytest.mark.ray


class Follower(Listener):
    """Records every metric by step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {}
        self.pictures: list[tuple[int, str]] = []

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value

    def picture(self, step: int, name: str, png: bytes) -> None:
        self.pictures.append((step, name))

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        raise AssertionError(causes)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", split="test", output=str(tmp_path_factory.mktemp("digits")))
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    return config.output


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
    with driver_lease(config) as lease:
        run, follower = start_from(open_run(config)), Follower()
        train_on_ray(run, lease, PretrainTask, [follower])
    return run, follower


@pytest.mark.daily  # tests/integration/test_resharding.py trains with FSDP on each CI run
def test_fsdp_trains_as_ddp_does_and_keeps_the_best_checkpoints(
    driver_here: RayCluster, digits: str, tmp_path: Path
) -> None:
    _, ddp = follow(settings(tmp_path / "ddp", digits))
    sharded = settings(
        tmp_path / "fsdp", digits, scaling={"strategy": "fsdp"}, checkpoint={"keep_best": 2, "keep_last": 1}
    )
    run, fsdp = follow(sharded)
    for name in (metrics.LOSS, metrics.GRADIENT_NORM, metrics.BATCH_DIGEST):
        assert fsdp.values[name] == pytest.approx(ddp.values[name], rel=1e-3), name
    assert fsdp.values[metrics.VALIDATION_LOSS].keys() == {3, 6, 8, 9, 12} and ddp.values[
        metrics.VALIDATION_LOSS
    ].keys() == {8, 12}
    assert fsdp.values[metrics.VALIDATION_LOSS][12] == pytest.approx(ddp.values[metrics.VALIDATION_LOSS][12], rel=1e-3)
    names = ("reconstruction", "attention", "layers", "signals")
    assert fsdp.pictures == ddp.pictures == [(step, name) for step in (0, 6, 12) for name in names]
    signal = metrics.learning_signal("gradient_norm", "first")
    for name in (metrics.layer_measure("coding_rate", 1), metrics.layer_measure("gini", 1), signal):
        assert fsdp.values[name].keys() == {0, 6, 12}
        assert fsdp.values[name] == pytest.approx(ddp.values[name], rel=1e-3), name
    assert fsdp.values[metrics.CHECKPOINT_BACKGROUND_SECONDS].keys() == {3, 6, 9, 12}
    # The two parts of the sharded model together are the model.
    _, weights = load_weights(run.storage)
    build_model(sharded.model).load_state_dict(weights)
    best = sorted((3, 6, 9, 12), key=fsdp.values[metrics.VALIDATION_LOSS].__getitem__)[:2]
    assert [commit.step for commit in committed(run.storage)] == sorted({12, *best}, reverse=True)
    folders = {path.parent.name for path in (tmp_path / "fsdp" / "run").glob("attempt-001/*/state.json")}
    assert folders == {commit.directory.split("/")[1] for commit in committed(run.storage)}
    # Another run starts from its final weights, as its first loss shows.
    start = {"init_from": run.storage.uri, "scaling": {"strategy": "fsdp", "workers": 1}, "training": {"steps": 1}}
    _, another = follow(settings(tmp_path / "another", digits, **start))
    assert another.values[metrics.LOSS][1] < 0.95 * ddp.values[metrics.LOSS][1]


@pytest.mark.daily
@pytest.mark.timeout(900)
def test_a_node_joins_and_a_node_leaves_while_a_run_trains(
    driver_here: RayCluster, digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would take hours; it is ended after it has trained with two workers, three, and two again."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", temporary.as_posix())

    class OverError(Exception):
        pass

    class Elastic(Follower):
        is_over = False

        def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
            super().metrics(step, values, time_ms)
            if self.is_over:
                raise OverError

    config = settings(
        tmp_path / "elastic",
        digits,
        model={"dim": 96, "depth": 4},
        training={"batch_size": 60, "micro_batch_size": 8, "steps": 100_000, "validate_every": 100_000},
        optim={"warmup": 10},
        scaling={"workers": [2, 3], "resize_seconds": 1, "max_failures": 2},
        checkpoint={"every_steps": 10, "keep_last": 1000},
        tracking={"picture_every": None},
    )
    run = open_run(config)
    sizes: list[int] = []

    def wait_for(workers: int, after: int = 0) -> int:
        """Wait until a number of workers has committed a checkpoint after a step; returns its step."""
        for _ in range(2000):
            for commit in committed(run.storage):
                state = CheckpointState.model_validate_json(run.storage.read(f"{commit.directory}/{STATE_FILE}"))
                if commit.step > after and state.world_size == workers:
                    sizes.append(workers)
                    return commit.step
            assert not training.done(), f"the run ended before {workers} workers had a checkpoint: {training.result()}"
            time.sleep(0.1)
        raise AssertionError(f"no checkpoint of {workers} workers after step {after}")

    elastic = Elastic()
    with driver_lease(config) as lease, ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_on_ray, run, lease, PretrainTask, [elastic])
        try:
            step = wait_for(2)
            node = driver_here.add_node(1)
            step = wait_for(3, step)
            kill_node(node)
            wait_for(2, step)
        finally:
            elastic.is_over = True
        with pytest.raises(OverError):
            training.result()
    assert list(temporary.glob("*/processes")) and not list(temporary.rglob("driver-*"))
    assert sizes == [2, 3, 2]
    digests, losses = elastic.values[metrics.BATCH_DIGEST], elastic.values[metrics.LOSS]
    assert digests == batch_digests(run, max(digests))
    assert losses[max(losses)] < 0.9 * losses[1]


def batch_digests(run: Run, steps: int) -> dict[int, float]:
    """Digests of the batches of a single worker, by step."""
    config, order = run.config, run.record.order
    with training_loader(run.mixture, order, config.model, config.data, steps=range(steps)) as loader:
        return {batch.step + 1: float(keys_digest(batch.keys, 0)) for batch in loader}


@pytest.fixture(scope="module")
def damaged(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same dataset; a seventh of its samples is unusable."""
    folder = tmp_path_factory.mktemp("damaged")
    (packed,) = Path(digits).glob("*.tar")
    with tarfile.open(packed) as source, tarfile.open(folder / "foreign.tar", "w") as target:
        for number, member in enumerate(source):
            file = source.extractfile(member)
            assert file is not None
            broken = number % 7 == 0 and member.name.endswith("png")
            content = b"no image" if broken else file.read()
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    index_existing(open_storage(str(folder), S3Config()))
    return str(folder)


class BadSamples(Listener):
    """Records the cause of each bad sample and the step at which it was reported, by key."""

    def __init__(self) -> None:
        self.causes: dict[str, str] = {}
        self.steps: dict[str, int] = {}

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        self.causes |= causes
        self.steps |= dict.fromkeys(causes, step)


@pytest.mark.daily
def test_a_run_stopped_by_bad_samples_says_which_they_are(
    driver_here: RayCluster, damaged: str, tmp_path: Path
) -> None:
    """Even if it is stopped before its first log step."""
    config, bad = settings(tmp_path, damaged, data={"validation": None}, tracking={"log_every": 1000}), BadSamples()
    with driver_lease(config) as lease, pytest.raises(UserError, match="are unusable, more than data.max_bad_fraction"):
        train_on_ray(open_run(config), lease, PretrainTask, [bad])
    assert len(bad.causes) > 10 and set(bad.causes.values()) == {"not_an_image"}
    assert not driver_here.held(), "the resources of its workers are free again"


@pytest.mark.daily
def test_bad_samples_are_reported_before_each_checkpoint(driver_here: RayCluster, damaged: str, tmp_path: Path) -> None:
    """A run that resumes from it does not meet them again."""
    few = {"training": {"steps": 4, "validate_every": None}, "checkpoint": {"every_steps": 2}}
    data = {"validation": None, "max_bad_fraction": 0.5}
    config, bad = settings(tmp_path, damaged, data=data, tracking={"log_every": 1000}, **few), BadSamples()
    with driver_lease(config) as lease:
        train_on_ray(open_run(config), lease, PretrainTask, [bad])
    assert min(bad.steps.values()) == 2


def test_a_checkpoint_waits_until_the_driver_has_handled_the_reports_of_all_ranks(driver_here: RayCluster) -> None:
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    first, second = RayReporter(mailbox, 0), RayReporter(mailbox, 1)
    second.metrics(1, {metrics.LOSS: 1.0})  # rank 0 reports that
    second.bad_samples(1, {"a": "not_an_image"}, "training")
    second.flush()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(first.wait_until_recorded)
        time.sleep(0.5)
        assert not waiting.done()
        assert ray.get(mailbox.drain.remote()) == [("bad_samples", 1, {"a": "not_an_image"}, "training")]
        time.sleep(0.5)
        assert not waiting.done(), "the driver may not have handled it yet"
        assert ray.get(mailbox.drain.remote()) == []
        waiting.result(5)
