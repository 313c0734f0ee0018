"""The probe of a model while it trains: measures by layer, pictures of the right size, and an unchanged training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crate_ray.config import CrateMAEConfig, DataConfig, ModelConfig, PrepareConfig, PretrainConfig, ViTMAEConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.models import build_model
from crate_ray.models.exported import Normalizer
from crate_ray.runs.metrics import layer_measure, learning_signal
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import open_storage
from crate_ray.storage.local import LocalStorage
from crate_ray.structure.layerwise import measure_layers
from crate_ray.structure.signals import measure_signals
from crate_ray.training import bare_loop
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.probe_batch import LAYER_METRICS, MEASURES_FILE, SIGNALS, ProbeBatch, ProbeResult
from crate_ray.training.profiling import StepProfile
from crate_ray.training.step import probe_noise
from tests.programs import recorded_programs

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "dim": 16}
VIT: dict[str, Any] = {
    **SMALL, "architecture": "vit_mae", "depth": 2, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1,
    "decoder_num_heads": 2,
}  # fmt: skip


@pytest.mark.slow
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
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    normalizer = Normalizer.of((0.5,) * 3, (0.2,) * 3)
    run = LocalStorage(tmp_path / "run")

    def open_probe() -> ProbeBatch:
        return ProbeBatch(shards, config, DataConfig(train="unused"), normalizer, run)

    def run_at(step: int, probe: ProbeBatch) -> ProbeResult:
        return probe.draw(probe.observe(model, step))

    probe, random = open_probe(), torch.get_rng_state()
    first, second = run_at(0, probe), run_at(10, probe)
    assert first.metrics == second.metrics and model.training and not model.checkpoint_layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    means = measure_layers(model, normalizer(probe.images)).means()
    assert [first.metrics[layer_measure("coding_rate", i)] for i in (1, 2, 3)] == pytest.approx(means["rate_after"])
    assert [first.metrics[layer_measure("zero_share", i)] for i in (1, 2, 3)] == pytest.approx(means["zero_share"])
    signals = measure_signals(model, normalizer(probe.images), probe_noise(np.arange(8), config.num_patches))
    expected = {
        learning_signal(name, place): getattr(part, name)[layer]
        for name in SIGNALS
        for place, part, layer in (
            ("first", signals.encoder, 0),
            ("last", signals.encoder, 2),
            ("decoder", signals.decoder, config.decoder_depth - 1),
        )
        if getattr(part, name)
    }
    assert {name: first.metrics[name] for name in expected} == expected
    assert len(first.metrics) == 4 * 3 + len(expected) and len(expected) in (13, 14)
    # Eight columns of 96 pixels and the gaps; three rows, and the image, the mean and two heads.
    sizes = {name: Image.open(io.BytesIO(png)).size for name, png in second.pictures.items()}
    assert sizes["reconstruction"] == (8 * 100 + 4, 3 * 100 + 4) and sizes["attention"] == (8 * 100 + 4, 4 * 100 + 4)
    assert set(sizes) == {"reconstruction", "attention", "layers", "signals"}
    assert second.pictures["reconstruction"] == first.pictures["reconstruction"]
    drawn = ("layers", "signals")
    assert all(second.pictures[name] != first.pictures[name] for name in drawn)  # one more line
    # A resumed run draws the steps before it, but not those that it makes again.
    again = run_at(10, open_probe())
    assert all(again.pictures[name] == second.pictures[name] for name in drawn)
    # Older runs have stored no signals: only the picture of the signals lacks their steps.
    stored = json.loads(run.read(MEASURES_FILE))
    kept = {step: {name: values[name] for name in LAYER_METRICS} for step, values in stored.items()}
    run.write(MEASURES_FILE, json.dumps(kept).encode())
    again = run_at(10, open_probe())
    assert [again.pictures[name] == second.pictures[name] for name in drawn] == [True, False]
    run.write(MEASURES_FILE, b"{")
    assert run_at(10, open_probe()).pictures["layers"] != second.pictures["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("given", [SMALL | {"depth": 2, "num_subspaces": 2}, VIT], ids=["crate", "vit"])
def test_a_collapsed_model_is_reported_once(given: dict[str, Any], tmp_path: Path) -> None:
    settings = PrepareConfig(source="shapes", output=str(tmp_path / "data"))
    pack(shapes_source("all", 20, 24, 0), open_storage(settings.output, settings.s3), settings)
    config = (ViTMAEConfig if "architecture" in given else CrateMAEConfig).model_validate(given)
    shards = load_dataset(open_storage(settings.output, settings.s3))
    probe = ProbeBatch(shards, config, DataConfig(train="unused"), Normalizer.of((0.5,) * 3, (0.2,) * 3))
    torch.manual_seed(0)
    model = build_model(config)
    sound = probe.observe(model, 5)
    last: Any = model.encoder[-1]
    with torch.no_grad():  # one large vector is added to every token
        bias = (last.mssa.output if isinstance(config, CrateMAEConfig) else last.attention_output).bias
        bias.copy_(1e6 * torch.randn(16))
    collapsed = probe.observe(model, 10)
    assert [probe.draw(seen).notes for seen in (collapsed._replace(step=0), sound)] == [(), ()]
    (text,) = probe.draw(collapsed).notes
    assert "mean cosine 1.000, effective rank 1.0" in text and "a lower optim.lr" in text
    assert ("model.residual all" in text) == isinstance(config, CrateMAEConfig)
    assert probe.draw(collapsed._replace(step=15)).notes == ()


class Probed(PretrainTask):
    """Is probed every second step, also where no pictures are made."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.probe_every = 2


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("model", "training"),
    [
        (SMALL | {"depth": 2, "num_subspaces": 2}, {"compile": "layers"}),
        (SMALL | {"depth": 2, "num_subspaces": 2}, {"precision": "bf16", "activation_checkpointing": True}),
        (VIT, {"micro_batch_size": 2}),
    ],
    ids=["compiled", "bf16", "vit"],
)
def test_probes_do_not_change_the_training(
    model: dict[str, Any], training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = PrepareConfig(source="shapes", output=str(tmp_path / "shapes"))
    pack(shapes_source("all", 20, 24, 0), open_storage(prepared.output, prepared.s3), prepared)
    config = PretrainConfig.model_validate(
        {
            "storage": str(tmp_path),
            "data": {"train": prepared.output},
            "model": model,
            "training": {"steps": 3, "batch_size": 4, "precision": "fp32", "compile": "off"} | training,
            "optim": {"lr": 1e-2},
        }
    )
    run = open_run(config)
    results = []
    for task in (PretrainTask, Probed):
        programs, listener = recorded_programs(monkeypatch), Listener()
        weights = bare_loop.train(task, config, run.record, run.total_steps, listeners=[listener]).weights
        results.append((weights, torch.get_rng_state(), len(programs), listener.probed))
    (expected, random, compiled, _), (weights, *rest, probed) = results
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(rest[0], random) and rest[1] == compiled == 2 * ("compile" in training)
    assert [step for step, _ in probed] == [0, 2, 3]
    assert probed[0] != probed[-1]


class Listener:
    """Receives the events of a run, and keeps a signal of each probe."""

    def __init__(self) -> None:
        self.probed: list[tuple[int, float]] = []

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        if (name := learning_signal("gradient_norm", "first")) in values:
            self.probed.append((step, values[name]))

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


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
