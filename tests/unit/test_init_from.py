"""--init-from: a run starts from the weights, and nothing else, of another run, a registered model or a published
checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from crate_ray.config import PrepareConfig, PretrainConfig
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.models import CrateMAE, build_model, export_published
from crate_ray.runs.checkpoint_files import restore_weights
from crate_ray.runs.commits import DamagedCheckpoint
from crate_ray.runs.initial_weights import INITIAL_WEIGHTS, fetch_initial_weights
from crate_ray.runs.pretraining import Run, open_run, start_from
from crate_ray.runs.record import read_record, write_record
from crate_ray.runs.references import load
from crate_ray.storage.local import LocalStorage
from crate_ray.tracking.registry import register
from crate_ray.tracking.run_tracker import RunTracker
from tests.unit.test_checkpoint import MODEL, RECORD, Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    pack(digits_source("test"), LocalStorage(folder), PrepareConfig(source="digits", output=str(folder)))
    return str(folder)


@pytest.fixture
def earlier(tmp_path: Path) -> dict[int, Trainer]:
    """Trainers at two steps of the run that is in tmp_path/earlier."""
    run = LocalStorage(tmp_path / "earlier")
    write_record(run, RECORD)
    trainers = {step: Trainer() for step in (2, 4)}
    for step, trainer in trainers.items():
        trainer.train(step)
        trainer.save(run, tmp_path)
    return trainers


def new_run(data: str, tmp_path: Path, init_from: object, **model: Any) -> tuple[PretrainConfig, Run]:
    config = PretrainConfig.model_validate(
        {
            "name": "new",
            "storage": str(tmp_path / "runs"),
            "model": MODEL.model_dump() | model,
            "data": {"train": data},
            "training": {"steps": 3, "batch_size": 4},
            "tracking": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
            "init_from": str(init_from),
        }
    )
    return config, open_run(config)


def started(config: PretrainConfig, run: Run, folder: Path) -> dict[str, Tensor]:
    """Weights that the workers of a run load before its first step."""
    run = start_from(run)
    assert run.first_step == 0
    fetch_initial_weights(run.storage, run.record.initial_weights or "", folder)
    model = build_model(config.model)
    restore_weights(folder, model)
    return model.state_dict()


def same(weights: dict[str, Tensor], model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_newest_checkpoint_of_a_run_or_that_of_a_step(
    data: str, earlier: dict[int, Trainer], tmp_path: Path
) -> None:
    for suffix, step in (("", 4), ("@2", 2), ("@4", 4)):
        folder = tmp_path / f"case{suffix}"
        weights = started(*new_run(data, folder, f"{tmp_path / 'earlier'}{suffix}"), folder / "fetched")
        assert same(weights, earlier[step].model)
    with pytest.raises(UserError, match="no valid checkpoint of step 3; it has those of the steps 2, 4"):
        started(*new_run(data, tmp_path, f"{tmp_path / 'earlier'}@3"), tmp_path / "fetched")
    with pytest.raises(UserError, match="nowhere holds neither a run nor an exported model"):
        started(*new_run(data, tmp_path, tmp_path / "nowhere"), tmp_path / "fetched")


def test_a_registered_model(data: str, earlier: dict[int, Trainer], tmp_path: Path) -> None:
    run = LocalStorage(tmp_path / "earlier")
    config, new = new_run(data, tmp_path, "models:/crate-mae/1")
    tracker = RunTracker(config.tracking, RECORD.run_key, "earlier", {}, {})
    assert tracker.finish("FINISHED")
    register(run.uri, "crate-mae", config.tracking, config.s3)
    assert same(started(config, new, tmp_path / "fetched"), earlier[4].model)
    MlflowClient(config.tracking.uri).set_registered_model_alias("crate-mae", "best", "1")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")  # left by another job of this process
    loaded, _ = load("models:/crate-mae@best", config.tracking, config.s3)
    assert same(loaded.state_dict(), earlier[4].model)
    missing, new = new_run(data, tmp_path, "models:/crate-mae@champion")
    with pytest.raises(UserError, match=r"cannot load models:/crate-mae@champion: .*champion"):
        started(missing, new, tmp_path / "other")


def test_a_published_checkpoint(data: str, tmp_path: Path) -> None:
    free = {"decoder_maps": "free"}
    torch.manual_seed(3)
    model = CrateMAE(MODEL.model_copy(update=free))
    torch.save({"model": export_published(model)}, tmp_path / "published.pth")
    config, run = new_run(data, tmp_path, tmp_path / "published.pth", **free)
    assert same(started(config, run, tmp_path / "fetched"), model)
    with pytest.raises(UserError, match="dim is 16 in the checkpoint and 32 in the config"):
        started(*new_run(data, tmp_path / "2", tmp_path / "published.pth", dim=32, subspace_dim=16, **free), tmp_path)
    with pytest.raises(UserError, match=r"absent\.pth"):
        started(*new_run(data, tmp_path / "3", tmp_path / "absent.pth", **free), tmp_path)


def test_weights_of_another_shape_are_refused_by_name(data: str, earlier: dict[int, Trainer], tmp_path: Path) -> None:
    for model, message in (
        (
            {"dim": 32, "subspace_dim": 16},
            r"cls_token has the shape \(1, 1, 16\), the run's model has \(1, 1, 32\); give",
        ),
        ({"depth": 1, "decoder_depth": 1}, r"decoder\.1\.\S+ has the shape \(16,\), the run's model has none; give"),
        ({"decoder_maps": "free"}, r"there is no decoder\.0\.expansion, the run's model has \(16, 16\); give"),
    ):
        with pytest.raises(UserError, match=r"earlier do not fit the model: " + message):
            started(*new_run(data, tmp_path, tmp_path / "earlier", **model), tmp_path / "fetched")
    assert not (tmp_path / "runs" / "new" / INITIAL_WEIGHTS).exists()


def test_they_are_looked_up_once(data: str, earlier: dict[int, Trainer], tmp_path: Path) -> None:
    """A start that was cut off before the first checkpoint goes on with the same weights, whatever is there by then."""
    config, run = new_run(data, tmp_path, tmp_path / "earlier")
    started(config, run, tmp_path / "first")
    earlier[4].train(2)
    earlier[4].save(LocalStorage(tmp_path / "earlier"), tmp_path)
    earlier[4] = Trainer()
    earlier[4].train(4)
    again = open_run(config)
    assert again.record.config.init_from == str(tmp_path / "earlier") and again.record == read_record(run.storage)
    assert same(started(config, again, tmp_path / "second"), earlier[4].model)
    # And a file that was changed is not trained from.
    path = tmp_path / "runs" / "new" / INITIAL_WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="the weights that the run starts from, differs from its digest"):
        started(config, again, tmp_path / "third")


def test_a_run_that_has_begun_goes_on_from_its_own_checkpoint(
    data: str, earlier: dict[int, Trainer], tmp_path: Path
) -> None:
    config, run = new_run(data, tmp_path, tmp_path / "earlier")
    start_from(run)
    earlier[2].save(run.storage, tmp_path, "-own")
    resumed = open_run(config)
    assert resumed.first_step == 2

    def never(reference: str) -> dict[str, Tensor]:
        raise AssertionError(reference)

    assert start_from(resumed, never) == resumed
    assert open_run(config.model_copy(update={"init_from": None})).first_step == 2
    with pytest.raises(UserError, match=r"was started with init_from \S+/earlier, not /other; choose another --name"):
        open_run(config.model_copy(update={"init_from": "/other"}))


KILLED_BETWEEN = """
import os, sys
from crate_ray.config import PretrainConfig
from crate_ray.runs import pretraining
config = PretrainConfig.model_validate_json(sys.argv[1])
pretraining.write_record = lambda *_: os._exit(3)
pretraining.start_from(pretraining.open_run(config))
"""


def test_a_start_killed_between_weights_and_record_leaves_no_record_of_other_weights(
    data: str, earlier: dict[int, Trainer], tmp_path: Path
) -> None:
    """Before the first checkpoint, a start with other settings begins the run anew. Here that start is killed halfway,
    then the first settings begin the run anew."""
    first, run = new_run(data, tmp_path, f"{tmp_path / 'earlier'}@4")
    assert same(started(first, run, tmp_path / "first"), earlier[4].model)
    other, _ = new_run(data, tmp_path, f"{tmp_path / 'earlier'}@2")
    command = [sys.executable, "-c", KILLED_BETWEEN, other.model_dump_json()]
    assert subprocess.run(command, timeout=100).returncode == 3
    assert same(started(first, open_run(first), tmp_path / "second"), earlier[4].model)
