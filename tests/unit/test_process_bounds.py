"""Any file of up to 16 MB, given to a job, ends within a minute of one CPU and 3 GiB of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crate_ray.config import CrateMAEConfig
from crate_ray.models import CrateMAE
from crate_ray.models.exported import ModelDescription, export_model
from tests.unit.test_hostile_models import HEADERS, published
from tests.unit.test_hostile_shards import TARS, with_checksums

SECONDS, GIB = 60.0, 3.0
"""Of CPU time, and beyond what the process has after its imports."""


def make_models(folder: Path) -> None:
    config = CrateMAEConfig(image_size=8, patch_size=4, dim=16, depth=2, num_subspaces=2)
    description = ModelDescription(model=config, mean=(0.5,) * 3, std=(0.25,) * 3, kind="image")
    changes = {
        "wide": {"dim": 40_000, "subspace_dim": 20_000},
        "deep": {"depth": 10**9, "decoder_depth": 10**9},
        "large": {"image_size": 400_000},
    }
    for name, change in changes.items():
        export_model(folder / name, CrateMAE(config).state_dict(), description)
        values = json.loads((folder / name / "model.json").read_text())
        values["model"] |= change
        (folder / name / "model.json").write_text(json.dumps(values))
    for number, content in enumerate(HEADERS.values()):
        export_model(folder / f"header {number}", {}, description)
        (folder / f"header {number}/model.safetensors").write_bytes(content)
    expanded = torch.zeros(1, 1, 1).expand(1, 10**12 + 1, 384)
    torch.save(published(decoder_pos_embed=expanded), folder / "expanded.pth")
    torch.save(published(decoder_pos_embed=torch.zeros(1, 1000**2 + 1, 1)), folder / "long.pth")


@pytest.mark.daily
def test_jobs_on_hostile_files_stay_within_their_bounds(tmp_path: Path) -> None:
    for number, shard in enumerate(TARS.values()):
        folder = tmp_path / f"tars/{number:02d}"
        folder.mkdir(parents=True)
        (folder / "x.tar").write_bytes(with_checksums(shard) + bytes(1024))
    (tmp_path / "models").mkdir()
    make_models(tmp_path / "models")
    command = [sys.executable, "-m", "tests.hostile_jobs", str(tmp_path), str(GIB)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == 0, f"{lines[-1] if lines else ''}: {result.stderr[-3000:]}"
    done = [line for line in lines if "job" in line]
    assert len(done) > 50 and len(done) == len(lines) / 2
    assert not [line for line in done if line["seconds"] > SECONDS or "\n" in line["message"]]
    assert all(line["message"] for line in done if line["job"].startswith("load"))
    assert not [line for line in done[:5] if line["message"]], "those on pictures and grids go on"
    assert "Traceback" not in result.stderr and "not enough memory" not in result.stderr
