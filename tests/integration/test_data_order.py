"""Real runs on Ray Train: the global batches are the same on 1, 2, 3 and 4 workers, also if the number changes, and bad
samples are reported."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from crate_ray.config import PrepareConfig, PretrainConfig
from crate_ray.data.loader import training_loader
from crate_ray.data.prepare.builtin import digits_source, shapes_source
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.ray_cluster import SETUP_HOOK
from crate_ray.runs import metrics
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import driver_lease
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import open_storage
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.ray.driver import train_on_ray
from crate_ray.training.telemetry import keys_digest
from tests.jobs import free_port

STEPS = 12
BROKEN = (3, 27, 51, 70)
UNSAFE = {"shapes.tar: ../up.png": "unsafe_name"}


class Told(Listener):
    """Stores the digest of every batch, and the reports of bad samples."""

    def __init__(self) -> None:
        self.digests: dict[int, float] = {}
        self.times: Counter[str] = Counter()
        self.bad: dict[str, dict[str, str]] = {"training": {}, "validation": {}}

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        if metrics.BATCH_DIGEST in values:
            self.digests[step] = values[metrics.BATCH_DIGEST]
        self.times += Counter({cause: int(v) for k, v in values.items() if (cause := metrics.bad_samples_cause(k))})

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        self.bad[split] |= causes


@pytest.fixture(scope="module")
def four_workers() -> Iterator[None]:
    """A Ray of its own with room for four workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        hook = {"worker_process_setup_hook": SETUP_HOOK}
        ray.init("local", num_cpus=4, include_dashboard=False, dashboard_port=free_port(), runtime_env=hook)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Digits and shapes, 3 to 1. Some shapes are damaged, and one member of their shards belongs to no sample."""
    folder = tmp_path_factory.mktemp("data")
    config = PrepareConfig(source="digits", output=str(folder / "digits"), shard_samples=100)
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    (folder / "shapes").mkdir()
    with tarfile.open(folder / "shapes" / "shapes.tar", "w") as tar:
        members = [(f"{n:02d}.jpg", item.load()["jpg"]) for n, item in enumerate(shapes_source("all", 80, 16, 0).items)]
        for n in BROKEN:
            members[n] = (members[n][0], b"no image")
        for name, content in [*members, ("../up.png", b"")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index_existing(open_storage(str(folder / "shapes"), config.s3))
    return {str(folder / "digits"): 3, str(folder / "shapes"): 1}


def settings(folder: Path, mixture: dict[str, float], workers: int, steps: int) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "name": "run",
            "storage": str(folder),
            "data": {
                "memory_bytes": 1,
                "block_samples": 16,
                "window_blocks": 2,
                "lanes": 3,
                "train": mixture,
                "validation": list(mixture)[1],
            },
            "model": {"image_size": 8, "patch_size": 2, "channels": 1, "dim": 16, "depth": 1, "num_subspaces": 2},
            "training": {"batch_size": 22, "micro_batch_size": 4, "steps": steps},
            "scaling": {"workers": workers, "cpus_per_worker": 1},
            "checkpoint": {"every_steps": 100},
            "tracking": {"log_every": 1, "picture_every": None},
        }
    )


def train(folder: Path, mixture: dict[str, float], workers: int, steps: int = STEPS) -> Told:
    """Start or resume a run up to `steps` steps. Returns its reports."""
    config, told = settings(folder, mixture, workers, steps), Told()
    with driver_lease(config) as lease:
        train_on_ray(open_run(config), lease, PretrainTask, [told])
    return told


@pytest.mark.daily
def test_batches_do_not_depend_on_the_number_of_workers(
    four_workers: None, mixture: dict[str, float], tmp_path: Path
) -> None:
    run = open_run(settings(tmp_path / "loader", mixture, 1, STEPS))
    loader = training_loader(run.mixture, run.record.order, run.record.model, run.config.data, steps=range(STEPS))
    with loader:
        expected = {batch.step + 1: float(keys_digest(batch.keys, 0)) for batch in loader}
    assert sorted(expected) == list(range(1, STEPS + 1)) and len(set(expected.values())) == STEPS
    four = train(tmp_path / "4", mixture, 4)
    assert four.digests == expected
    assert loader.bad.causes and four.times == loader.bad.counts
    assert four.bad["training"] == loader.bad.causes | UNSAFE
    assert four.bad["validation"] == {f"{n:02d}": "not_an_image" for n in BROKEN} | UNSAFE
    elastic, times = dict[int, float](), Counter[str]()
    for workers, steps in ((2, 4), (3, 9), (1, STEPS)):
        part = train(tmp_path / "elastic", mixture, workers, steps)
        assert not set(part.digests) & set(elastic)
        elastic |= part.digests
        times += part.times
    assert elastic == expected and times == four.times
