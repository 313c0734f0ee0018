"""Checkpoints and exported models: a restored run continues bitwise as an uninterrupted one, damaged checkpoints are
skipped for older ones, and no file is ever unpickled."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from crate_ray.config import (
    CheckpointConfig,
    CrateMAEConfig,
    OptimConfig,
    OptimizerName,
    PrepareConfig,
    PretrainConfig,
    ViTMAEConfig,
)
from crate_ray.data.order.dataset_order import DatasetOrder
from crate_ray.data.order.sequence import SampleOrder
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.read.mixture import open_mixture
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import ModelDescription, Normalizer, export_model, load_exported
from crate_ray.runs.checkpoint_files import (
    STATE_FILE,
    CheckpointState,
    check_arithmetic,
    checkpoint_tensors,
    restore_checkpoint,
)
from crate_ray.runs.commits import (
    Commit,
    FileRecord,
    best_first,
    commit_checkpoint,
    committed,
    fetch_newest,
    load_weights,
    newest_complete,
    upload_part,
)
from crate_ray.runs.quality import Quality
from crate_ray.runs.record import RUN_FILE, RunRecord, read_record, write_record
from crate_ray.runs.retention import delete_old_checkpoints, delete_unfinished, kept_checkpoints
from crate_ray.storage.local import LocalStorage
from crate_ray.training.optimizer import build_optimizer, learning_rate
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.staging import HostCopies
from crate_ray.training.step import train_step
from crate_ray.training.task import WorkerContext, assemble
from tests.checkpoints import save, upload

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=2, decoder_maps="tied")
OPTIM = OptimConfig(lr=1e-2, warmup=2, weight_decay=0.1)
RECORD = RunRecord(
    run_key="0123" * 8,
    config=PretrainConfig.model_validate(
        {"model": MODEL, "data": {"train": "unused"}, "training": {"steps": 9, "batch_size": 4}, "optim": OPTIM}
    ),
    dataset="4567" * 16,
    kind="image",
    order=SampleOrder(
        batch_size=4, datasets=(DatasetOrder(num_samples=40, block_samples=1, window_blocks=8, lanes=2, seed=3),)
    ),
    mean=(0.1, 0.2, 0.3),
    std=(1.0, 2.0, 3.0),
    threads=1,
)


@pytest.fixture
def run(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


class Trainer:
    """A model in training, its data a function of the step."""

    def __init__(self, seed: int = 0, optim: OptimConfig = OPTIM) -> None:
        torch.manual_seed(seed)
        self.model: MaskedAutoencoder = build_model(MODEL)
        self.optimizer = build_optimizer(self.model, optim)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            random = torch.Generator().manual_seed(self.step)
            images, noise = torch.randn(4, 3, 8, 8, generator=random), torch.rand(4, 16, generator=random)
            lr = learning_rate(self.step, 9, OPTIM, 4)
            train_step(self.model, self.optimizer, images, noise, batch_size=4, lr=lr, clip_norm=0.5)
            self.step += 1

    def save(self, run: LocalStorage, scratch: Path, name: str = "", world_size: int = 2) -> str:
        """A checkpoint as so many workers write it, which all hold the same."""
        return save(run, self.tensors(), RECORD, self.step, scratch, name, world_size)

    def upload(self, run: LocalStorage, scratch: Path, directory: str, rank: int, world_size: int) -> None:
        state = CheckpointState(step=self.step, run=RECORD, world_size=world_size, torch_version="2")
        upload(run, self.tensors(), state, directory, rank, scratch)

    def tensors(self) -> dict[str, Tensor]:
        return checkpoint_tensors(self.model, self.optimizer)

    def same_as(self, other: Trainer) -> bool:
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return self.step == other.step and all(torch.equal(a, b) for a, b in pairs)


def restored(run: LocalStorage, optim: OptimConfig = OPTIM) -> Trainer | None:
    folder = run.root.with_name("restored")
    shutil.rmtree(folder, ignore_errors=True)
    if fetch_newest(run, folder) is None:
        return None
    fresh = Trainer(seed=99, optim=optim)
    state = restore_checkpoint(folder, fresh.model, fresh.optimizer)
    assert state.run == RECORD
    fresh.step = state.step
    return fresh


def test_other_arithmetic_is_refused_where_bits_are_promised(caplog: pytest.LogCaptureFixture) -> None:
    eager, compiled = "eager layers in float32", "compiled layers in float32"
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def check(then: tuple[str, ...], now: tuple[str, ...], world_size: int = 2, device: torch.device = cpu) -> None:
        state = CheckpointState(step=5, run=RECORD, world_size=2, torch_version="2", arithmetic=then)
        check_arithmetic(state, now, world_size, device)

    check((eager,), (eager,))
    check((), (eager,))  # a checkpoint of before this was kept
    assert not caplog.records
    for then, now in (((eager,), (compiled,)), ((compiled,), (eager,)), ((eager,), (eager, compiled))):
        words = f"step 5 was computed with {then[0]}, the workers now use {' and '.join(now)}, which"
        with pytest.raises(UserError, match=words):
            check(then, now)
    check((eager,), (compiled,), world_size=3)
    check((eager,), (compiled,), device=gpu)
    check((eager, compiled), (compiled,))
    assert len(caplog.records) == 3


def test_arithmetic_is_what_it_turned_out_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = PrepareConfig(source="digits", output=str(tmp_path))
    pack(digits_source("test"), LocalStorage(tmp_path), prepared)
    config = PretrainConfig.model_validate(
        {
            "model": {**MODEL.model_dump(), "channels": 1},
            "data": {"train": str(tmp_path)},
            "training": {"steps": 1, "batch_size": 4, "compile": "layers"},
        }
    )
    cpu, mixture = torch.device("cpu"), open_mixture(str(tmp_path), config.s3)
    for autocast, works, expected in (
        (None, True, "compiled layers in float32"),
        (torch.bfloat16, True, "compiled layers in bfloat16"),
        (torch.bfloat16, False, "eager layers in bfloat16"),
    ):
        monkeypatch.setattr("crate_ray.training.task.compile_layers", lambda *_, works=works, **__: works)
        context = WorkerContext(RECORD, mixture, None, 0, 1, cpu, autocast, Normalizer.of((0.0,), (1.0,), cpu))
        assert assemble(PretrainTask, config, context).arithmetic == (expected,)
    training = config.training.model_copy(update={"float8": True})
    with pytest.raises(UserError, match="training.float8 needs training.precision bf16 and an NVIDIA GPU"):
        assemble(PretrainTask, config.model_copy(update={"training": training}), context)


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_a_restored_run_goes_on_bitwise_the_same(optimizer: OptimizerName, run: LocalStorage, tmp_path: Path) -> None:
    optim = OPTIM.model_copy(update={"optimizer": optimizer})
    trainer = Trainer(optim=optim)
    trainer.train(3)
    trainer.save(run, tmp_path)
    resumed = restored(run, optim)
    assert resumed is not None and resumed.same_as(trainer)
    trainer.train(4)
    resumed.train(4)
    assert resumed.same_as(trainer)
    # What a checkpoint does not hold would show here: the moments and the step count of AdamW.
    forgetful = restored(run, optim)
    assert forgetful is not None
    forgetful.optimizer.state.clear()
    forgetful.train(4)
    assert not forgetful.same_as(trainer)
    # The first checkpoint may be taken before the first step, when the optimiser has no state yet.
    fresh = LocalStorage(tmp_path / "fresh")
    untrained, twin = Trainer(optim=optim), Trainer(optim=optim)
    untrained.save(fresh, tmp_path)
    resumed = restored(fresh, optim)
    assert resumed is not None
    resumed.train(2)
    twin.train(2)
    assert resumed.same_as(twin)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_workers_write_equal_shares_that_any_number_of_workers_reads(
    world_size: int, run: LocalStorage, tmp_path: Path
) -> None:
    trainer = Trainer()
    trainer.model.patch_embed.to(memory_format=torch.channels_last)
    trainer.train(2)
    directory = trainer.save(run, tmp_path, world_size=world_size)
    files = sorted((tmp_path / "run" / directory).glob("*.safetensors"))
    parts = [f"{rank + 1:05d}-of-{world_size:05d}" for rank in range(world_size)]
    assert sum(len(load_file(path)) for path in files) == len(trainer.tensors())  # none twice
    held = [sum(t.nbytes for path in files if part in path.name for t in load_file(path).values()) for part in parts]
    assert max(held) - min(held) <= max(tensor.nbytes for tensor in trainer.tensors().values())
    # All can be read as plain safetensors, and by one process that knows nothing of the others.
    state, weights = load_weights(run)
    assert state.step == 2 and state.world_size == world_size
    expected = trainer.model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    resumed = restored(run)
    assert resumed is not None
    everything = trainer.tensors()
    assert all(torch.equal(value, everything[name]) for name, value in resumed.tensors().items())


def test_a_checkpoint_counts_when_all_workers_have_uploaded_their_part(run: LocalStorage, tmp_path: Path) -> None:
    trainer, older = Trainer(), Trainer()
    trainer.train(1)
    older.train(1)
    trainer.save(run, tmp_path)
    trainer.train(1)
    directory = "attempt-001/step-00000002"
    for rank in (0, 2):
        trainer.upload(run, tmp_path, directory, rank, 3)
    with pytest.raises(TimeoutError, match="worker 1 did not upload its part of checkpoint attempt-001/step-00000002"):
        commit_checkpoint(run, directory, 2, 3, timeout=0.1)
    found = restored(run)
    assert found is not None and found.same_as(older)
    trainer.upload(run, tmp_path, directory, 1, 3)
    commit_checkpoint(run, directory, 2, 3, timeout=0)
    found = restored(run)
    assert found is not None and found.same_as(trainer)


def test_restoring_unpickles_nothing(run: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    trainer.train(1)
    trainer.save(run, tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something is unpickled")

    for module, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    found = restored(run)
    assert found is not None and found.same_as(trainer)
    load_weights(run)


PARTS = [f"{kind}-0000{number}-of-00002.safetensors" for kind in ("model", "optimizer") for number in (1, 2)]


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def each_file(change: Callable[[Path], Any]) -> dict[str, Callable[[Path, str], Any]]:
    return {name: lambda root, directory, name=name: change(root / directory / name) for name in (*PARTS, STATE_FILE)}


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
    "truncated weights": lambda root, directory: os.truncate(root / directory / PARTS[0], 100),
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
    state, weights = load_weights(run)  # whose own files are whole where only the optimiser's are not
    of = trainer if damage.startswith("changed optimizer") else older
    assert state.step == of.step
    assert all(torch.equal(weights[name], value) for name, value in of.model.state_dict().items())
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
    delete_old_checkpoints(run, CheckpointConfig(keep_last=9))
    assert [commit.step for commit in committed(run)] == [4, 3, 2, 1]
    delete_old_checkpoints(run, CheckpointConfig(keep_last=3))
    assert [commit.step for commit in committed(run)] == [4, 3, 2]
    assert not list(run.list(directories[0])) and len(list(run.list(directories[1]))) == 7

    class Interrupted(LocalStorage):
        """Loses its power after the first deletion."""

        def delete(self, key: str) -> None:
            super().delete(key)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        delete_old_checkpoints(Interrupted(tmp_path / "run"), CheckpointConfig(keep_last=2))
    assert [commit.step for commit in committed(run)] == [4, 3]
    found = restored(run)
    assert found is not None and found.same_as(trainer)
    # What the interrupted deletion and an upload that was cut off have left goes with the next start.
    trainer.upload(run, tmp_path, "attempt-002/step-00000005-x", 0, 2)
    run.write("attempt-002/checkpoint_manager_snapshot.json", b"Ray's own")
    before = {info.key for commit in committed(run) for info in run.list(commit.directory)}
    assert len(list(run.list(directories[1]))) == 7
    delete_unfinished(run)
    kept = {info.key for info in run.list("attempt-")}
    assert kept == before | {"attempt-002/checkpoint_manager_snapshot.json"}
    found = restored(run)
    assert found is not None and found.same_as(trainer)


def test_what_a_kept_record_names_is_never_deleted(run: LocalStorage, tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.train(1)
    shared = trainer.save(run, tmp_path)
    commit = committed(run)[0]
    for step in (2, 3):  # records that name the same files, as a copied or restored folder may have
        copy = commit.model_copy(update={"step": step})
        run.write(f"commits/step-{step}.json", copy.model_dump_json().encode())
    delete_old_checkpoints(run, CheckpointConfig(keep_last=1))
    assert set(commit.files) <= {info.key.rsplit("/", 1)[-1] for info in run.list(shared)}
    found = restored(run)
    assert found is not None and found.same_as(trainer)


@given(
    losses=st.lists(st.one_of(st.none(), st.floats(0, 4), st.just(math.nan)), max_size=30),
    config=st.builds(
        CheckpointConfig,
        keep_last=st.integers(1, 5),
        keep_best=st.integers(0, 4),
        keep_every_hours=st.one_of(st.none(), st.floats(0.01, 3)),
    ),
    minutes=st.integers(1, 90),
)
def test_the_newest_the_best_and_some_of_each_time_are_kept(
    losses: list[float | None], config: CheckpointConfig, minutes: int
) -> None:
    """Deleting after every save, as a run does, never loses one that deleting only at the end would have kept."""
    alive: list[Commit] = []
    everything: list[Commit] = []
    for step, loss in enumerate(losses):
        files, time = {"model": FileRecord(size=1, sha256="0" * 64)}, step * minutes * 60.0
        commit = Commit(step=step, directory=f"attempt-001/step-{step}", files=files, time=time, validation_loss=loss)
        everything.insert(0, commit)
        alive = kept_checkpoints([commit, *alive], config)
    steps = {commit.step for commit in alive}
    assert steps == {commit.step for commit in kept_checkpoints(everything, config)}
    assert steps >= {commit.step for commit in everything[: config.keep_last]}
    rated = sorted(loss for loss in losses if loss is not None and not math.isnan(loss))
    kept_losses = sorted(
        c.validation_loss for c in alive if c.validation_loss is not None and c.validation_loss == c.validation_loss
    )
    assert kept_losses[: config.keep_best] == rated[: config.keep_best]
    if config.keep_every_hours is None:
        assert len(steps) <= config.keep_last + config.keep_best
    else:  # nowhere a gap longer than asked for, and the time to the next checkpoint
        times = sorted(commit.time for commit in alive)
        assert all(b - a < config.keep_every_hours * 3600 + minutes * 60 for a, b in itertools.pairwise(times))


@given(
    measured=st.dictionaries(st.integers(1, 20), st.floats(0, 1), max_size=20),
    config=st.builds(CheckpointConfig, keep_last=st.integers(1, 3), keep_best=st.integers(1, 3)),
    behind=st.integers(0, 3),
)
def test_the_most_accurate_are_kept_although_they_are_measured_later(
    measured: dict[int, float], config: CheckpointConfig, behind: int
) -> None:
    """A checkpoint is measured some steps after it was saved, if at all. The best measured one is still there."""
    config = config.model_copy(update={"keep_best_by": "knn_accuracy"})
    alive: list[Commit] = []
    qualities: dict[int, Quality] = {}
    for step in range(1, 21):
        files = {"model": FileRecord(size=1, sha256="0" * 64)}
        # The validation loss of a worse model is lower, and is not asked for.
        loss = measured.get(step, 0.0)
        commit = Commit(step=step, directory=f"attempt-001/step-{step}", files=files, time=0.0, validation_loss=loss)
        alive = kept_checkpoints([commit, *alive], config, qualities)
        done = step - behind
        if done in measured:
            assert done in {c.step for c in alive}, "it could not be measured"
            qualities[done] = Quality(values={"knn": measured[done]}, best_by="knn")
    best = sorted(((quality.values["knn"], step) for step, quality in qualities.items()), reverse=True)
    kept = {commit.step for commit in kept_checkpoints(alive, config, qualities)}
    assert {step for _, step in best[: config.keep_best]} <= kept
    if best:
        first = [commit.step for commit in best_first(alive, qualities)][: config.keep_best]
        assert first == [step for _, step in best[: config.keep_best]]
        assert kept <= {s for _, s in best[: config.keep_best]} | {
            *range(21 - config.keep_last, 21), *range(max(qualities) + 1, 21),
        }  # fmt: skip


def test_a_start_looks_at_sizes_and_leaves_the_content_to_the_workers(run: LocalStorage, tmp_path: Path) -> None:
    assert newest_complete(run) is None
    trainer = Trainer()
    trainer.train(1)
    older = trainer.save(run, tmp_path)
    trainer.train(1)
    newest = trainer.save(run, tmp_path)
    found = newest_complete(run)
    assert found is not None and found.directory == newest
    os.truncate(tmp_path / "run" / newest / PARTS[3], 5)
    found = newest_complete(run)
    assert found is not None and found.directory == older


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
        model=config,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
        kind="image",
        dataset="4567" * 16,
        run_key="0123" * 8,
        step=5,
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
    for attack in (
        lambda path: path.write_bytes(pickle.dumps(Payload(made))),
        lambda path: torch.save(Payload(made), path),
    ):
        attack(folder / "model.safetensors")
        with pytest.raises(UserError, match=r"model does not hold a model that this version can read: .+"):
            load_exported(folder)
        assert not made.exists()
    # One in a checkpoint, with its right digest, is refused by safetensors.
    local = tmp_path / "local"
    local.mkdir()
    for name in (*PARTS, STATE_FILE, ".metadata"):
        (local / name).write_bytes(pickle.dumps(Payload(made)))
    upload_part(run, "attempt-001/step-1", local, 0, 1)
    commit_checkpoint(run, "attempt-001/step-1", 1, 1)
    with pytest.raises(Exception, match="(?i)header ?too ?large"):
        restored(run)
    with pytest.raises(Exception, match=r"state\.json cannot be read \(Invalid JSON"):
        load_weights(run)
    assert not made.exists()


def test_a_folder_that_holds_no_model_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(UserError, match=r"model does not hold a model .*: .*No such file or directory"):
        load_exported(folder)
    export_model(folder, build_model(VIT).state_dict(), describe(MODEL))
    with pytest.raises(UserError, match=r"does not hold a model .*: the weights lack 'decoder"):
        load_exported(folder)
    for content in (b"{}", b"\xff\xfe\x00", b""):
        (folder / "model.json").write_bytes(content)
        with pytest.raises(
            UserError, match=r"does not hold a model that this version can read: (model: Field|Invalid JSON)"
        ):
            load_exported(folder)


def test_tensors_are_copied_to_the_same_memory_every_time() -> None:
    tensors = {"weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(1.0)}
    copies = HostCopies(torch.device("cpu"))
    places = set()
    for step in range(3):
        copied = copies.copy(tensors)
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.add_(1)
        assert all(torch.equal(copied[name], expected[name]) for name in tensors), step
        places.add(tuple(tensor.data_ptr() for tensor in copied.values()))
    assert len(places) == 1
    copies.close()
