"""A trained model takes images of another size: the weights stay, and positions are interpolated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import crate_ray
from crate_ray.config import CrateMAEConfig, EvaluateConfig, FinetuneConfig, PrepareConfig, ViTMAEConfig
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.prepare.builtin import digits_source, shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.evaluation.job import run_evaluation
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.models import CrateMAE, ViTMAE, build_model
from crate_ray.models.exported import ModelDescription, export_model, load_exported
from crate_ray.models.patches import sincos_positions
from crate_ray.models.resolution import at_image_size
from crate_ray.storage.interface import open_storage
from crate_ray.training.bare_loop import train

CRATE: dict[str, Any] = {"image_size": (8, 12), "patch_size": 2, "dim": 16, "num_subspaces": 2, "depth": 2}
MODELS = {
    "crate": CrateMAEConfig(**CRATE),
    "visible": CrateMAEConfig(**CRATE, encoder_tokens="visible"),
    "learned": CrateMAEConfig(**CRATE, positions="learned", encoder_tokens="visible"),
    "vit": ViTMAEConfig(image_size=(8, 12), patch_size=2, dim=16, depth=2, num_heads=2),
}


def described(config: CrateMAEConfig | ViTMAEConfig) -> tuple[CrateMAE | ViTMAE, ModelDescription]:
    torch.manual_seed(0)
    channels = config.channels
    description = ModelDescription(model=config, mean=(0.5,) * channels, std=(0.25,) * channels, kind="image")
    return build_model(config).eval(), description


def test_positions_are_computed_between_those_of_the_training() -> None:
    trained = sincos_positions(8, (4, 6))
    assert torch.equal(sincos_positions(8, (4, 6), (4, 6)), trained)
    columns = sincos_positions(8, (8, 18), (4, 6)).unflatten(1, (8, 18))[0, 0, :, :4].double().numpy()
    places = (np.arange(18) + 0.5) / 3 - 0.5
    np.testing.assert_allclose(places[1::3], np.arange(6))  # every third patch lies on one of the training
    waves = [wave(places[:, None] * np.array([1, 0.01])) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(columns, np.concatenate(waves, 1), atol=1e-6)
    # Slow waves differ little from their linear interpolation.
    grid = trained.transpose(1, 2).unflatten(2, (4, 6))[:, [1, 3, 5, 7]]
    linear = F.interpolate(grid, size=(8, 12), mode="bilinear").flatten(2).transpose(1, 2)
    found = sincos_positions(8, (8, 12), (4, 6))[..., [1, 3, 5, 7]]
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    torch.testing.assert_close(found[:, inside.flatten()], linear[:, inside.flatten()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_images_of_another_size_and_back(name: str, tmp_path: Path) -> None:
    model, description = described(MODELS[name])
    assert at_image_size(model, description, (8, 12)) == (model, description)
    larger, theirs = at_image_size(model, description, (16, 32))
    assert not larger.training and larger.grid_hw == (8, 16) and theirs.model.image_hw == (16, 32)
    for parameter, value in larger.named_parameters():
        assert parameter == "positions" or torch.equal(value, model.get_parameter(parameter))
    images = torch.randn(2, 3, 16, 32)
    assert theirs.model.position_grid == (4, 6)
    for own, width in ((larger.positions, 16), (larger.decoder_positions, 16)):
        if own is not None and not isinstance(own, torch.nn.Parameter):
            assert torch.equal(own, sincos_positions(width, (8, 16), (4, 6)))
    out = larger(images, torch.rand(2, 128))
    assert out.prediction.shape == (2, 128, 12) and out.loss.isfinite()
    export_model(tmp_path, larger.state_dict(), theirs)
    again, read = load_exported(tmp_path)
    assert read == theirs and torch.equal(again.encode(images).tokens, larger.encode(images).tokens)
    back, ours = at_image_size(larger, theirs, (8, 12))
    assert ours == description
    if name == "learned":
        assert larger.positions.shape == (1, 128, 16)
        torch.testing.assert_close(back.positions.std(), model.positions.std(), rtol=0.5, atol=0)
    else:
        small = torch.randn(2, 3, 8, 12)
        assert torch.equal(back.encode(small).tokens, model.encode(small).tokens)
    with pytest.raises(UserError, match=r"cannot take images of size 15: image height 15 is not divisible by patch"):
        at_image_size(model, description, 15)


def test_load_model_gives_a_model_for_that_size(tmp_path: Path) -> None:
    model, description = described(MODELS["vit"])
    export_model(tmp_path, model.state_dict(), description)
    larger = crate_ray.load_model(str(tmp_path), image_size=(16, 32))
    pictures = [np.zeros((40, 80, 3), np.uint8)] * 2
    assert larger.preprocess(pictures).shape == (2, 3, 16, 32)


@pytest.fixture
def shapes(tmp_path: Path) -> ShardSet:
    config = PrepareConfig(source="shapes", output=str(tmp_path / "shapes"))
    pack(shapes_source("all", 12, 32, 0), open_storage(config.output, config.s3), config)
    return load_dataset(open_storage(config.output, config.s3))


def test_an_evaluation_at_another_size_has_a_report_and_metrics_of_its_own(shapes: ShardSet, tmp_path: Path) -> None:
    model, description = described(
        CrateMAEConfig(image_size=16, patch_size=4, dim=16, num_subspaces=2, depth=1, norm_pix_loss=True)
    )
    export_model(tmp_path / "model", model.state_dict(), description)
    given: dict[str, Any] = {"model": str(tmp_path / "model"), "masks": shapes.storage.uri, "max_images": 8}
    for size, folder in ((None, "evaluation"), (32, "evaluation-32px")):
        done = run_evaluation(EvaluateConfig(**given, image_size=size), lambda _: None)
        assert done.page == str(tmp_path / "model" / folder / "report.html") and Path(done.page).exists()
        assert all(name.startswith(f"{folder}/") for name in done.report.metrics())
        assert done.report.folder().startswith(f"{folder}/")
        facts = done.report.model.settings
        assert facts["image_size"] == (size or 16) and facts["position_grid"] == ([4, 4] if size else None)


def test_fine_tuning_at_another_size_keeps_it(tmp_path: Path) -> None:
    data = PrepareConfig(source="digits", output=str(tmp_path / "digits"))
    pack(digits_source("test"), open_storage(data.output, data.s3), data)
    small = CrateMAEConfig(image_size=4, patch_size=2, channels=1, dim=16, num_subspaces=2, depth=1)
    given: dict[str, Any] = {
        "storage": str(tmp_path / "runs"), "model": "any", "data": {"train": data.output}, "image_size": 8,
        "training": {"steps": 2, "batch_size": 16}, "augment": {"randaugment": 0}, "scaling": {"workers": 1},
    }  # fmt: skip
    run = open_finetuning(FinetuneConfig.model_validate(given), lambda _: described(small))
    encoder = run.record.model
    assert encoder.image_hw == (8, 8) and encoder.position_grid == (2, 2)
    train(FinetuneTask, run.config, run.record, run.total_steps)
    with pytest.raises(ValueError, match=r"image_size is for a pretrained model; set encoder\.image_size"):
        FinetuneConfig.model_validate({**given, "model": "scratch"})
