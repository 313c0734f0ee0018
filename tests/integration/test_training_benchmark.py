"""The training benchmark reports every figure with torch alone, and says what it cannot measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crate_ray.config import CrateMAEConfig
from crate_ray.models.flops import reference_training_flops, training_flops
from tests.jobs import ROOT, environment

ABSENT = ("ray", "mlflow", "boto3", "botocore", "webdataset", "simplejpeg", "sklearn", "pandas", "pyarrow")


@pytest.mark.daily
def test_every_figure_on_a_machine_with_torch_only(tmp_path: Path) -> None:
    # Of the job and the processes that it starts: what is None cannot be found or imported.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    env = environment(tmp_path) | {"PYTHONPATH": tmp_path.as_posix(), "OMP_NUM_THREADS": "1"}
    probe = subprocess.run([sys.executable, "-c", "import ray"], env=env, capture_output=True, text=True)
    assert "ModuleNotFoundError" in probe.stderr

    file = tmp_path / "figures.json"
    settings = {
        "presets": "tiny", "precisions": "bf16", "image_size": 32, "batch_size": 2, "image_sizes": 48,
        "contestants": "crate_mae,plain,vit_mae_matched", "seconds": 0.1, "compile": "off", "device": "cpu",
        "peak_flops": 1e12, "json": file,
    }  # fmt: skip
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, (ROOT / "jobs" / "benchmark.py").as_posix(), "train", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "vit_mae_matched" in done.stdout
    assert '"failed"' not in file.read_text(), file.read_text()

    report = json.loads(file.read_text())
    found = report["presets"]["tiny"]["bf16"]
    ours, plain = found["crate_mae"], found["plain"]
    assert found["ratio_vs_plain"] == pytest.approx(ours["images_per_second"] / plain["images_per_second"])
    assert found["memory_vs_plain"] == pytest.approx(ours["peak_memory_bytes"] / plain["peak_memory_bytes"])
    assert ours["parameters"] == plain["parameters"]
    for run in (ours, plain):  # weights, two moments and gradients are in it, interpreter and torch are not
        assert 16 * run["parameters"] < run["peak_memory_bytes"] < run["process_bytes"] + 16 * run["parameters"]
    assert ours["mfu"] == pytest.approx(ours["flops"] / ours["step_seconds"] / 1e12)
    assert found["ratio_limit"] == pytest.approx(1e12 / ours["flops"] * plain["step_seconds"])
    assert report["peak_flops"] == {"bf16": 1e12}
    config = CrateMAEConfig(preset="tiny", image_size=32)
    assert (ours["flops"], plain["flops"]) == (training_flops(config, 2), reference_training_flops(config, 2))
    larger = report["image_sizes"]["48"]["crate_mae"]
    assert larger["flops"] == training_flops(CrateMAEConfig(preset="tiny", image_size=48), 1)
    assert report["machine"]["libraries"]["torch"] == torch.__version__


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    command = [sys.executable, (ROOT / "jobs" / "benchmark.py").as_posix(), "train"]
    cases = [(["--json", str(tmp_path / "no" / "file.json")], "cannot write")]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], "no GPU"))
    for arguments, problem in cases:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr
