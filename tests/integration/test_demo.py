"""The demo from packing to the printed result, with few samples and steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.jobs import RayCluster, call, environment

DEMO = """
import sys
from crate_ray.cli import parse_config
from crate_ray.config import PretrainConfig
from crate_ray.jobs.demo import main
main(parse_config(PretrainConfig, ["--config", "demo.yaml", *sys.argv[1:]]), num_samples=200)
"""
pytestmark = pytest.mark.ray

SETTINGS = ["--training.steps", "4", "--scaling.workers", "1", "--model.dim", "32", "--training.batch_size", "16"]


def demo(folder: Path, address: str) -> str:
    """Run the demo in a folder, on a Ray cluster; what it prints."""
    script = folder / "small_demo.py"
    script.write_text(DEMO)
    done = call([sys.executable, str(script), *SETTINGS], folder, environment(folder) | {"RAY_ADDRESS": address})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_demo_packs_trains_and_ends_with_the_result(tmp_path: Path, small_ray: RayCluster) -> None:
    said = demo(tmp_path, small_ray.address)
    assert "shapes-train: 160 images, 48×48, 6 classes" in said
    result = said[said.index("Which shape") :].splitlines()
    assert "40 held-out images" in result[1]
    encoders = ["trained CRATE-MAE", "untrained CRATE-MAE", "raw pixels averaged to 16 × 16"]
    assert [line.split("  ")[0] for line in result[3:6]] == encoders
    report = tmp_path / "demo" / "runs" / "shapes" / "evaluation" / "report.html"
    assert any(line.split() == ["report", str(report)] for line in result) and report.stat().st_size > 100_000


@pytest.mark.daily
def test_a_second_start_needs_no_ray_and_ends_with_the_same_result(tmp_path: Path, small_ray: RayCluster) -> None:
    first, second = demo(tmp_path, small_ray.address), demo(tmp_path, "http://127.0.0.1:1")
    assert first[first.index("Which shape") :] == second[second.index("Which shape") :]
