"""The training loop on the device, from shards to checkpoints: where it waits, and what it computes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_ray.config import CrateMAEConfig, DataConfig, PrepareConfig, PretrainConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.models import build_model
from crate_ray.models.exported import Normalizer
from crate_ray.runs import metrics
from crate_ray.runs.checkpoint_files import checkpoint_tensors
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import open_storage
from crate_ray.training import bare_loop
from crate_ray.training.bare_loop import Trained
from crate_ray.training.checkpoints import Peers, WorkerCheckpoints
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.probe_batch import ProbeBatch
from crate_ray.training.task import Assembled, assemble
from tests.gpu_emulated.device import Event, position, recorded, since, syncs

STEPS, EVERY = 12, 4
MODEL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "num_subspaces": 4}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="shapes", output=str(tmp_path_factory.mktemp("shapes")), shard_samples=20)
    pack(shapes_source("all", 60, 24, 0), open_storage(config.output, config.s3), config)
    return config.output


def settings(shapes: str, folder: Path, **training: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "storage": folder.as_posix(),
            "data": {"train": shapes, "validation": shapes, "crop_scale": [0.5, 1], "decode_threads": 2},
            "model": MODEL,
            "training": {"steps": STEPS, "batch_size": 10, "compile": "off", "precision": "fp32"} | training,
            "optim": {"lr": 1e-3, "eps": 1e-2},
            "tracking": {"log_every": EVERY},
        }
    )


class Listener:
    """Receives the events of the run; keeps metrics by step, and where the host waited between reports."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.waits: dict[int, list[Event]] = {}
        """Since the report before, by the step of a report."""
        self._last = 0

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        self.values[step] = self.values.get(step, {}) | values
        self._reported(step)

    def first_step(self, step: int, loss: float, seconds: float) -> None:
        self._reported(step)

    def _reported(self, step: int) -> None:
        self.waits.setdefault(step, syncs(since(self._last)))
        self._last = position()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def train(config: PretrainConfig, listener: Any = None, task: type[PretrainTask] = PretrainTask) -> Trained:
    run = open_run(config)
    return bare_loop.train(task, config, run.record, run.total_steps, listeners=[listener or Listener()])


@pytest.mark.parametrize(("micro_batch", "cuda_graph"), [(None, False), (4, False), (None, True)])
def test_the_loop_waits_at_its_first_and_log_steps_only(
    shapes: str, tmp_path: Path, micro_batch: int | None, cuda_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    config = settings(shapes, tmp_path, micro_batch_size=micro_batch, cuda_graph=cuda_graph)
    done = train(config, listener)
    assert listener.values[STEPS][metrics.LOSS] < listener.values[EVERY][metrics.LOSS]
    # Step 2 shows its loss. Steps 4 and 8 log: the stopwatch waits for the steps, the rest reads their results.
    assert [wait.where.split(":")[0] for wait in listener.waits[2]] == ["training/loop.py"]
    for step in (EVERY, 2 * EVERY):
        where = Counter(wait.where.split(":")[0] for wait in listener.waits[step])
        assert where == {"training/telemetry.py": 3, "training/loop.py": 2}, listener.waits[step]

    monkeypatch.setattr(bare_loop, "_local_device", lambda: torch.device("cpu"))
    expected = train(settings(shapes, tmp_path, micro_batch_size=micro_batch))
    for name, weight in expected.weights.items():
        torch.testing.assert_close(done.weights[name], weight, rtol=1e-5, atol=1e-6)
    assert done.held_out[metrics.VALIDATION_LOSS] == pytest.approx(expected.held_out[metrics.VALIDATION_LOSS], rel=1e-5)


class Probed(PretrainTask):
    """Is probed, also where no pictures are made."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.probe_every = 5


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_probes_do_not_change_the_training(shapes: str, tmp_path: Path, cuda_graph: bool) -> None:
    config = settings(shapes, tmp_path, cuda_graph=cuda_graph)
    listener = Listener()
    expected, done = train(config), train(config, listener, Probed)
    assert all(torch.equal(done.weights[name], expected.weights[name]) for name in expected.weights)
    name = metrics.learning_signal("gradient_norm", "decoder")
    assert [step for step, values in sorted(listener.values.items()) if name in values] == [0, 5, 10, STEPS]


def test_mfu_is_of_bf16_runs_only(shapes: str, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        listener = Listener()
        config = settings(shapes, tmp_path / precision, precision=precision)
        # Measuring the kernels of attention would take long in Triton's interpreter.
        linear = config.model.model_copy(update={"attention": "linear"})
        train(config.model_copy(update={"model": linear}), listener)
        found[precision] = metrics.MFU in listener.values[STEPS]
    assert found == {"fp32": False, "bf16": True}


def test_the_probe_sees_the_device_as_the_cpu(shapes: str) -> None:
    torch.manual_seed(0)
    config = CrateMAEConfig.model_validate(MODEL)
    model, shards = build_model(config), load_dataset(open_storage(shapes, S3Config()))
    measured = []
    for device in ("cpu", "cuda"):
        normalizer = Normalizer.of((0.5,) * 3, (0.2,) * 3, device)
        probe = ProbeBatch(shards, config, DataConfig(train="unused"), normalizer)
        seen = probe.observe(model.to(device), 3)
        assert all(row.device.type == "cpu" for row in [*seen.rows, seen.attention])
        with recorded() as events:
            result = probe.draw(seen)
        assert events == []  # drawing needs no device: training goes on meanwhile
        measured.append(result.metrics)
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)


def test_checkpoints_of_the_device_are_restored(shapes: str, tmp_path: Path) -> None:
    config = settings(shapes, tmp_path)
    run = open_run(config)
    record = run.record.model_copy(update={"threads": 1})
    device = torch.device("cuda")
    context = bare_loop_context(config, record, device)

    def assembled(steps: int) -> Assembled:
        made = assemble(PretrainTask, config, context)
        for _ in range(steps):
            made.trained(*made.task.blank(4)).sample_loss.sum().backward()
            made.optimizer.step()
        return made

    folder = open_storage((tmp_path / "run").as_posix(), S3Config())
    open_checkpoints = partial(
        WorkerCheckpoints, folder, "attempt-001", record, config.checkpoint, peers(tmp_path), Silent(), device
    )
    trained, fresh = assembled(2), assembled(0)
    checkpoints = open_checkpoints()
    with recorded() as events:
        checkpoints.save(7, trained)
    # Copies of weights are asynchronous. The host waits for them once, and for the optimizer's step counts.
    waits = [event for event in syncs(events) if event.detail != "copy to the host (pageable) Byte[4,]"]
    assert len(waits) <= 1 and sum(event.kind == "copy" for event in events) > 40, waits
    checkpoints.finish()
    assert open_checkpoints().restore(fresh) == 7
    saved, restored = (checkpoint_tensors(a.task.model, a.optimizer) for a in (trained, fresh))
    assert saved.keys() == restored.keys() and all(torch.equal(saved[name], restored[name]) for name in saved)
    assert all(weight.device.type == "cuda" for weight in fresh.task.model.parameters())


def bare_loop_context(config: PretrainConfig, record: Any, device: torch.device) -> Any:
    from crate_ray.data.read.mixture import open_mixture
    from crate_ray.training.task import WorkerContext

    return WorkerContext(
        record=record,
        mixture=open_mixture(config.data.train, config.s3),
        validation=None,
        rank=0,
        world_size=1,
        device=device,
        autocast=None,
        normalizer=Normalizer.of(record.mean, record.std, device),
    )


def peers(folder: Path) -> Peers:
    (folder / "scratch").mkdir(exist_ok=True)
    return Peers(
        group="g",
        rank=0,
        world_size=1,
        is_first_of_node=True,
        scratch=folder / "scratch",
        node_scratch=folder / "scratch",
        barrier=lambda: None,
        broadcast=lambda value: value,
    )


class Silent:
    """Receives the events of a save, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None
