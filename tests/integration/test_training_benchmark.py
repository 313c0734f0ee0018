"""The training benchmark: its plain model is ours, its operations are those that are done, and it needs only torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crate_ray.benchmarks.training import PlainCrateMAE
from crate_ray.config import CrateMAEConfig, ModelConfig, ViTMAEConfig
from crate_ray.models import CrateMAE, build_model
from crate_ray.models.flops import gpu_peak_flops, plain_training_flops, training_flops
from tests.jobs import ROOT, environment

SIZES: dict[str, Any] = {"image_size": (12, 16), "patch_size": 4, "channels": 2, "dim": 16, "depth": 3}
CRATE = CrateMAEConfig(**SIZES, decoder_depth=2, num_subspaces=4, subspace_dim=3)


@pytest.mark.parametrize("batch", [1, 3])  # fewer tokens than dimensions, and more: two forms of ISTA
def test_plain_model_is_ours(batch: int) -> None:
    torch.manual_seed(0)
    ours, plain = CrateMAE(CRATE).double(), PlainCrateMAE(CRATE).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    assert plain.load_state_dict(ours.state_dict())  # strict: the names are the same
    images, noise = torch.randn(batch, 2, 12, 16, dtype=torch.float64), torch.rand(batch, CRATE.num_patches)
    expected, found = plain(images, noise), ours(images, noise)
    torch.testing.assert_close(found.prediction, expected.prediction, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.sample_loss, expected.sample_loss, rtol=0, atol=1e-10)
    expected.sample_loss.mean().backward()
    found.loss.backward()
    for (name, left), right in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-10, msg=name)


SWITCHES: list[dict[str, Any]] = [
    {},
    {"attention": "linear"},
    {"output_map": "tied"},
    {"decoder_maps": "tied", "decoder_depth": 3},
    {"encoder_tokens": "visible"},
]
CONFIGS: list[ModelConfig] = [CrateMAEConfig(**{**CRATE.model_dump(), **switch}) for switch in SWITCHES]
CONFIGS.append(ViTMAEConfig(**SIZES, num_heads=4, decoder_dim=8, decoder_depth=1, decoder_num_heads=2, mlp_ratio=2.5))


def counted(model: torch.nn.Module, config: ModelConfig, batch: int) -> int:
    images, noise = torch.randn(batch, 2, 12, 16), torch.rand(batch, config.num_patches)
    # The counter knows no fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, noise).sample_loss.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 3])
def test_formula_counts_what_is_done(batch: int) -> None:
    for config in CONFIGS:
        assert training_flops(config, batch) == counted(build_model(config), config, batch), config
    assert plain_training_flops(CRATE, batch) == counted(PlainCrateMAE(CRATE), CRATE, batch)


def test_peaks_of_gpus() -> None:
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3") == gpu_peak_flops("NVIDIA H200") == 989e12
    assert gpu_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert gpu_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_peak_flops("Tesla T4") == 65e12
    assert gpu_peak_flops("NVIDIA L40S") == 362e12
    assert gpu_peak_flops("Some other card") is None


ABSENT = ("ray", "mlflow", "boto3", "botocore", "webdataset", "simplejpeg", "sklearn", "pandas", "pyarrow")


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
