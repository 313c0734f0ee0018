"""`pretrain --data PATH`: the chosen settings are valid for any data and machine, and the user's settings win. Also
makes datasets from folders of real files."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crate_ray.cli import parse_config
from crate_ray.config import CrateMAEConfig, PretrainConfig, S3Config
from crate_ray.config.automatic import (
    GIB,
    DataFacts,
    MachineFacts,
    choose,
    default_batch_size,
    held_out_count,
)
from crate_ray.config.values import merge, validate
from crate_ray.errors import UserError
from crate_ray.jobs.automatic import complete, prepare_data, run_name
from crate_ray.runs.pretraining import open_pretraining
from crate_ray.runs.record import write_record
from crate_ray.storage.interface import open_storage
from crate_ray.training.optimizer import peak_learning_rate

CPU = MachineFacts(gpus=0, gpu_bytes=0, cpus=8, memory_bytes=16 * GIB)
H100 = MachineFacts(gpus=8, gpu_bytes=80 * GIB, cpus=96, memory_bytes=1024 * GIB)
PHOTOS = DataFacts(num_samples=135, kind="image", channels=3, height=375, width=500, same_size=False, num_held_out=15)

data_facts = st.builds(
    DataFacts,
    num_samples=st.integers(1, 10**9),
    kind=st.sampled_from(["image", "grid"]),
    channels=st.sampled_from([1, 3]),
    height=st.integers(2, 5000),
    width=st.integers(2, 5000),
    same_size=st.booleans(),
    num_held_out=st.integers(0, 10_000),
)
machine_facts = st.builds(
    MachineFacts,
    gpus=st.integers(0, 512),
    gpu_bytes=st.integers(4 * GIB, 192 * GIB),
    cpus=st.integers(1, 4096),
    memory_bytes=st.integers(2 * GIB, 2048 * GIB),
    nodes=st.integers(1, 64),
)


def settings(data: DataFacts, machine: MachineFacts, values: dict[str, Any] | None = None) -> PretrainConfig:
    """What a run is started with: the choice, and the user's settings over it."""
    values = merge({"data": {"train": "x", "validation": "y"}}, values or {})
    return validate(PretrainConfig, merge(choose(data, machine, values).settings, values))


@given(data_facts, machine_facts)
def test_every_choice_is_valid_and_fits_the_data(data: DataFacts, machine: MachineFacts) -> None:
    config = settings(data, machine)
    training, model = config.training, config.model
    assert training.batch_size <= data.num_samples
    assert config.scaling.max_workers <= training.batch_size
    assert config.scaling.max_workers <= max(machine.gpus, machine.nodes)
    assert training.micro_batch_size is None or training.micro_batch_size < training.batch_size
    assert model.channels == data.channels and max(model.image_hw) <= 224
    assert model.image_hw[0] <= data.height and model.image_hw[1] <= data.width
    assert 1 <= model.num_patches <= 56 * 56
    assert training.epochs and 1 <= training.epochs <= 800
    assert 5e-4 <= peak_learning_rate(config.optim, training.batch_size) <= 1.5e-4 * 4096 / 256
    assert (config.data.crop_scale, config.data.flip) == (((1, 1), False) if data.kind == "grid" else ((0.2, 1), True))
    assert choose(data, machine) == choose(data, machine)


@given(data_facts, machine_facts)
def test_more_samples_never_mean_a_smaller_model_or_batch_or_more_epochs(
    data: DataFacts, machine: MachineFacts
) -> None:
    more = DataFacts(**{**vars(data), "num_samples": data.num_samples * 10})
    few, many = settings(data, machine), settings(more, machine)
    assert isinstance(few.model, CrateMAEConfig) and isinstance(many.model, CrateMAEConfig)
    assert few.model.dim <= many.model.dim
    assert few.training.batch_size <= many.training.batch_size
    assert (few.training.epochs or 0) >= (many.training.epochs or 0)


def test_choices_for_photos_on_a_cpu_and_imagenet_on_gpus() -> None:
    small = settings(PHOTOS, CPU)
    assert isinstance(small.model, CrateMAEConfig)
    assert (small.model.preset, small.model.image_size, small.model.patch_size) == ("tiny", 128, 16)
    assert (small.training.batch_size, small.training.epochs, small.scaling.workers) == (16, 200, 1)
    imagenet = DataFacts(1_281_167, "image", 3, 375, 500, same_size=False, num_held_out=10_000)
    large = settings(imagenet, H100)
    assert isinstance(large.model, CrateMAEConfig)
    assert (large.model.preset, large.model.image_size, large.model.patch_size) == ("base", 224, 16)
    assert (large.training.batch_size, large.training.epochs, large.scaling.workers) == (4096, 100, 8)
    assert large.optim.lr == pytest.approx(2.4e-3)
    assert large.training.micro_batch_size == 128  # 45 GiB by the estimate
    cifar = DataFacts(50_000, "image", 3, 32, 32, same_size=True)
    tiny = settings(cifar, H100)
    assert (tiny.model.image_size, tiny.model.patch_size, tiny.model.num_patches) == (32, 4, 64)
    sound = settings(DataFacts(2700, "grid", 1, 64, 128, same_size=True), CPU)
    assert (sound.model.image_size, sound.model.patch_size) == ((64, 128), 8)


def test_what_is_given_wins_and_the_rest_follows_from_it() -> None:
    config = settings(
        PHOTOS, CPU, {"training": {"steps": "7", "batch_size": "8"}, "model": {"image_size": ["64", "32"]}}
    )
    assert (config.training.steps, config.training.epochs, config.training.batch_size) == (7, None, 8)
    assert (config.model.image_hw, config.model.patch_hw) == ((64, 32), (4, 4))
    assert config.checkpoint.every_steps == 10
    small = settings(PHOTOS, CPU, {"model": {"dim": 64, "num_subspaces": 4, "depth": 2}, "optim": {"base_lr": 1e-3}})
    assert isinstance(small.model, CrateMAEConfig)
    assert (small.model.preset, small.model.dim, small.model.depth, small.optim.lr) == (None, 64, 2, None)
    vit = settings(PHOTOS, CPU, {"model": {"architecture": "vit_mae"}, "scaling": {"workers": [2, 4]}})
    assert vit.model.architecture == "vit_mae" and vit.model.preset == "tiny"
    assert (vit.scaling.workers, vit.training.batch_size) == ((2, 4), 16)
    reasons = choose(PHOTOS, CPU, {"training": {"steps": 7}, "optim": {"lr": 1}}).reasons
    assert reasons["length"].startswith("7 steps as given") and reasons["batch"].endswith("learning rate as given")
    lion, adamw = (settings(PHOTOS, CPU, {"optim": {"optimizer": name}}).optim for name in ("lion", "adamw"))
    assert adamw.lr and (lion.lr, lion.weight_decay) == (adamw.lr / 5, adamw.weight_decay * 5)
    given = settings(PHOTOS, CPU, {"optim": {"optimizer": "lion", "lr": 1e-3}}).optim
    assert (given.lr, given.weight_decay) == (1e-3, adamw.weight_decay)
    # What is not valid is not chosen by, and refused by validation.
    with pytest.raises(UserError, match="setting 'training.batch_size' is 'many'"):
        settings(PHOTOS, CPU, {"training": {"batch_size": "many"}})


@given(st.integers(1, 10**7), st.integers(1, 300))
def test_the_default_batch_fits_the_data(samples: int, workers: int) -> None:
    batch = default_batch_size(samples, workers)
    assert 1 <= batch <= samples
    assert batch == 256 if samples >= 256 else batch >= min(workers, samples)
    assert default_batch_size(150, 1) == 32


@given(st.integers(1, 10**7))
def test_a_tenth_or_less_is_held_out(samples: int) -> None:
    held_out = held_out_count(samples)
    assert held_out <= 0.1 * samples
    assert held_out == 0 if samples < 50 else 5 <= held_out <= 10_000 and held_out > 0.04 * min(samples, 200_000)


# --- Datasets of folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty photos of different sizes, in the folder from which the command is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = tmp_path / "my photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(60):
        pixels = random.integers(0, 255, (40 + number % 3 * 10, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_{number:03d}.jpg")
    return folder


def parse(*arguments: str) -> PretrainConfig:
    return parse_config(PretrainConfig, arguments, complete)


def test_a_folder_of_images_is_packed_once_and_resumes(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse("--data", str(photos))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["data", "images", "model", "batch", "length"]
    assert lines[0].startswith("data      54 images, 6 held out for validation: packed into ")
    assert config.name == "my-photos" == run_name("my photos")
    assert (config.model.image_size, config.training.batch_size) == (48, 16)
    run = open_pretraining(config)
    assert run.mixture.datasets[0].manifest.num_samples == 54
    keys = {str(path): path.stat().st_mtime_ns for path in Path("runs/datasets").rglob("*")}
    assert parse(f"--data={photos}") == config  # the same choices, and nothing is packed again
    assert keys == {str(path): path.stat().st_mtime_ns for path in Path("runs/datasets").rglob("*")}
    # A run that exists keeps its choices: here those of another machine.
    changed = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": 4, "epochs": 3})})
    write_record(run.storage, run.record.model_copy(update={"config": changed}))
    capsys.readouterr()
    again = parse("--data", str(photos), "--training.steps", "50")
    assert (again.training.batch_size, again.training.steps, again.training.epochs) == (4, 50, None)
    assert "those of the run, which exists already" in capsys.readouterr().out
    # Other content is another dataset, which the run refuses.
    shutil.copy(photos / "IMG_000.jpg", photos / "IMG_new.jpg")
    other = parse("--data", str(photos))
    assert other.data.train != config.data.train


def test_a_batch_that_is_not_set_fits_the_data(photos: Path) -> None:
    packed = parse("--data", str(photos)).data.train
    values = {"name": "small", "data": {"train": packed}, "training": {"epochs": 1}}
    run = open_pretraining(validate(PretrainConfig, values))
    assert (run.config.training.batch_size, run.total_steps) == (8, 6)  # of 54 samples
    # The run keeps its batch, whatever would be the default by now.
    kept = run.config.model_copy(update={"training": run.config.training.model_copy(update={"batch_size": 4})})
    write_record(run.storage, run.record.model_copy(update={"config": kept}))
    assert open_pretraining(validate(PretrainConfig, values)).config.training.batch_size == 4
    given = merge(values, {"name": "large", "training": {"batch_size": 256}})
    sentence = "a batch of 256 does not fit the 54 samples of .*; set training.batch_size to at most 54, such as 8, or "
    with pytest.raises(UserError, match=sentence):
        open_pretraining(validate(PretrainConfig, given))


def test_held_out_images_are_not_trained_on(photos: Path) -> None:
    prepared = prepare_data(open_storage(str(photos), S3Config()), open_storage("out", S3Config()), {})
    assert prepared.validation
    sizes = []
    for uri in (prepared.train, prepared.validation):
        config = validate(PretrainConfig, {"data": {"train": uri}, "training": {"steps": 1}})
        sizes.append(open_pretraining(config).mixture.datasets[0].manifest.num_samples)
    assert sizes == [54, 6]
    given = {"data": {"validation": prepared.validation}}
    own = prepare_data(open_storage(str(photos), S3Config()), open_storage("out", S3Config()), given)
    config = validate(PretrainConfig, {"data": {"train": own.train}, "training": {"steps": 1}})
    assert open_pretraining(config).mixture.datasets[0].manifest.num_samples == 60
    assert own.validation == prepared.validation


def test_shards_a_dataset_and_split_folders_are_used_as_they_are(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = parse("--data", str(photos)).data
    assert isinstance(packed.train, str) and packed.validation
    ready = parse("--data", packed.train, "--name", "ready").data
    assert (ready.train, ready.validation) == (packed.train, None)
    # Shards without a manifest are indexed elsewhere, and not touched.
    foreign = Path("foreign")
    for name, uri in (("train", packed.train), ("val", packed.validation)):
        (foreign / name).mkdir(parents=True)
        for shard in Path(uri).glob("*.tar"):
            shutil.copy(shard, foreign / name)
    before = sorted(foreign.rglob("*"))
    indexed = parse("--data", "foreign").data
    assert sorted(foreign.rglob("*")) == before
    assert isinstance(indexed.train, str) and "runs/datasets/foreign-" in indexed.train and indexed.validation
    config = validate(PretrainConfig, {"data": {"train": indexed.train}, "training": {"steps": 1}})
    (dataset,) = open_pretraining(config).mixture.datasets
    assert dataset.manifest.num_samples == 54
    assert dataset.manifest.shards_uri == str(foreign.absolute() / "train")
    # A folder of images with train/ and test/ is split as it is.
    split = Path("split")
    for number, path in enumerate(sorted(photos.iterdir())):
        (split / ("test" if number < 20 else "train") / "cats").mkdir(parents=True, exist_ok=True)
        os.link(path, split / ("test" if number < 20 else "train") / "cats" / path.name)
    capsys.readouterr()
    parse("--data", "split")
    assert "40 images, 20 held out" in capsys.readouterr().out


def test_grids_are_packed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sound").mkdir()
    for number in range(20):
        content = io.BytesIO()
        np.save(content, np.random.default_rng(number).normal(size=(2, 16, 24 + number % 2)).astype(np.float32))
        Path("sound", f"{number}.npy").write_bytes(content.getvalue())
    config = parse("--data", "sound")
    assert (config.model.channels, config.model.image_size, config.data.validation) == (2, (16, 24), None)
    assert (config.data.flip, config.data.crop_scale) == (False, (1, 1))


def test_nothing_to_train_on_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nothing holds no images .* or \.tar shards to train on$"):
        parse("--data", "nothing")
    Path("text").mkdir()
    Path("text/a.txt").write_text("x")
    with pytest.raises(UserError, match=r"text holds no images"):
        parse("--data", "text")
    with pytest.raises(UserError, match=r"data.train and --data are both given; give only one of them"):
        parse("--data", "text", "--data.train", "x")
