"""README's quickstart, command by command, on a folder of pictures. Only the model and the training are made small."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from crate_ray.config import S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.storage.interface import open_storage
from tests.jobs import ROOT, RayCluster, environment

pytestmark = pytest.mark.ray

SMALL = ["--training.steps", "4", "--training.batch-size", "8", "--model.image-size", "32", "--model.patch-size", "8",
         "--model.dim", "32", "--model.depth", "1", "--model.num-subspaces", "2", "--scaling.workers", "1"]  # fmt: skip


def quickstart() -> list[list[str]]:
    """Words of the commands in the first shell block under README's heading."""
    section = (ROOT / "README.md").read_text().split("## Quickstart")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.S)
    assert block is not None
    return [shlex.split(line) for line in block[1].splitlines()]


@pytest.mark.daily
@pytest.mark.timeout(900)
def test_the_quickstart_works_as_it_stands(small_ray: RayCluster, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(40):
        pixels = random.integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
    env = environment(tmp_path) | {"RAY_ADDRESS": small_ray.address, "PYTHONPATH": str(ROOT)}
    commands = quickstart()
    assert [words[:2] for words in commands] == [
        ["crate-ray", name] for name in ("prepare", "pretrain", "evaluate", "register", "embed")
    ]
    for _, name, *arguments in commands:
        small = SMALL if name == "pretrain" else []
        command = [sys.executable, "-m", "crate_ray", name, *arguments, *small]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    assert (tmp_path / "runs/mine/evaluation/report.html").stat().st_size > 10_000
    table = pq.read_table(tmp_path / "embeddings")
    packed = load_dataset(open_storage(str(tmp_path / "data/photos/train"), S3Config()))
    assert 30 < len(table) == packed.manifest.num_samples < 40
    assert set(table.column_names) == {"key", "name", "shard", "sample", "embedding"}
