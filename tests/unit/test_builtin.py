"""The built-in datasets are the same everywhere, and their splits share no sample."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from crate_ray.data.prepare.builtin import SHAPE_CLASSES, digits_source, draw_shapes, shapes_source


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


def test_shapes_are_a_function_of_seed_and_number() -> None:
    source = shapes_source("all", 50, 48, 7)
    samples = {item.name: item.load() for item in source.items}
    for split, share in (("train", 40), ("test", 10)):
        part = shapes_source(split, 50, 48, 7).items  # type: ignore[arg-type]
        assert len(part) == share
        assert all(item.load() == samples[item.name] for item in part)
    assert shapes_source("all", 50, 48, 8).items[0].load() != source.items[0].load()
    assert source.classes == SHAPE_CLASSES
    assert len({sample["cls"] for sample in samples.values()}) == len(SHAPE_CLASSES)

    pixels, mask, label = draw_shapes(7, 3, 48)
    sample = samples["shapes 3"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["mask.png"]))), mask)
    decoded = np.asarray(Image.open(io.BytesIO(sample["jpg"])), float)
    assert np.abs(decoded - pixels).mean() < 4
    assert int(sample["cls"]) == label
    assert set(np.unique(mask)) == {0, 255}
    covered = [np.mean(draw_shapes(7, number, 48)[1] > 0) for number in range(50)]
    assert 0.02 < min(covered) < max(covered) < 0.7
