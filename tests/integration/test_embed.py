"""The embedding job on a real Ray: bad samples are skipped and listed, too many stop it with one sentence, and one
output has one writer."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from crate_ray.config import CrateMAEConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.evaluation.embedding_output import LEASE_FILE, RECORD_FILE
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model, load_exported
from crate_ray.serving import FeatureExtractor
from crate_ray.storage.interface import open_storage
from crate_ray.storage.lease import Lease
from tests.jobs import RayCluster, call, environment, job

pytestmark = pytest.mark.ray

MODEL = CrateMAEConfig(image_size=32, patch_size=8, dim=16, depth=2, num_subspaces=2)
NO_CLUSTER = {"RAY_ADDRESS": "http://127.0.0.1:1"}  # refused at once by a job that needs Ray
PHOTOS, DAMAGED = 60, (7, 8, 41)


def run(path: Path, name: str, *arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a job in a folder to its end."""
    done = call(job(name, *arguments), path, environment(path) | variables)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def ray(small_ray: RayCluster) -> dict[str, str]:
    """Environment of jobs that use the shared Ray."""
    return {"RAY_ADDRESS": small_ray.address}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, and photos with labels, a few of them damaged after they were indexed as good."""
    path = tmp_path_factory.mktemp("embed")
    random = np.random.default_rng(0)
    for i in range(PHOTOS):
        (path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(random.integers(0, 255, (40, 36, 3), np.uint8))
        picture.save(path / "photos" / "ab"[i % 2] / f"{i:02d}.png")
    run(path, "prepare", "--source", "photos", "--output", "packed", "--shuffle", "false")
    torch.manual_seed(0)
    manifest = load_dataset(open_storage(str(path / "packed"), S3Config())).manifest
    description = ModelDescription(model=MODEL, mean=manifest.mean, std=manifest.std, kind="image")
    export_model(path / "model", build_model(MODEL).state_dict(), description)
    return path


def damage(folder: Path, rows: tuple[int, ...], target: str) -> list[str]:
    """Another dataset, in which some samples are not what they should be. Returns their keys."""
    keys = []
    (folder / target).mkdir()
    with (
        tarfile.open(folder / "packed" / "shard-000000.tar") as source,
        tarfile.open(folder / target / "shard-000000.tar", "w") as out,
    ):
        for member in source:
            content = source.extractfile(member).read()  # type: ignore[union-attr]
            number = int(member.name.split(".")[0].split("/")[-1][-2:])
            if number in rows and member.name.endswith(".png"):
                content = content[:60] + bytes(len(content) - 60)
                keys.append(member.name.removesuffix(".png"))
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return keys


def test_bad_samples_are_skipped_and_listed(folder: Path, ray: dict[str, str]) -> None:
    shards = load_dataset(open_storage(str(folder / "packed"), S3Config()))
    # Bytes that change after the index was written are noticed by their digest: the 16 samples around them are lost.
    shard = folder / "packed" / "shard-000000.tar"
    good = shard.read_bytes()
    content = bytearray(good)
    at = content.index(b"IDAT", len(content) // 2)
    content[at + 40 : at + 60] = bytes(20)
    shard.write_bytes(bytes(content))
    arguments = ["--model", "model", "--data", "packed", "--output", "out", "--batch_size", "16", "--workers", "2"]
    refused = run(folder, "embed", *arguments, "--max_bad_fraction", "0.001", code=2, **ray)
    # Lines, since Ray's native code may report how an actor ended.
    assert sum(line.startswith("error: ") for line in refused.stderr.splitlines()) == 1
    assert "Traceback" not in refused.stderr
    assert f"of {PHOTOS} samples of" in refused.stderr and "max_bad_fraction 0.001 allows" in refused.stderr
    assert not json.loads((folder / "out" / RECORD_FILE).read_text())["complete"]

    said = run(folder, "embed", *arguments, "--max_bad_fraction", "0.02", **ray).stdout
    record = json.loads((folder / "out" / RECORD_FILE).read_text())
    assert record["complete"] and record["num_samples"] == PHOTOS and record["skipped"] == {"damaged_shard": 16}
    assert len(record["skipped_keys"]) == 16 and set(record["skipped_keys"].values()) == {"damaged_shard"}
    assert f"{PHOTOS - 16} embeddings of 16 numbers" in said and "16 bad samples (16 damaged_shard)" in said
    assert record["model"] == hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert not (folder / "out" / LEASE_FILE).exists()

    # The rows are what this process computes from the same samples.
    shard.write_bytes(good)
    table = pq.read_table(folder / "out").sort_by("sample")
    rows = table["sample"].to_numpy()
    assert len(rows) == len(set(rows)) == PHOTOS - 16
    batches = list(iterate_dataset(shards, MODEL))
    model, description = load_exported(folder / "model")
    extract = FeatureExtractor(model, description)
    keys = [key for batch in batches for key in batch.keys]
    assert table["key"].to_pylist() == [keys[row] for row in rows]
    assert np.array_equal(table["label"].to_numpy(), np.concatenate([batch.labels for batch in batches])[rows])
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    assert np.abs(vectors - np.concatenate([extract(batch.images).numpy() for batch in batches])[rows]).max() < 1e-5

    # The same command again finds them complete, and needs no Ray.
    again = run(folder, "embed", *arguments, **NO_CLUSTER).stdout
    assert f"{PHOTOS - 16} embeddings" in again and "16 bad samples" in again


def test_one_damaged_photo_is_skipped_by_default(folder: Path, ray: dict[str, str]) -> None:
    """Shards of unknown origin that were damaged before they were indexed: only the damaged rows are missing."""
    keys = damage(folder, DAMAGED, "foreign")
    assert len(keys) == len(DAMAGED)
    run(folder, "prepare", "--output", "foreign")
    embed = ["--model", "model", "--data", "foreign", "--output", "out2"]
    said = run(folder, "embed", *embed, **ray).stdout
    record = json.loads((folder / "out2" / RECORD_FILE).read_text())
    assert record["skipped_keys"].keys() == set(keys) and sum(record["skipped"].values()) == len(keys), record
    assert pq.read_table(folder / "out2").num_rows == PHOTOS - len(keys) and "3 bad samples" in said


def test_an_output_has_one_writer_and_is_not_the_dataset(folder: Path, ray: dict[str, str]) -> None:
    embed = ["--model", "model", "--data", "packed"]
    refused = run(folder, "embed", *embed, "--output", "./packed/", code=2, **NO_CLUSTER)
    assert "the folder of the dataset itself; choose another folder" in refused.stderr
    output = open_storage(str(folder / "out3"), S3Config())
    with Lease(output, LEASE_FILE, "the output", lease_seconds=2):
        busy = run(folder, "embed", *embed, "--output", "out3", code=2, **NO_CLUSTER)
        assert f"the output {output.uri} is in use by process" in busy.stderr
    assert not (folder / "out3" / RECORD_FILE).exists()
    run(folder, "embed", *embed, "--output", "out3", **ray)
    assert pq.read_table(folder / "out3").num_rows == PHOTOS
