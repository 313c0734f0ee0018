"""The benchmarks of data loading, of the order and of Ray Train's overhead use separate processes, and report every
documented figure."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crate_ray.benchmarks.data_loading import Measurement, entropy_floor
from crate_ray.cli import parse_config
from crate_ray.config import BenchmarkDataConfig, PrepareConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import open_source
from crate_ray.errors import UserError
from crate_ray.storage.local import LocalStorage
from tests.jobs import environment, job


@pytest.mark.daily
def test_every_figure_of_both_loaders(tmp_path: Path) -> None:
    shapes, file = tmp_path / "shapes", tmp_path / "figures.json"
    manifest = pack(
        shapes_source("all", 60, 48, 0),
        LocalStorage(shapes),
        PrepareConfig(source="shapes", output=str(shapes), shard_samples=20),
    )
    settings = ["--seconds", "0.3", "--repeats", "1", "--image_size", "32", "--batch_size", "8", "--processes", "1,2"]
    data = ["--data", f"originals={shapes}", "--data", f"again={shapes}"]
    done = subprocess.run(
        [*job("benchmark", "data"), *data, *settings, "--json", str(file)],
        env=environment(tmp_path), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "originals" in done.stdout and "webdataset" in done.stdout

    report = json.loads(file.read_text())
    stock = report["datasets"]["originals"]["webdataset"]["images_per_second"]
    for found in report["datasets"].values():
        runs = [Measurement.model_validate(run) for run in found["runs"]]
        expected = [("crate_ray", 1), ("webdataset", 1), ("webdataset", 2), ("spdl", 1), ("litdata", 1), ("litdata", 2)]
        assert [(r.contestant, r.processes) for r in runs] == [e for e in expected if e[0] not in found["unavailable"]]
        assert all(name in reason for name, reason in found["unavailable"].items())
        assert found["floor_images_per_second"] is found["share_of_floor"] is None  # images that are decoded together
        for run in runs:
            assert run.images_per_second > 0 and run.first_batch_seconds > 0
            assert run.images_per_second == pytest.approx(run.images_per_second_per_core * report["machine"]["cores"])
            per_image = manifest.total_bytes / manifest.num_samples
            assert run.bytes_per_second == pytest.approx(run.images_per_second * per_image)
        # Two loader processes hold at least one process' libraries more than one does.
        memory = [run.peak_memory_bytes or 0 for run in runs]
        assert memory[2] > memory[1] + 2**25 > memory[0] / 4
        ours, best = found["crate_ray"], found["webdataset"]
        assert best["images_per_second"] == max(run.images_per_second for run in runs[1:3])
        assert found["ratio_on_same_data"] == pytest.approx(ours["images_per_second"] / best["images_per_second"])
        assert found["ratio_vs_webdataset"] == pytest.approx(ours["images_per_second"] / stock)
    assert report["ratio_vs_webdataset"] == report["datasets"]["originals"]["ratio_vs_webdataset"]
    assert report["settings"]["batch_size"] == 8 and report["machine"]["libraries"]["webdataset"]


def test_the_floor_is_that_of_large_jpegs(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 200, 180, 3), np.uint8)
    floors = {}
    for suffix in ("jpg", "png"):
        source, output = tmp_path / suffix, tmp_path / f"{suffix}-packed"
        source.mkdir()
        for number, pixels in enumerate(noise):
            Image.fromarray(pixels).save(source / f"{number}.{suffix}")
        packing = PrepareConfig(source=str(source), output=str(output))
        pack(open_source(LocalStorage(source)), LocalStorage(output), packing)
        floors[suffix] = entropy_floor(load_dataset(LocalStorage(output)), 64)
    assert floors["png"] is None
    # Each image has 180 kB of codes or so; the fastest machines read a few hundred MB of them in a second.
    assert floors["jpg"] is not None and 10 < floors["jpg"] < 10_000 * (os.cpu_count() or 1)


def test_the_order_benchmark_measures_planning_and_mixing(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = {"num_shards": 2000, "shard_samples": 50, "sample_bytes": 2048, "classes": 60, "class_samples": 200}
    settings = {**sizes, "batch_size": 64, "workers": 4, "buffer_bytes": 2**23, "json": file}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [*job("benchmark", "order"), *arguments]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "100,000 samples in 2,000 shards" in done.stdout, done.stderr
    report = json.loads(file.read_text())
    assert 0 < report["planning"]["plan_seconds"] < 60 and report["planning"]["window_bytes"] > 0
    found = report["distinct_classes"]
    # The workers hold more than the whole set of 12,000 samples; stock reads 16 shards at a time.
    assert found["stock"] <= found["ours"] and abs(found["ours"] - found["uniform"]) < 5
    assert found["uniform"] == pytest.approx(60 * (1 - (1 - 1 / 60) ** 64), rel=0.1)


@pytest.mark.daily
def test_a_thousand_million_samples_are_planned_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [*job("benchmark", "order"), "--json", str(file)]
    environ = environment(tmp_path) | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "1,000,000,000 samples in 1,000,000 shards" in done.stdout, done.stderr
    report = json.loads(file.read_text())
    # The index alone takes 500 MB: it is mapped, not read.
    assert report["planning"]["own_memory_bytes"] < 200e6
    assert report["planning"]["plan_seconds"] < 30  # a second, but where other tests take the machine's time
    # A batch of 4096 of 1000 classes that lie one after the other; shuffled evenly it has 982 of them.
    found = report["distinct_classes"]
    assert found["ours"] > 800 > 10 * found["stock"] and found["uniform"] == pytest.approx(982, abs=4)


@pytest.mark.daily
def test_the_overhead_benchmark_compares_a_job_with_torchrun(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    settings = {
        "model.image_size": 8, "model.patch_size": 4, "model.dim": 8, "model.depth": 1, "model.num_subspaces": 2,
        "samples": 40, "batch_size": 4, "workers": 1, "cpus_per_worker": 1, "steps": 8, "log_every": 2, "rounds": 1,
        "checkpoint_preset": "tiny", "checkpoint_batch_size": 1, "json": file,
    }  # fmt: skip
    command = job("benchmark", "overhead", *(f"--{name}={value}" for name, value in settings.items()))
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    medians = {name: statistics.median(seconds) for name, seconds in report["intervals"].items()}
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in report["intervals"].values())  # not the first of 4
    assert report["step_seconds"] == medians
    assert report["ray_overhead"] == pytest.approx(medians["ray_train"] / medians["torchrun"] - 1)
    assert 0 <= report["data_wait_share"] < 1 and 0 < report["logging_share"] < 1
    assert 0 < report["beside_share"] < 1 and f"{report['beside_share']:.2%}" in done.stdout
    assert report["machine"]["libraries"]["torch"]
    saved = report["checkpoint"]
    assert saved["preset"] == "tiny" and 0 < saved["blocking_seconds"] < 60 and 0 < saved["background_seconds"] < 60
    assert saved["share"] == pytest.approx(saved["lost_seconds"] / (500 * saved["step_seconds"]))
    assert all(f"{report[share]:.2%}" in done.stdout for share in ("data_wait_share", "logging_share"))
    assert f"{report['ray_overhead']:+.2%}" in done.stdout


def test_what_the_user_can_mend_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data is given twice; give all values at once, as --data FIRST,SECOND"):
        parse_config(BenchmarkDataConfig, ["--data", "a=x", "--data", "a=y"])
    with pytest.raises(UserError, match="'a' twice"):
        parse_config(BenchmarkDataConfig, ["--data", "a=x,a=y"])
    assert parse_config(BenchmarkDataConfig, ["--data", "s3://b/x"]).datasets == {"s3://b/x": "s3://b/x"}
    for arguments, problem in (
        (["--data", str(tmp_path / "none")], "no manifest"),
        (["--data", str(tmp_path), "--json", str(tmp_path / "no" / "folder.json")], "cannot write"),
    ):
        done = subprocess.run([*job("benchmark", "data"), *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.daily
def test_servers_of_a_model_are_measured_and_their_answers_compared(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    file = tmp_path / "figures.json"
    settings = ["--seconds", "0.3", "--repeats", "2", "--clients", "1,3", "--picture-side", "64", "--batch-size", "4"]
    done = subprocess.run(
        [*job("benchmark", "serve"), *settings, "--json", str(file)],
        env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "plain calls of 4 pictures" in done.stdout and "mlflow models serve, JSON" in done.stdout
    report = json.loads(file.read_text())
    assert set(report["in_process"]) == {"1", "4"}
    assert all(set(report[name]) == {"1", "3"} for name in ("crate_ray_bytes", "crate_ray_json", "mlflow_json"))
    for found in [report["in_process"]["1"], report["in_process"]["4"], *report["mlflow_json"].values()]:
        assert found["images_per_second"] > 0 and 0 < found["p50_seconds"] <= found["p99_seconds"]
