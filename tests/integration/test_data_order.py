"""Real runs on Ray Train: the same global batches on 1, 2, 3 and 4 workers, and on a number that changes between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from crate_ray.config import PrepareConfig, PretrainConfig
from crate_ray.data.builtin import digits_source, shapes_source
from crate_ray.data.loader import training_loader
from crate_ray.data.packing import pack
from crate_ray.data.storage import open_storage
from crate_ray.training.driver import train_on_ray
from crate_ray.training.listener import Listener
from crate_ray.training.planning import driver_lease
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.run import open_run
from crate_ray.training.telemetry import keys_digest
from tests.jobs import free_port

STEPS = 12


class Digests(Listener):
    """Keeps the digest of every batch."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        if "batch_digest" in values:
            self.by_step[step] = values["batch_digest"]


@pytest.fixture(scope="module")
def four_workers() -> Iterator[None]:
    """A Ray of its own with room for four workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init("local", num_cpus=4, include_dashboard=False, dashboard_port=free_port())
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Digits and shapes, 3 to 1."""
    folder = tmp_path_factory.mktemp("data")
    sets = {"digits": digits_source("test"), "shapes": shapes_source("all", 80, 16, 0)}
    for name, source in sets.items():
        config = PrepareConfig(source=name, output=str(folder / name), shard_samples=100)
        pack(source, open_storage(config.output, config.s3), config)
    return {str(folder / "digits"): 3, str(folder / "shapes"): 1}


def settings(folder: Path, mixture: dict[str, float], workers: int, steps: int) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "name": "run",
            "storage": str(folder),
            "data": {"memory_bytes": 1, "block_samples": 16, "window_blocks": 2, "lanes": 3, "train": mixture},
            "model": {"image_size": 8, "patch_size": 2, "channels": 1, "dim": 16, "depth": 1, "num_subspaces": 2},
            "training": {"batch_size": 22, "micro_batch_size": 4, "steps": steps},
            "scaling": {"workers": workers, "cpus_per_worker": 1},
            "checkpoint": {"every_steps": 100},
            "tracking": {"log_every": 1, "picture_every": None},
        }
    )


def train(folder: Path, mixture: dict[str, float], workers: int, steps: int = STEPS) -> dict[int, float]:
    """Begin a run, or go on with it, to so many steps; digests of the batches of its steps."""
    config, digests = settings(folder, mixture, workers, steps), Digests()
    with driver_lease(config) as lease:
        train_on_ray(open_run(config), lease, PretrainTask, [digests])
    return digests.by_step


def test_batches_do_not_depend_on_the_number_of_workers(
    four_workers: None, mixture: dict[str, float], tmp_path: Path
) -> None:
    run = open_run(settings(tmp_path / "loader", mixture, 1, STEPS))
    loader = training_loader(run.mixture, run.record.order, run.record.model, run.config.data, steps=range(STEPS))
    with loader:
        expected = {batch.step + 1: float(keys_digest(batch.keys, 0)) for batch in loader}
    assert sorted(expected) == list(range(1, STEPS + 1)) and len(set(expected.values())) == STEPS
    assert train(tmp_path / "4", mixture, 4) == expected
    elastic: dict[int, float] = {}
    for workers, steps in ((2, 4), (3, 9), (1, STEPS)):
        part = train(tmp_path / "elastic", mixture, workers, steps)
        assert not set(part) & set(elastic)
        elastic |= part
    assert elastic == expected
