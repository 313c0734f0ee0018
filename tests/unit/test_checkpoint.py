"""Checkpoints and exported models: a restored run goes on bitwise as if nothing had happened, damaged files are passed
over for older ones, and no file is ever unpickled."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crate_ray.config import CrateMAEConfig, OptimConfig, PretrainConfig, ViTMAEConfig
from crate_ray.data.order import DatasetOrder, SampleOrder
from crate_ray.data.storage import LocalStorage
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.training.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    RUN_FILE,
    STATE_FILE,
    CheckpointState,
    RunRecord,
    commit_checkpoint,
    committed,
    delete_old_checkpoints,
    load_weights,
    newest_valid,
    read_record,
    restore_checkpoint,
    write_checkpoint,
    write_record,
)
from crate_ray.training.export import ModelDescription, export_model, load_exported
from crate_ray.training.step import build_optimizer, learning_rate, train_step

MODEL = CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=2, decoder_maps="tied")
OPTIM = OptimConfig(lr=1e-2, warmup=2, weight_decay=0.1)
RECORD = RunRecord(
    run_key="0123",
    config=PretrainConfig.model_validate(
        {"model": MODEL, "data": {"train": "unused"}, "training": {"steps": 9, "batch_size": 4}, "optim": OPTIM}
    ),
    dataset="4567",
    kind="image",
    order=SampleOrder(
        batch_size=4, datasets=(DatasetOrder(num_samples=40, block_samples=1, window_blocks=8, lanes=2, seed=3),)
    ),
    mean=(0.1, 0.2, 0.3),
    std=(1.0, 2.0, 3.0),
    threads=1,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for models this small
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


class Trainer:
    """A model in training, its data a function of the step."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: MaskedAutoencoder = build_model(MODEL)
        self.optimizer = build_optimizer(self.model, OPTIM)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            random = torch.Generator().manual_seed(self.step)
            images, noise = torch.randn(4, 3, 8, 8, generator=random), torch.rand(4, 16, generator=random)
            lr = learning_rate(self.step, 9, OPTIM, 4)
            train_step(self.model, self.optimizer, images, noise, batch_size=4, lr=lr, clip_norm=0.5)
            self.step += 1

    def save(self, run: LocalStorage, scratch: Path, name: str = "") -> str:
        local = scratch / f"local-{self.step}{name}"
        local.mkdir()
        state = CheckpointState(step=self.step, run=RECORD, world_size=2, torch_version="2")
        write_checkpoint(local, self.model, self.optimizer, state)
        directory = f"attempt-001/step-{self.step:08d}{name}"
        commit = commit_checkpoint(run, directory, local, self.step)
        assert commit.directory == directory
        return directory

    def same_as(self, other: Trainer) -> bool:
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return self.step == other.step and all(torch.equal(a, b) for a, b in pairs)


def restored(run: LocalStorage) -> Trainer | None:
    for _, files in newest_valid(run):
        fresh = Trainer(seed=99)
        state = restore_checkpoint(files, fresh.model, fresh.optimizer)
        assert state.run == RECORD
        fresh.step = state.step
        return fresh
    return None


def test_a_restored_run_goes_on_bitwise_the_same(run: LocalStorage, tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.train(3)
    trainer.save(run, tmp_path)
    resumed = restored(run)
    assert resumed is not None and resumed.same_as(trainer)
    trainer.train(4)
    resumed.train(4)
    assert resumed.same_as(trainer)
    # What a checkpoint does not hold would show here: the moments and the step count of AdamW.
    forgetful = restored(run)
    assert forgetful is not None
    forgetful.optimizer.state.clear()
    forgetful.train(4)
    assert not forgetful.same_as(trainer)
    # The first checkpoint may be taken before the first step, when the optimiser has no state yet.
    fresh = LocalStorage(tmp_path / "fresh")
    untrained, twin = Trainer(), Trainer()
    untrained.save(fresh, tmp_path)
    resumed = restored(fresh)
    assert resumed is not None
    resumed.train(2)
    twin.train(2)
    assert resumed.same_as(twin)


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def each_file(change: Callable[[Path], Any]) -> dict[str, Callable[[Path, str], Any]]:
    return {
        name: lambda root, directory, name=name: change(root / directory / name)
        for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
    }


def record_path(root: Path, directory: str) -> Path:
    return root / "commits" / f"{directory.rpartition('/')[2]}.json"


def write_garbage(content: bytes) -> Callable[[Path, str], Any]:
    return lambda root, directory: record_path(root, directory).write_bytes(content)


def forget_files(root: Path, directory: str) -> None:
    path = record_path(root, directory)
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))


def truncate_record(root: Path, directory: str) -> None:
    path = record_path(root, directory)
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE: dict[str, Callable[[Path, str], Any]] = {
    **{f"changed {name}": change for name, change in each_file(change_byte).items()},
    **{f"missing {name}": change for name, change in each_file(Path.unlink).items()},
    "truncated weights": lambda root, directory: os.truncate(root / directory / MODEL_FILE, 100),
    "empty record": write_garbage(b""),
    "record of another kind": write_garbage(b'{"step": 5}'),
    "binary record": write_garbage(b"\xff\xfe\x00garbage"),
    "truncated record": truncate_record,
    "record without files": forget_files,
    "no record": lambda root, directory: record_path(root, directory).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(damage: str, run: LocalStorage, tmp_path: Path) -> None:
    trainer, older = Trainer(), Trainer()
    trainer.train(2)
    older.train(2)
    trainer.save(run, tmp_path)
    trainer.train(3)
    newest = trainer.save(run, tmp_path)
    assert [commit.step for commit in committed(run)] == [5, 2]
    DAMAGE[damage](tmp_path / "run", newest)
    found = restored(run)
    assert found is not None and found.same_as(older)
    state, weights = load_weights(run)
    assert state.step == 2
    assert all(torch.equal(weights[name], value) for name, value in older.model.state_dict().items())
    # The run writes the step again, under another name, and goes on from there.
    older.train(3)
    older.save(run, tmp_path, "-again")
    found = restored(run)
    assert found is not None and found.same_as(trainer)


def test_without_a_valid_checkpoint_there_is_nothing_to_restore(run: LocalStorage, tmp_path: Path) -> None:
    assert restored(run) is None
    trainer = Trainer()
    trainer.train(1)
    DAMAGE["no record"](tmp_path / "run", trainer.save(run, tmp_path))
    assert restored(run) is None and committed(run) == []
    with pytest.raises(UserError, match=r"run holds no checkpoint; give the folder of a run that has written one$"):
        load_weights(run)


def test_old_checkpoints_are_deleted_record_first(run: LocalStorage, tmp_path: Path) -> None:
    trainer = Trainer()
    directories = []
    for _ in range(4):
        trainer.train(1)
        directories.append(trainer.save(run, tmp_path))
    delete_old_checkpoints(run, 9)
    assert [commit.step for commit in committed(run)] == [4, 3, 2, 1]
    delete_old_checkpoints(run, 3)
    assert [commit.step for commit in committed(run)] == [4, 3, 2]
    assert not list(run.list(directories[0])) and len(list(run.list(directories[1]))) == 3

    class Interrupted(LocalStorage):
        """Loses its power after the first deletion."""

        def delete(self, key: str) -> None:
            super().delete(key)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        delete_old_checkpoints(Interrupted(tmp_path / "run"), 2)
    assert [commit.step for commit in committed(run)] == [4, 3]
    found = restored(run)
    assert found is not None and found.same_as(trainer)


def test_the_record_of_a_run(run: LocalStorage, tmp_path: Path) -> None:
    assert read_record(run) is None
    write_record(run, RECORD)
    assert read_record(run) == RECORD
    for content in (b"{", b"[]", b"\x80", b'{"run_key": "x"}'):
        (tmp_path / "run" / RUN_FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"run\.json cannot be read \(.+\); restore it, or choose another --name$"):
            read_record(run)


# --- Exported models ------------------------------------------------------------------------------------------------


def describe(config: CrateMAEConfig | ViTMAEConfig) -> ModelDescription:
    return ModelDescription(
        model=config, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), kind="image", dataset="4567", run_key="0123", step=5
    )


VIT = ViTMAEConfig(image_size=(8, 12), patch_size=(2, 4), dim=16, num_heads=2, depth=1)


@pytest.mark.parametrize("config", [MODEL, VIT], ids=["crate", "vit"])
def test_an_exported_model_is_loaded_as_it_was(config: CrateMAEConfig | ViTMAEConfig, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build_model(config)
    export_model(tmp_path / "model", model.state_dict(), describe(config))
    loaded, description = load_exported(tmp_path / "model")
    assert description == describe(config) and not loaded.training
    images, noise = torch.randn(2, 3, *config.image_hw), torch.rand(2, config.num_patches)
    assert torch.equal(loaded(images, noise).sample_loss, model(images, noise).sample_loss)


class Payload:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(run: LocalStorage, tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "model"
    export_model(folder, build_model(MODEL).state_dict(), describe(MODEL))
    for save in (
        lambda path: path.write_bytes(pickle.dumps(Payload(made))),
        lambda path: torch.save(Payload(made), path),
    ):
        save(folder / MODEL_FILE)
        with pytest.raises(UserError, match=r"model does not hold a model as this version writes them: .+"):
            load_exported(folder)
        assert not made.exists()
    # One in a checkpoint, with its right digest, is refused by safetensors.
    local = tmp_path / "local"
    local.mkdir()
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
        (local / name).write_bytes(pickle.dumps(Payload(made)))
    commit_checkpoint(run, "attempt-001/step-1", local, 1)
    with pytest.raises(Exception, match="header too large"):
        restored(run)
    assert not made.exists()


def test_a_folder_that_holds_no_model_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(UserError, match=r"model does not hold a model .*: .*No such file or directory"):
        load_exported(folder)
    export_model(folder, build_model(VIT).state_dict(), describe(MODEL))
    with pytest.raises(UserError, match=r"does not hold a model .*: Error\(s\) in loading state_dict for CrateMAE"):
        load_exported(folder)
    for content in (b"{}", b"\xff\xfe\x00", b""):
        (folder / "model.json").write_bytes(content)
        with pytest.raises(UserError, match=r"does not hold a model as this version writes them: \d+ validation error"):
            load_exported(folder)
