"""The built-in datasets are the same everywhere, and their splits share no sample."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from crate_ray.data.prepare.builtin import (
    SHAPE_CLASSES,
    digits_source,
    draw_plain_shape,
    draw_shapes,
    plain_shapes_source,
    shapes_source,
)


def test_digits_are_sklearns_and_the_split_is_stratified() -> None:
    images, labels = load_digits(return_X_y=True)
    samples = [item.load() for item in digits_source("all").items]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in samples])
    assert np.array_equal(np.rint(pixels / 255 * 16), images.reshape(-1, 8, 8))
    assert [int(sample["cls"]) for sample in samples] == labels.tolist()

    train, test = digits_source("train").items, digits_source("test").items
    names = {item.name for item in train}, {item.name for item in test}
    assert not names[0] & names[1]
    assert names[0] | names[1] == {item.name for item in digits_source("all").items}
    shares = Counter(item.load()["cls"] for item in test)
    counts = Counter(labels.tolist())
    assert all(shares[b"%d" % digit] == counts[digit] // 5 for digit in range(10))


@pytest.mark.parametrize(
    ("make", "draw", "suffix", "error"),
    [(shapes_source, draw_shapes, "jpg", 4), (plain_shapes_source, draw_plain_shape, "png", 0)],
)
def test_shapes_are_a_function_of_seed_and_number(make: Any, draw: Any, suffix: str, error: float) -> None:
    source = make("all", 50, 48, 7)
    samples = [item.load() for item in source.items]
    by_name = dict(zip((item.name for item in source.items), samples, strict=True))
    for split, share in (("train", 40), ("test", 10)):
        part = make(split, 50, 48, 7).items
        assert len(part) == share
        assert all(item.load() == by_name[item.name] for item in part)
    assert make("all", 50, 48, 8).items[0].load() != samples[0]
    assert source.classes == SHAPE_CLASSES
    assert len({sample["cls"] for sample in samples}) == len(SHAPE_CLASSES)

    pixels, mask, label = draw(7, 3, 48)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples[3]["mask.png"]))), mask)
    decoded = np.asarray(Image.open(io.BytesIO(samples[3][suffix])), float)
    assert np.abs(decoded - pixels).mean() <= error
    assert int(samples[3]["cls"]) == label
    assert set(np.unique(mask)) == {0, 255}
    covered = [np.mean(draw(7, number, 48)[1] > 0) for number in range(50)]
    assert 0.02 < min(covered) < max(covered) < 0.7


def test_plain_shapes_contrast_with_their_background() -> None:
    for number in range(50):
        pixels, mask, _ = draw_plain_shape(0, number, 48)
        inside, outside = (pixels[mask == value].mean(0) / 255 for value in (255, 0))
        assert np.abs(inside - outside).sum() > 0.2
