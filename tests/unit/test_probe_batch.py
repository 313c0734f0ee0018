"""The probe of a model while it trains: measures by layer, pictures of the right size, and an unchanged model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from crate_ray.config import CrateMAEConfig, DataConfig, ModelConfig, PrepareConfig, ViTMAEConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.models import build_model
from crate_ray.models.exported import Normalizer
from crate_ray.runs.metrics import layer_measure
from crate_ray.storage.interface import open_storage
from crate_ray.storage.local import LocalStorage
from crate_ray.structure.layerwise import measure_layers
from crate_ray.training.probe_batch import MEASURES_FILE, ProbeBatch, ProbeResult
from crate_ray.training.profiling import StepProfile


@pytest.mark.parametrize(
    "config",
    [
        CrateMAEConfig(image_size=16, patch_size=4, dim=16, num_subspaces=2, depth=3),
        ViTMAEConfig(image_size=16, patch_size=4, dim=16, num_heads=2, depth=3, decoder_dim=16, decoder_depth=1,
                     decoder_num_heads=2),
    ],
)  # fmt: skip
def test_a_probe_measures_each_layer_and_leaves_the_model_as_it_was(config: ModelConfig, tmp_path: Path) -> None:
    settings = PrepareConfig(source="shapes", output=str(tmp_path / "data"))
    pack(shapes_source("all", 20, 24, 0), open_storage(settings.output, settings.s3), settings)
    shards = load_dataset(open_storage(settings.output, settings.s3))
    torch.manual_seed(0)
    model = build_model(config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    normalizer = Normalizer.of((0.5,) * 3, (0.2,) * 3)
    run = LocalStorage(tmp_path / "run")

    def open_probe() -> ProbeBatch:
        return ProbeBatch(shards, config, DataConfig(train="unused"), normalizer, run)

    def run_at(step: int, probe: ProbeBatch) -> ProbeResult:
        return probe.draw(probe.observe(model, step))

    probe = open_probe()
    first, second = run_at(0, probe), run_at(10, probe)
    assert first.metrics == second.metrics and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    means = measure_layers(model, normalizer(probe.images)).means()
    assert [first.metrics[layer_measure("coding_rate", i)] for i in (1, 2, 3)] == pytest.approx(means["rate_after"])
    assert [first.metrics[layer_measure("zero_share", i)] for i in (1, 2, 3)] == pytest.approx(means["zero_share"])
    assert len(first.metrics) == 4 * 3
    # Eight columns of 96 pixels and the gaps; three rows, and the image, the mean and two heads.
    sizes = {name: Image.open(io.BytesIO(png)).size for name, png in second.pictures.items()}
    assert sizes["reconstruction"] == (8 * 100 + 4, 3 * 100 + 4) and sizes["attention"] == (8 * 100 + 4, 4 * 100 + 4)
    assert set(sizes) == {"reconstruction", "attention", "layers"}
    assert second.pictures["reconstruction"] == first.pictures["reconstruction"]
    assert second.pictures["layers"] != first.pictures["layers"]  # one more line
    # A resumed run draws the steps before it, but not those that it makes again.
    assert run_at(10, open_probe()).pictures["layers"] == second.pictures["layers"]
    run.write(MEASURES_FILE, b"{")
    assert run_at(10, open_probe()).pictures["layers"] != second.pictures["layers"]


def test_steps_are_profiled_once(tmp_path: Path) -> None:
    run = LocalStorage(tmp_path / "run")
    (tmp_path / "space").mkdir()
    written = []
    with StepProfile((2, 3), run, tmp_path / "space", torch.device("cpu")) as profile:
        for step in range(1, 6):
            profile.before(step)
            torch.ones(4, 4).logdet()
            written.append(profile.after(step))
    assert [place is not None for place in written] == [False, False, True, False, False]
    table = run.read("profile/steps-2-3-rank-0.txt").decode()
    (row,) = (line for line in table.splitlines() if line.split()[:1] == ["aten::logdet"])
    assert row.split()[-1] == "2"  # calls
    assert run.read("profile/steps-2-3-rank-0.json.gz")[:2] == b"\x1f\x8b"
    assert not list((tmp_path / "space").iterdir())
