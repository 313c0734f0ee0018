"""Evaluation on the device: the CPU's numbers, and data stays on the device while it is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from crate_ray.config import CrateMAEConfig, PrepareConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.evaluation.embedding_output import EmbeddingRecord
from crate_ray.evaluation.embedding_parts import PartWriter
from crate_ray.evaluation.torch_probe import fit_path
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription
from crate_ray.serving import FeatureExtractor, FeaturePoint
from crate_ray.storage.interface import open_storage
from crate_ray.structure.layerwise import measure_inversion, measure_layers
from tests.gpu_emulated.device import recorded, syncs

MODEL = CrateMAEConfig(image_size=16, patch_size=4, dim=32, depth=2, num_subspaces=4)


def test_the_probe_copies_features_once_and_finds_what_the_cpu_finds() -> None:
    random = np.random.default_rng(0)
    y = random.integers(0, 4, 300)
    x = (random.normal(size=(300, 12)) + np.eye(4, 12)[y] * 2).astype(np.float32)
    rows = np.arange(0, 300, 2)
    fitted = {}
    for device in ("cpu", "cuda"):
        with recorded() as events:
            path = fit_path(x, y, (0.01, 1.0), num_classes=4, rows_M=rows, max_iterations=20, device=device)
            fitted[device] = [probe.predict(x) for probe in path]
        if device == "cuda":
            copied = [
                event.detail for event in events if "to the device" in event.detail and "Float[150,12,]" in event.detail
            ]
            assert len(copied) == 1
    assert all(np.array_equal(a, b) for a, b in zip(fitted["cpu"], fitted["cuda"], strict=True))


def test_an_embedding_job_on_the_device_writes_what_the_cpu_writes(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "data"), S3Config())
    pack(shapes_source("all", 40, 24, 0), storage, PrepareConfig(output=storage.uri))
    torch.manual_seed(0)
    model = build_model(MODEL)
    description = ModelDescription(model=MODEL, mean=(0.5,) * 3, std=(0.2,) * 3, kind="image")
    shards = load_dataset(storage)
    record = EmbeddingRecord(
        model="a" * 64, dataset=shards.manifest.digest(), feature="mean", num_samples=40, dim=MODEL.dim,
        part_samples=(40,),
    )  # fmt: skip
    found = {}
    for device in ("cpu", "cuda"):
        output = open_storage(str(tmp_path / device), S3Config())
        on_device = torch.device(device)
        writer = PartWriter(shards, output, record, model, description, on_device, batch_size=16, max_bad_fraction=0.01)
        assert [progress.samples for progress in writer.write(range(40))] == [16, 32, 40, 40]
        table = pq.read_table(tmp_path / device)
        found[device] = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    assert np.abs(found["cuda"] - found["cpu"]).max() < 1e-4 and len(found["cpu"]) == 40


def test_features_and_measures_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = build_model(MODEL)
    description = ModelDescription(model=MODEL, mean=(0.5,) * 3, std=(0.2,) * 3, kind="image", step=1)
    images = torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8)
    points = [FeaturePoint("mean"), FeaturePoint("cls", 1)]
    normalised = torch.randn(5, 3, 16, 16)
    found = []
    for device in ("cpu", "cuda"):
        extractor = FeatureExtractor(model, description, device=device)
        on_device = normalised.to(device)
        with recorded() as events:
            features = extractor.pooled(images, points)
        if device == "cuda":  # images in, one copy out for each feature
            assert len(syncs(events)) == 1 + len(points)
        inversion = measure_inversion(model, on_device)
        assert inversion is not None
        found.append([*features, *vars(measure_layers(model, on_device)).values(), inversion.relative])
    for cpu, device_value in zip(*found, strict=True):
        torch.testing.assert_close(device_value, cpu, rtol=1e-4, atol=1e-4)
