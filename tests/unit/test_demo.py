"""What the demo prints at its end: the accuracies as bars, and pictures as coloured characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.text import Text

from crate_ray.config import CrateMAEConfig, PrepareConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.evaluation.classification import Classification, EncoderScores, FeatureScores
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.evaluation.intervals import share
from crate_ray.evaluation.probe import ProbeScore
from crate_ray.jobs.demo import summary, terminal_pictures
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.storage.interface import open_storage

MODEL = CrateMAEConfig(image_size=32, patch_size=4, dim=16, depth=1, num_subspaces=2)


def scores(title: str, successes: int) -> EncoderScores:
    estimate = share(successes, 2400)
    linear = ProbeScore(accuracy=estimate.value, interval=estimate, strength=1.0, solver="sklearn")
    return EncoderScores(title=title, standard=FeatureScores(source="mean", dim=16, linear=linear, knn=estimate))


def test_summary_has_a_line_and_a_bar_for_every_encoder() -> None:
    encoders = {"trained": scores("trained CRATE-MAE", 1500), "pixels": scores("raw pixels", 480)}
    result = Classification(
        train="train", test="test", train_samples=9600, test_samples=2400, num_classes=6, majority=share(400, 2400),
        neighbours=20, temperature=0.07, encoders=encoders,
    )  # fmt: skip
    question, what, _, trained, pixels = (line.plain for line in summary(result))
    assert question.endswith("?") and "2,400 held-out images, 6 classes" in what
    assert trained.split()[:5] == ["trained", "CRATE-MAE", "62.5%", "[60.5%,", "64.4%]"]
    assert pixels.split()[:5] == ["raw", "pixels", "20.0%", "[18.4%,", "21.6%]"]
    assert (trained.count("█"), pixels.count("█")) == (25, 8)


def test_pictures_have_two_pixels_in_each_character(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "shapes"), PrepareConfig(output="").s3)
    manifest = pack(shapes_source("all", 6, 32, 0), storage, PrepareConfig(output=storage.uri))
    description = ModelDescription(model=MODEL, mean=manifest.mean, std=manifest.std, kind="image")
    torch.manual_seed(0)
    export_model(tmp_path / "model", build_model(MODEL).state_dict(), description)
    shards = load_dataset(storage)
    titles, *lines = terminal_pictures(tmp_path / "model", shards, 32).split("\n")
    assert [len(line) for line in lines] == [4 * 33] * 3 * 16
    assert titles.plain.index("prediction") == 2 * 33

    batch = next(iterate_dataset(shards, MODEL, 3))
    shown = np.array([[colours(line, at) for at in range(32)] for line in lines])  # (48, 32, upper and lower, 3)
    shown = shown.transpose(0, 2, 1, 3).reshape(3, 32, 32, 3).transpose(0, 3, 1, 2)
    assert np.abs(shown - batch.images.numpy().astype(int)).max() <= 1


def colours(line: Text, at: int) -> list[tuple[int, ...]]:
    """Foreground and background of one character."""
    (style,) = (span.style for span in line.spans if span.start <= at < span.end)
    assert not isinstance(style, str) and style.color and style.bgcolor
    return [tuple(colour.get_truecolor()) for colour in (style.color, style.bgcolor)]
