"""The linear probe: perfect on separable features, chance on noise, honest about its interval."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_ray.config import CrateMAEConfig, PrepareConfig, ProbeConfig
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import open_source
from crate_ray.errors import UserError
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.evaluation.probe import fit_probe, held_out_accuracy, probe_encoder, split_rows
from crate_ray.evaluation.torch_probe import fit_path
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription
from crate_ray.serving import FeatureExtractor, FeaturePoint
from crate_ray.storage.interface import open_storage

MODEL = CrateMAEConfig(image_size=8, patch_size=2, channels=1, dim=16, depth=1, num_subspaces=2)


def blobs(n: int, distance: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = np.arange(n, dtype=np.int64) % 4
    centres = np.eye(4, 12) * distance
    return (centres[y] + generator.normal(size=(n, 12))).astype(np.float32), y


def test_separable_features_are_perfect_and_noise_is_chance() -> None:
    assert fit_probe(*blobs(400, 20, 1), *blobs(200, 20, 2)).accuracy == 1.0
    score = fit_probe(*blobs(800, 0, 1), *blobs(2000, 0, 2))
    assert abs(score.accuracy - 0.25) < score.interval.high - score.interval.low
    assert (score.interval.value, score.interval.count) == (score.accuracy, 2000)


def test_accuracy_is_near_the_best_possible_classifier() -> None:
    test_x, test_y = blobs(4000, 2, 4)
    bayes = (np.argmax(test_x[:, :4], axis=1) == test_y).mean()  # equal spheres: the nearest centre is optimal
    score = fit_probe(*blobs(2000, 2, 3), test_x, test_y)
    assert bayes - 0.03 < score.accuracy < bayes + 0.01


def test_scale_of_the_features_does_not_matter() -> None:
    (train_x, train_y), (test_x, test_y) = blobs(400, 2, 5), blobs(400, 2, 6)
    scales = np.logspace(-3, 3, 12, dtype=np.float32)
    plain = fit_probe(train_x, train_y, test_x, test_y)
    assert fit_probe(train_x * scales, train_y, test_x * scales, test_y).accuracy == pytest.approx(
        plain.accuracy, abs=0.01
    )


def test_features_on_disk_are_in_memory_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crate_ray.evaluation.torch_probe._BATCH_BYTES", 2**15)
    x, y = blobs(2000, 20, 7)
    x = np.tile(x, (1, 16))
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = split_rows(y, 0)
    expected = fit_probe(x, y, x, y, solver="torch"), held_out_accuracy(x, y, rows)  # imports what it needs, too
    tracemalloc.start()
    assert (fit_probe(mapped, y, mapped, y, solver="torch"), held_out_accuracy(mapped, y, rows)) == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < mapped.nbytes / 2
    # Rows by number are the rows themselves.
    (chosen,) = fit_path(mapped, y, (0.1,), num_classes=4, rows_M=rows.fit)
    (copied,) = fit_path(x[rows.fit], y[rows.fit], (0.1,), num_classes=4)
    assert all(torch.equal(one, other) for one, other in zip(chosen, copied, strict=True))
    assert np.array_equal(chosen.predict(mapped, rows.held_out), copied.predict(x[rows.held_out]))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    out = {}
    for split in ("train", "test"):
        config = PrepareConfig(source="digits", split=split, output=str(tmp_path_factory.mktemp(split)))
        storage = open_storage(config.output, config.s3)
        pack(digits_source(split), storage, config)
        out[split] = load_dataset(storage)
    return out


def description(shards: ShardSet) -> ModelDescription:
    return ModelDescription(model=MODEL, mean=shards.manifest.mean, std=shards.manifest.std, kind="image")


def test_score_of_an_encoder_is_that_of_its_feature_and_layer(digits: dict[str, ShardSet]) -> None:
    train, test = digits["train"], digits["test"]
    torch.manual_seed(1)
    model = build_model(MODEL).eval()
    config = ProbeConfig(train="", test="", max_samples=400, feature="cls", layer=1)
    found = probe_encoder(model, description(train), train, test, config)
    extract = FeatureExtractor(model, description(train))
    sets = []
    for shards in (train, test):
        batches = list(iterate_dataset(shards, MODEL, 400))
        features = [extract.pooled(batch.images, [FeaturePoint("cls", 1)])[0].numpy() for batch in batches]
        sets += [np.concatenate(features), np.concatenate([batch.labels for batch in batches])]
    assert found == fit_probe(*sets)
    assert found != probe_encoder(model, description(train), train, test, config.model_copy(update={"layer": None}))


def test_samples_are_spread_evenly_and_counted_once(digits: dict[str, ShardSet]) -> None:
    every = np.concatenate([b.samples for b in iterate_dataset(digits["train"], MODEL)])
    assert np.array_equal(every, np.arange(digits["train"].manifest.num_samples))
    some = np.concatenate([b.samples for b in iterate_dataset(digits["train"], MODEL, 100)])
    assert 50 < len(some) <= 100
    assert len(set(np.diff(some))) == 1


def test_unlabelled_data_is_an_error(digits: dict[str, ShardSet], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for sample in range(3):
        Image.new("L", (8, 8), sample).save(folder / f"{sample}.png")
    config = PrepareConfig(source=str(folder), output=str(tmp_path / "out"))
    storage = open_storage(config.output, config.s3)
    pack(open_source(open_storage(str(folder), config.s3)), storage, config)
    unlabelled = load_dataset(storage)
    with pytest.raises(UserError, match="without a label"):
        probe_encoder(
            build_model(MODEL), description(unlabelled), unlabelled, digits["test"], ProbeConfig(train="", test="")
        )
