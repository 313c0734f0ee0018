"""The evaluation job as people run it: Ray tasks for features, their cache, the report, and the run in MLflow."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from crate_ray.config import CrateMAEConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.extraction import Extraction
from crate_ray.evaluation.feature_cache import FeatureCache
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model, load_exported
from crate_ray.runs.mlflow_lookup import RUN_KEY_TAG
from crate_ray.serving import FeatureExtractor, FeaturePoint
from crate_ray.storage.interface import open_storage
from tests.jobs import RayCluster, call, environment, job

pytestmark = pytest.mark.ray

MODEL = CrateMAEConfig(image_size=32, patch_size=8, dim=16, depth=2, num_subspaces=2)
NO_CLUSTER = {"RAY_ADDRESS": "http://127.0.0.1:1"}  # refused at once by a job that needs Ray


@pytest.fixture(scope="module")
def ray(small_ray: RayCluster) -> dict[str, str]:
    """Environment of jobs that use the shared Ray."""
    return {"RAY_ADDRESS": small_ray.address}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes for training and test, a model with random weights, and the MLflow run that it says it comes from."""
    path = tmp_path_factory.mktemp("evaluate")
    for split in ("train", "test"):
        run(path, "prepare", "--source", "shapes", "--num_samples", "200", "--image_size", "40", "--split", split,
            "--output", split)  # fmt: skip
    torch.manual_seed(0)
    manifest = load_dataset(open_storage(str(path / "train"), S3Config())).manifest
    description = ModelDescription(
        model=MODEL, mean=manifest.mean, std=manifest.std, kind="image", run_key="1" * 32, step=30
    )
    export_model(path / "model", build_model(MODEL).state_dict(), description)
    client = mlflow.MlflowClient(f"sqlite:///{path}/mlflow.db")
    experiment = client.create_experiment("it", artifact_location=(path / "artifacts").as_uri())
    client.create_run(experiment, tags={RUN_KEY_TAG: "1" * 32})
    return path


def run(path: Path, name: str, *arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a job in a folder to its end."""
    done = call(job(name, *arguments), path, environment(path) | variables)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_report_features_cache_and_mlflow(folder: Path, ray: dict[str, str]) -> None:
    settings = ["--model", "model", "--probe.train", "train", "--probe.test", "test", "--data", "test",
                "--masks", "test", "--max_images", "24", "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]  # fmt: skip
    said = run(folder, "evaluate", *settings, **ray).stdout
    page = folder / "model" / "evaluation" / "report.html"
    assert f"report     {page}" in said
    first = json.loads(page.with_name("report.json").read_text())
    assert not first["left_out"] and first["classification"]["test_samples"] == 40
    assert set(first["classification"]["encoders"]) == {"trained", "untrained", "pixels"}
    assert len(first["classification"]["encoders"]["trained"]["layers"]) == 6
    assert first["structure"]["images"] <= 24 and len(first["segmentation"]["encoders"]) == 2
    assert page.read_text().count("data:image/") == 11

    # MLflow has the numbers and the page.
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("it")
    assert experiment is not None
    (record,) = client.search_runs([experiment.experiment_id])
    probe = first["classification"]["encoders"]["trained"]["standard"]["linear"]
    (accuracy,) = (v for n, v in record.data.metrics.items() if n.endswith("/probe_accuracy_encoder"))
    assert accuracy == probe["accuracy"]
    (dataset,) = client.list_artifacts(record.info.run_id, "evaluation")
    (step,) = client.list_artifacts(record.info.run_id, dataset.path)
    logged = {Path(f.path).name for f in client.list_artifacts(record.info.run_id, step.path)}
    assert logged == {"report.html", "report.json"}

    # Ray's tasks computed what this process computes.
    model, description = load_exported(folder / "model")
    shards = load_dataset(open_storage(str(folder / "test"), S3Config()))
    cache = FeatureCache(folder / "cache" / "crate-ray" / "features", 2**30)
    points = [FeaturePoint("cls", 1), FeaturePoint("mean", None)]
    kept = Extraction(cache, S3Config()).encoder(EvaluatedModel("trained", model, description), shards, points, 10_000)
    extract = FeatureExtractor(model, description)
    batches = list(iterate_dataset(shards, MODEL))
    for i, found in enumerate(kept):
        own = np.concatenate([extract.pooled(batch.images, points)[i].numpy() for batch in batches])
        assert np.abs(found.features - own).max() < 1e-5
        assert np.array_equal(found.labels, np.concatenate([batch.labels for batch in batches]))

    # A second evaluation needs no Ray: it reads the cache, and finds the same. Other weights are not in it.
    run(folder, "evaluate", *settings, "--output", "again", **NO_CLUSTER)
    second = json.loads((folder / "again" / "report.json").read_text())
    assert second["classification"] == first["classification"] and second["structure"] == first["structure"]
    with torch.no_grad():
        model.encoder_norm.bias[0] += 0.1
    export_model(folder / "other", model.state_dict(), description)
    refused = run(folder, "evaluate", "--model", "other", *settings[2:], code=2, **NO_CLUSTER)
    assert refused.stderr.count("error: RAY_ADDRESS is http") == 1


def test_samples_that_cannot_be_decoded_are_left_out_or_stop_the_job(folder: Path, ray: dict[str, str]) -> None:
    pictures = folder / "pictures"
    for label in ("a", "b"):
        (pictures / label).mkdir(parents=True)
    model = ["--model", "model", "--all_layers", "false", "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]
    random = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(pictures / "ab"[i % 2] / f"{i}.png")
    run(folder, "prepare", "--source", "pictures", "--output", "packed")
    shard = folder / "packed" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"IDAT")
    content[at + 40 : at + 60] = bytes(20)
    shard.write_bytes(bytes(content))
    refused = run(folder, "evaluate", *model, "--probe.train", "packed", "--probe.test", "packed", code=2, **ray)
    assert "of 40 samples of" in refused.stderr and "are unusable" in refused.stderr


@pytest.mark.daily
@pytest.mark.timeout(900)
def test_a_comparison_is_the_same_on_ray_and_alone_and_measures_nothing_twice(
    folder: Path, ray: dict[str, str]
) -> None:
    (folder / "base.yaml").write_text(
        "model: {image_size: 16, patch_size: 4, dim: 16, depth: 2, num_subspaces: 2}\n"
        "data: {train: train, validation: test}\n"
        "training: {steps: 20, batch_size: 16}\n"
        "scaling: {workers: 1, cpus_per_worker: 1}\n"
    )
    (folder / "tune.yaml").write_text(
        "pooling: mean\ntraining: {steps: 10, batch_size: 16}\noptim: {lr: 0.01}\naugment: {randaugment: 0}\n"
        "scaling: {workers: 1, cpus_per_worker: 1}\n"
    )
    (folder / "compare.yaml").write_text(
        "base: base.yaml\nseeds: [3]\nbaselines: false\nfinetune: tune.yaml\nfinetune_settings: {training.steps: 12}\n"
        f"probe: {{train: train, test: test}}\ntracking: {{uri: 'sqlite:///{folder}/mlflow.db', experiment: compare, "
        "log_every: 2}\n"
    )

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / f"runs/{name}/comparison.json").read_text())

    def table(name: str) -> dict[str, Any]:
        return read(name)["variants"]

    command = ["compare", "--config", "compare.yaml"]
    run(folder, "evaluate", *command, **ray)
    found = table("compare")
    assert list(found) == ["crate-mae"]
    (figures,) = found["crate-mae"]["runs"]
    weights = build_model(CrateMAEConfig.model_validate(found["crate-mae"]["model"])).state_dict()
    load_exported(folder / "runs/compare/crate-mae-seed-3/model")[0].load_state_dict(weights)  # of the same shapes
    assert 0 < figures["loss"] < 10 and figures["images_per_second"] > 0 and figures["memory_bytes"] > 2**20
    accuracies = ("probe", "probe_best", "probe_untrained", "knn", "knn_best", "knn_untrained", "finetuned", "scratch")
    assert all(0 <= figures[measure] <= 1 for measure in accuracies)
    assert found["crate-mae"]["intervals"]["finetuned"][0] == figures["finetuned"]
    # Nothing is trained again, nothing is measured again.
    run(folder, "evaluate", *command, **NO_CLUSTER)
    assert table("compare") == found
    # With other settings, it is not taken for the same; nor is a run that something else trained.
    other = run(folder, "evaluate", *command, "--settings", '{"training.steps": 30}', code=2, **NO_CLUSTER)
    assert "was measured with training.steps 20, not 30; give the comp" in other.stderr
    for file in (folder / "runs/compare/figures").iterdir():
        file.unlink()
    other = run(folder, "evaluate", *command, code=2, **NO_CLUSTER)
    assert "'crate-mae-seed-3' is finished, but the comparison has no metrics of its last step" in other.stderr

    # What runs on a machine without Ray and MLflow finds the same.
    (folder / "absent").mkdir()
    absent = {"ray": None, "mlflow": None}
    (folder / "absent" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({absent})\n")
    bare = environment(folder) | {"PYTHONPATH": str(folder / "absent")}
    pack = ["--source", "digits", "--output", "packed-without-ray"]
    for words in (("prepare", *pack), ("evaluate", *command, "--launcher", "none", "--name", "alone")):
        done = subprocess.run(job(*words), cwd=folder, env=bare, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    assert "fine-tuned" in done.stdout and "from scratch" in done.stdout and "| raw pixels |" in done.stdout
    assert read("alone")["pixels"] == read("compare")["pixels"] and 0 < read("alone")["pixels"]["probe"] <= 1
    (same,) = table("alone")["crate-mae"]["runs"]
    assert same["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    assert {name: same[name] for name in accuracies} == {name: figures[name] for name in accuracies}
