"""The package that people install: the sdist and the wheel made from it hold everything, and the command runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build an sdist or a wheel as pip does, with the setuptools that is installed."""
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the sdist, made from a copy of the repository."""
    out = tmp_path_factory.mktemp("dist")
    tree = out / "repository"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("crate_ray", "jobs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    sdist = build("sdist", tree, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    return build("wheel", unpacked, out)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, without what it depends on."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def crate_ray(installed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command, away from the repository."""
    env = {"PYTHONPATH": str(installed), "PATH": os.environ["PATH"], "HOME": str(cwd)}
    command = [str(installed / "bin" / "crate-ray"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_wheel_holds_every_module_and_the_examples(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("crate_ray/")}
    suffixes = {".py", ".j2", ".typed"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "crate_ray").rglob("*") if p.suffix in suffixes}
    modules |= {"crate_ray/py.typed"}
    examples = {f"crate_ray/configs/{path.name}" for path in (ROOT / "jobs/configs").glob("*.yaml")}
    assert names == modules | examples


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    shown = crate_ray(installed, "--help", cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: crate-ray COMMAND"), shown.stderr
    assert "cifar10 " in crate_ray(installed, "configs", cwd=tmp_path).stdout
    example = crate_ray(installed, "configs", "cifar10", cwd=tmp_path).stdout
    assert example == (ROOT / "jobs/configs/cifar10.yaml").read_text()
    wrong = crate_ray(installed, "pretrain", "--config", "cifar10.yaml", "--training.batch-size", "0", cwd=tmp_path)
    assert wrong.returncode == 2
    note, error = wrong.stderr.splitlines()
    assert f"{installed}/crate_ray/configs/cifar10.yaml" in note
    assert error.startswith("error: setting 'training.batch_size' is '0'")


@pytest.mark.daily
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_a_clean_environment_pretrains_on_a_folder_of_images(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([*pip, torch, str(wheel)], check=True)
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"photos/{number}.jpg")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_ADDRESS": "local"}
    command = [str(tmp_path / "venv/bin/crate-ray"), "pretrain", "--data", "photos", "--training.steps", "4"]
    settings = ["--model.dim", "32", "--model.num-subspaces", "2", "--model.depth", "1"]
    done = subprocess.run([*command, *settings], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("data      54 images, 6 held out for validation")
    assert (tmp_path / "runs/photos/model/model.safetensors").exists()
