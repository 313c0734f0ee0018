"""Classes are matched by name: a dataset that lacks some, or numbers them otherwise, is measured like the same samples
with the other numbers."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crate_ray.bounded import MAX_CLASSES
from crate_ray.config import (
    ClassifierConfig,
    CrateMAEConfig,
    EvaluateConfig,
    FinetuneConfig,
    PrepareConfig,
    ProbeConfig,
)
from crate_ray.data.format.classes import UNKNOWN_CLASS, new_numbers, renumber
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.format.manifest import Manifest
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack, shard_writer
from crate_ray.data.prepare.sources import open_source
from crate_ray.errors import UserError
from crate_ray.evaluation.classification import classify_by, classify_by_pixels
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.evaluation.probe import probe_encoder
from crate_ray.finetuning.measure import measure_accuracy
from crate_ray.finetuning.run import open_finetuning
from crate_ray.models import build_model
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, Normalizer
from crate_ray.storage.local import LocalStorage

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = CrateMAEConfig(image_size=16, patch_size=8, dim=16, depth=1, num_subspaces=2)
DESCRIPTION = ModelDescription(model=MODEL, mean=(0.5,) * 3, std=(0.25,) * 3, kind="image")
COLOURS = {"ant": (220, 20, 20), "bee": (20, 220, 20), "cat": (20, 20, 220), "dog": (220, 220, 20)}


def manifest(classes: tuple[str, ...] | None, num_classes: int) -> Manifest:
    return Manifest(
        num_samples=9, num_shards=1, total_bytes=9, kind="image", image_suffixes=("png",), suffixes=("png",),
        channels=3, num_classes=num_classes, classes=classes, mean=(0.5,) * 3, std=(0.2,) * 3, num_measured=1,
        shards_sha256="0" * 64, index_sha256="0" * 64,
    )  # fmt: skip


# --- Numbers --------------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abcé ", min_size=1, max_size=3), min_size=1, max_size=6, unique=True), st.data())
def test_a_class_has_the_number_of_its_name(names: list[str], data: st.DataObject) -> None:
    own = data.draw(st.permutations(names).map(lambda order: order[: data.draw(st.integers(1, len(names)))]))
    written = tuple(unicodedata.normalize(data.draw(st.sampled_from(["NFC", "NFD"])), name) for name in own)
    numbers = new_numbers(names, manifest(written, len(own)), "there", "here")
    labels = np.array([*range(len(own)), -1, -2])
    found = renumber(labels, numbers).tolist()
    assert found == [*(names.index(name) for name in own), -1, -2]


@given(st.permutations(list(range(12))))
def test_names_that_are_numbers_match_class_numbers(order: list[int]) -> None:
    names = tuple(str(number) for number in order)
    for known, own in ((names, manifest(None, 12)), (None, manifest(names, 12))):
        numbers = new_numbers(known, own, "there", "here")
        found = renumber(np.arange(12), numbers).tolist()
        assert found == ([order.index(n) for n in range(12)] if known else order)


def test_numbers_count_where_there_are_no_names() -> None:
    for known, own in ((None, manifest(None, 3)), (("a", "b"), manifest(None, 2)), (None, manifest(("a", "b"), 2))):
        assert new_numbers(known, own, "there", "here") is None
    assert new_numbers(("a", "b"), manifest(("b",), 2), "there", "here") is None  # a number has no name
    found = new_numbers(("1", "2", "3"), manifest(None, 4), "there", "here")
    assert found is not None and found.tolist() == [UNKNOWN_CLASS, 0, 1, 2]
    assert new_numbers(("0", "00"), manifest(None, 2), "there", "here") is None
    assert new_numbers((str(MAX_CLASSES),), manifest(None, 1), "there", "here") is None
    with pytest.raises(UserError, match=r"there has 1 of 2 classes that here lacks: c, while here has a, b; pack both"):
        new_numbers(("a", "b"), manifest(("a", "c"), 2), "there", "here")
    with pytest.raises(UserError, match=r"there has samples of class 4, and here has no class of this name"):
        new_numbers(("1", "2", "3"), manifest(None, 5), "there", "here")
    with pytest.raises(UserError, match="two classes of the same name"):
        new_numbers(("a", "b"), manifest(("a", "a"), 2), "there", "here")


# --- Measurements ---------------------------------------------------------------------------------------------------


def packed(folder: Path, classes: tuple[str, ...], renamed: dict[str, str] | None = None) -> ShardSet:
    """Six noisy images of a colour for each class."""
    random = np.random.default_rng(len(classes))
    for name in classes:
        of = folder / "images" / (renamed or {}).get(name, name)
        of.mkdir(parents=True)
        for number in range(6):
            pixels = np.array(COLOURS[name]) + random.normal(0, 6, (16, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(of / f"{number}.png")
    storage = LocalStorage(folder / "packed")
    pack(open_source(LocalStorage(folder / "images")), storage, PrepareConfig(source="x", output=storage.uri))
    return load_dataset(storage)


def indexed(folder: Path, labels: list[bytes | None], colours: list[str]) -> ShardSet:
    """Images of colours with these `cls` members, without names of classes."""
    random = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "x-000000.tar").open("wb") as file, shard_writer(file) as writer:
        for number, (label, colour) in enumerate(zip(labels, colours, strict=True)):
            pixels = np.array(COLOURS[colour]) + random.normal(0, 6, (16, 16, 3))
            path = folder / "image.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            sample = {"__key__": f"{number:03d}", "png": path.read_bytes()}
            writer.write(sample | ({} if label is None else {"cls": label}))
            path.unlink()
    storage = LocalStorage(folder)
    index_existing(storage)
    return load_dataset(storage)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return packed(tmp_path_factory.mktemp("train"), tuple(COLOURS))


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """The same kinds of images: without the second class, and by class numbers in another order."""
    folder = tmp_path_factory.mktemp("test")
    return {"fewer": packed(folder / "fewer", ("ant", "cat", "dog")), "last": packed(folder / "last", ("dog",))}


def test_probe_and_knn(train: ShardSet, tests: dict[str, ShardSet]) -> None:
    torch.manual_seed(0)
    model = build_model(MODEL).eval()
    for test in tests.values():
        probe = ProbeConfig(train=train.storage.uri, test=test.storage.uri)
        config = EvaluateConfig(model="x", probe=probe, all_layers=False)
        pixels = classify_by_pixels(DESCRIPTION, train, test, config, probe, InProcess())
        assert (pixels.linear.accuracy, pixels.knn.value) == (1.0, 1.0)
        who = EvaluatedModel("trained", model, DESCRIPTION)
        encoder = classify_by(who, train, test, config, probe, InProcess()).standard
        assert (encoder.linear.accuracy, encoder.knn.value) == (1.0, 1.0)
        assert probe_encoder(model, DESCRIPTION, train, test, probe).accuracy == 1.0  # of promotions and sweeps


class ByColour(Classifier):
    """A classifier that knows the colours by heart, with its own order of the classes."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        super().__init__(MODEL, ClassifierConfig(num_classes=len(classes), classes=classes))
        self.colours = torch.tensor([COLOURS[name] for name in classes]) / 255

    def forward(self, images: torch.Tensor, targets: object = None) -> object:
        mean_B3 = images.mean((2, 3)) * 0.25 + 0.5
        scores = -torch.cdist(mean_B3, self.colours) * 20
        return super().forward(images)._replace(scores=scores)


def test_the_held_out_accuracy_of_a_classifier(train: ShardSet, tests: dict[str, ShardSet]) -> None:
    normalizer = Normalizer.of(DESCRIPTION.mean, DESCRIPTION.std)
    config = FinetuneConfig.model_validate(
        {"data": {"train": train.storage.uri}, "training": {"steps": 1}, "model": "x"}
    )
    for classes in (tuple(COLOURS), ("dog", "ant", "cat", "bee")):
        for shards in (train, *tests.values()):
            found = measure_accuracy(ByColour(classes), shards, config.data, normalizer)
            assert found.top1 == 1.0 and found.validation_loss < 0.1, (classes, shards.storage.uri)
    with pytest.raises(UserError, match=r"has 1 of 4 classes that the classifier lacks: bee, while"):
        measure_accuracy(ByColour(("dog", "ant", "cat")), train, config.data, normalizer)


def test_classes_that_are_not_learned_are_refused_by_name_before_anything_is_computed(
    train: ShardSet, tests: dict[str, ShardSet], tmp_path: Path
) -> None:
    class Never(InProcess):
        def pixels(self, *_: object) -> object:
            raise AssertionError("features are computed")

    probe = ProbeConfig(train="", test="")
    config = EvaluateConfig(model="x", probe=probe)
    with pytest.raises(UserError, match=r"has 1 of 4 classes that \S+ lacks: bee, while \S+ has ant, cat, dog; pack"):
        classify_by_pixels(DESCRIPTION, tests["fewer"], train, config, probe, Never())

    def message(train: ShardSet, validation: ShardSet | None = None) -> str:
        data = {"train": train.storage.uri} | ({"validation": validation.storage.uri} if validation else {})
        values = {"data": data, "training": {"steps": 1, "batch_size": 4}, "model": "scratch", "name": "x"}
        values |= {"storage": str(tmp_path / "runs"), "encoder": MODEL.model_dump()}
        try:
            open_finetuning(FinetuneConfig.model_validate(values))
        except UserError as error:
            return str(error)
        return ""

    assert "has 1 of 4 classes that" in message(tests["fewer"], train)
    assert message(train, tests["fewer"]) == message(train, tests["last"]) == ""
    other = packed(tmp_path / "other", ("ant", "bee"), {"bee": "Bee"})
    assert "lacks: Bee, while" in message(train, other)
    # Numbers that are not counted from 0 would take memory for each number.
    huge = indexed(tmp_path / "huge", [b"0", str(MAX_CLASSES - 1).encode()] * 6, ["ant", "bee"] * 6)
    assert f"go up to {MAX_CLASSES - 1:,}, and it has 12 samples; number the classes 0, 1, 2" in message(huge)


def test_class_numbers_with_gaps_take_no_memory_in_a_probe(tmp_path: Path) -> None:
    """2²⁰ classes of a few samples: k-NN votes and the torch solver's weights would take gigabytes."""
    import resource

    colours = ["ant", "bee", "cat"] * 12
    labels = [{"ant": b"7", "bee": b"524288", "cat": str(MAX_CLASSES - 1).encode()}[colour] for colour in colours]
    shards = indexed(tmp_path / "gaps", list(labels), colours)
    probe = ProbeConfig(train="", test="", solver="torch")
    config = EvaluateConfig(model="x", probe=probe)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = classify_by_pixels(DESCRIPTION, shards, shards, config, probe, InProcess())
    assert (found.linear.accuracy, found.knn.value) == (1.0, 1.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_samples_without_a_class_are_counted(tmp_path: Path, train: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    colours = ["ant", "bee"] * 6
    shards = indexed(tmp_path / "some", [None, b"cat", b"3.0", b"-1", *[b"0", b"1"] * 4], colours)
    assert shards.manifest.num_classes is None
    told = "some counts as unlabelled: 4 of 12 samples have no class number 0, 1, 2, … in 'cls': x-000000.tar/000 (no "
    assert told + "'cls'), x-000000.tar/001 ('cls' is 'cat'), x-000000.tar/002 ('cls' is '3.0'), x-0" in caplog.text
    caplog.clear()
    storage = LocalStorage(tmp_path / "again")
    pack(open_source(shards.storage), storage, PrepareConfig(source="x", output=storage.uri))
    assert "again counts as unlabelled: 4 of 12 samples have no class number" in caplog.text
    assert "('cls' is 'cat')" in caplog.text
    caplog.clear()
    indexed(tmp_path / "none", [None] * 12, colours)
    assert "unlabelled" not in caplog.text
    assert indexed(tmp_path / "large", [b"0", b"70000"] * 6, colours).manifest.num_classes == 70001
    assert "the class numbers in 'cls' go up to 70000, and there are 12 samples" in caplog.text
    # 10¹² is no class: such a sample is a bad one, and is counted before memory is taken for it.
    wrong = indexed(tmp_path / "wrong", [b"0", b"1", b"1000000000000", *[b"0", b"1"] * 5], [*colours, "cat"])
    assert wrong.manifest.num_classes == 2
    assert "x-000000.tar/002 (its class number is not below" in caplog.text
    bad: dict[str, str] = {}
    model = ByColour(("ant", "bee"))
    config = FinetuneConfig.model_validate({"data": {"train": "x"}, "training": {"steps": 1}, "model": "x"})
    measure_accuracy(model, wrong, config.data, Normalizer.of(DESCRIPTION.mean, DESCRIPTION.std), bad=bad)
    assert bad == {"002": "no_label"}
    probe = ProbeConfig(train="", test="")
    config = EvaluateConfig(model="x", probe=probe)
    for pair in ((shards, train), (train, shards)):
        with pytest.raises(UserError, match=r"some has samples without a label, a member 'cls' with a class number"):
            classify_by_pixels(DESCRIPTION, *pair, config, probe, InProcess())
