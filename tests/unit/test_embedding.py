"""The embedding job in this process: the same numbers as the encoder, each sample once, whatever was there before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from numpy.typing import NDArray

from crate_ray.config import ClassifierConfig, CrateMAEConfig, DataConfig, EmbedConfig, PrepareConfig, S3Config
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.loader import evaluation_loader
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding import embed_dataset
from crate_ray.evaluation.embedding_output import RECORD_FILE, EmbeddingRecord
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.models import build_model
from crate_ray.models.backbone import Backbone
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, Normalizer
from crate_ray.storage.interface import open_storage

MODEL = CrateMAEConfig(image_size=16, patch_size=8, dim=16, depth=2, num_subspaces=2)
SAMPLES = 150


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    storage = open_storage(str(tmp_path_factory.mktemp("data") / "shapes"), S3Config())
    pack(shapes_source("all", SAMPLES, 24, 0), storage, PrepareConfig(output=storage.uri, shard_samples=70))
    return load_dataset(storage)


def the_model(classes: int = 0) -> Any:
    torch.manual_seed(0)
    if not classes:
        return build_model(MODEL).eval()
    return Classifier(MODEL, ClassifierConfig(num_classes=classes)).eval()


def description(shards: ShardSet, classes: int = 0) -> ModelDescription:
    head = ClassifierConfig(num_classes=classes) if classes else None
    manifest = shards.manifest
    return ModelDescription(model=MODEL, classifier=head, mean=manifest.mean, std=manifest.std, kind="image")


def embed(shards: ShardSet, output: Path, classes: int = 0, **settings: Any) -> EmbeddingRecord:
    config = EmbedConfig(data=shards.storage.uri, output=str(output), **{"batch_size": 20, **settings})
    return embed_dataset(config, the_model(classes), description(shards, classes), "mine")


def tokens(shards: ShardSet, classes: int = 0) -> NDArray[np.float32]:
    """All tokens of all samples, by the interface for other people's code."""
    backbone, about = Backbone(the_model(classes)), description(shards, classes)
    normalise = Normalizer.of(about.mean, about.std)
    with torch.no_grad():
        return torch.cat(
            [backbone.forward_features(normalise(b.images)) for b in iterate_dataset(shards, MODEL)]
        ).numpy()


def vectors(output: Path) -> NDArray[np.float32]:
    return np.stack(pq.read_table(output)["embedding"].to_numpy(zero_copy_only=False))


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("feature", ["mean", "cls", "patch"])
def test_rows_are_the_encoders_tokens_in_the_order_of_the_samples(
    shards: ShardSet, tmp_path: Path, feature: str, classes: int
) -> None:
    record = embed(shards, tmp_path / "out", classes, feature=feature, part_samples=48)
    z_BTD = tokens(shards, classes)
    wanted = {"mean": z_BTD[:, 1:].mean(1), "cls": z_BTD[:, 0], "patch": z_BTD[:, 1:].reshape(SAMPLES, -1)}[feature]
    assert np.abs(vectors(tmp_path / "out") - wanted).max() < 1e-5
    assert record.shape == ((4, 16) if feature == "patch" else (16,)) and record.num_rows == SAMPLES
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [48, 48, 48, 6]
    table = pq.read_table(tmp_path / "out")
    batches = list(iterate_dataset(shards, MODEL))
    assert table["sample"].to_pylist() == list(range(SAMPLES))
    assert table["key"].to_pylist() == [key for batch in batches for key in batch.keys]
    assert np.array_equal(table["label"], np.concatenate([batch.labels for batch in batches]))
    assert table["shard"].to_pylist() == [f"shard-{number // 70:06d}.tar" for number in range(SAMPLES)]
    about = {key.decode(): value.decode() for key, value in pq.read_schema(files[0]).metadata.items()}
    assert about["crate_ray.model"] == record.model and about["crate_ray.dataset"] == shards.manifest.digest()
    assert json.loads(about["crate_ray.classes"]) == list(shards.manifest.classes or ())
    assert (about["crate_ray.feature"], about["crate_ray.reference"]) == (feature, "mine")


def test_float16_halves_the_numbers(shards: ShardSet, tmp_path: Path) -> None:
    embed(shards, tmp_path / "whole")
    embed(shards, tmp_path / "half", dtype="float16")
    found = vectors(tmp_path / "half")
    assert found.dtype == np.float16 and np.array_equal(found, vectors(tmp_path / "whole").astype(np.float16))


def test_npy_shards_are_read_by_webdataset(shards: ShardSet, tmp_path: Path) -> None:
    embed(shards, tmp_path / "table", feature="patch", part_samples=64)
    record = embed(shards, tmp_path / "out", feature="patch", format="npy-shards", part_samples=64)
    files = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(files) == 3 == len(record.parts or ())
    table = pq.read_table(tmp_path / "table")
    found = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == table["key"].to_pylist()
    assert [sample["cls"] for sample in found] == table["label"].to_pylist()
    assert [sample["json"]["sample"] for sample in found] == list(range(SAMPLES))
    assert [sample["json"]["name"] for sample in found] == table["name"].to_pylist()
    wanted = vectors(tmp_path / "table").reshape(SAMPLES, 4, 16)
    assert np.array_equal(np.stack([sample["npy"] for sample in found]), wanted)


def test_a_part_of_the_evaluation_order_is_that_part(shards: ShardSet) -> None:
    whole = np.concatenate([batch.images.numpy() for batch in iterate_dataset(shards, MODEL)])
    for memory in (1, 2**31):  # streamed, and kept in memory
        data = DataConfig(train=shards.storage.uri, memory_bytes=memory)
        for start, stop in ((0, 1), (5, 70), (69, 71), (64, 150), (149, 150)):
            with evaluation_loader(shards, MODEL, data, batch_size=16, samples=range(start, stop)) as loader:
                batches = list(loader)
            assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(start, stop))
            assert np.array_equal(np.concatenate([batch.images.numpy() for batch in batches]), whole[start:stop])


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_a_stopped_job_goes_on_to_the_same_bytes(shards: ShardSet, tmp_path: Path) -> None:
    """The state that a kill leaves: whole parts, one that is not recorded, and no mark that it is complete."""
    embed(shards, tmp_path / "quiet", part_samples=32)
    embed(shards, tmp_path / "out", part_samples=32)
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    parts = record["parts"]
    record |= {"complete": False, "parts": None}
    (tmp_path / "out" / RECORD_FILE).write_text(json.dumps(record))
    for part in parts[:2]:
        report = tmp_path / "out" / f"_part-{part['start']:012d}-{part['stop']:012d}.json"
        report.write_text(json.dumps({"part": part}))
    (tmp_path / "out" / "part-000000000128-000000000150.parquet").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    embed(shards, tmp_path / "out", batch_size=32)  # neither the batch nor the size of parts need be the same
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert len(after) == 5 and [name for name in sorted(before) if before[name] == after[name]] == sorted(before)[:2]
    found, wanted = content(tmp_path / "out"), content(tmp_path / "quiet")
    assert found.keys() == wanted.keys()
    assert pq.read_table(tmp_path / "out").drop_columns("embedding") == pq.read_table(tmp_path / "quiet").drop_columns(
        "embedding"
    )
    assert np.abs(vectors(tmp_path / "out") - vectors(tmp_path / "quiet")).max() < 1e-6
    (tmp_path / "out" / "part-000000000128-000000000150.parquet").unlink()
    with pytest.raises(UserError, match=r"was begun with files of 32 samples; leave out --part-samples, or choose"):
        embed(shards, tmp_path / "out", part_samples=64)


def test_a_part_without_a_good_sample_is_an_empty_file(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "data"), S3Config())
    pack(shapes_source("all", 48, 24, 0), storage, PrepareConfig(output=storage.uri))
    shard = tmp_path / "data" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    shards = load_dataset(storage)
    start, end, _ = shards.byte_range(0, 16, 16)
    content[start:end] = bytes(end - start)
    shard.write_bytes(content)
    record = embed(shards, tmp_path / "out", part_samples=16, max_bad_fraction=0.5)
    assert record.skipped == {"damaged_shard": 16} and len(record.skipped_keys) == 16
    assert [part.rows for part in record.parts or ()] == [16, 0, 16]
    assert pq.read_table(tmp_path / "out")["sample"].to_pylist() == [*range(16), *range(32, 48)]
    # A file that is lost is written again, and the bad samples of the others are still known.
    (tmp_path / "out" / "part-000000000032-000000000048.parquet").unlink()
    assert embed(shards, tmp_path / "out", part_samples=16, max_bad_fraction=0.5) == record
    with pytest.raises(UserError, match=r"^16 of 48 samples of .* are unusable, more than max_bad_fraction 0.01"):
        embed(shards, tmp_path / "strict", part_samples=16)


@pytest.mark.slow
def test_small_work_needs_no_ray(shards: ShardSet, tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["ray"] = None
from pathlib import Path
import tests.unit.test_embedding as t
from crate_ray.data.format.dataset import load_dataset
from crate_ray.storage.interface import open_storage
t.embed(load_dataset(open_storage({shards.storage.uri!r}, t.S3Config())), Path({str(tmp_path / "out")!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"embedding {SAMPLES} samples × " in done.stderr and "GFLOP in this process (cpu)" in done.stderr
    assert len(vectors(tmp_path / "out")) == SAMPLES
