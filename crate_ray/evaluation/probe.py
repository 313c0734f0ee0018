"""Linear probe: how linearly an encoder's features separate classes, next to the controls that give it a meaning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from crate_ray.config import ProbeConfig
from crate_ray.data.shards import ShardSet
from crate_ray.errors import UserError
from crate_ray.evaluation.features import FeatureExtractor, iterate_dataset
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.training.export import ModelDescription

_STRENGTHS = tuple(10.0**k for k in range(-4, 2))  # scikit-learn's C, the inverse of the L2 penalty
_ITERATIONS = 150
_PIXEL_SIDE = 16


@dataclass(frozen=True)
class ProbeScore:
    """Test accuracy of one set of features."""

    accuracy: float
    """Share of test samples classified correctly."""
    half_width: float
    """Half of the 95 % confidence interval (normal approximation of the binomial)."""
    strength: float
    """Chosen inverse L2 strength C."""


@dataclass(frozen=True)
class ProbeReport:
    """The encoder's score and the two controls."""

    encoder: ProbeScore
    """Features of the trained encoder."""
    untrained: ProbeScore
    """The same architecture with fresh weights."""
    pixels: ProbeScore
    """The input itself, averaged down to 16 × 16 where it is larger."""
    train_samples: int
    """Samples the probe was fitted on."""
    test_samples: int
    """Samples the accuracy was measured on."""

    def scores(self) -> dict[str, ProbeScore]:
        """The three scores by name."""
        return {"encoder": self.encoder, "untrained": self.untrained, "pixels": self.pixels}

    def metrics(self) -> dict[str, float]:
        """The accuracies by name, for MLflow."""
        return {f"probe_accuracy_{name}": score.accuracy for name, score in self.scores().items()}


def fit_probe(
    train_x: NDArray[np.float32],
    train_y: NDArray[np.int64],
    test_x: NDArray[np.float32],
    test_y: NDArray[np.int64],
    seed: int = 0,
) -> ProbeScore:
    """Logistic regression on standardised features (n, d), labels (n,).

    The strength is the one with the best accuracy on a fifth of the training samples, over a logarithmic grid; the
    probe is then fitted on all of them. Test samples choose nothing.
    """
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # at weak penalties; the grid has stronger ones
    counts = np.bincount(train_y)
    balanced = train_y if counts[counts > 0].min() > 1 else None  # a class of one cannot be split
    split = train_test_split(train_x, train_y, test_size=0.2, random_state=seed, stratify=balanced)
    fit_x, held_x, fit_y, held_y = split
    scores = [_pipeline(c).fit(fit_x, fit_y).score(held_x, held_y) for c in _STRENGTHS]
    best = _STRENGTHS[int(np.argmax(scores))]
    accuracy = float(_pipeline(best).fit(train_x, train_y).score(test_x, test_y))
    return ProbeScore(accuracy, 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test_y)), best)


def _pipeline(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))


def probe_encoder(
    model: MaskedAutoencoder, description: ModelDescription, train: ShardSet, test: ShardSet, config: ProbeConfig
) -> ProbeScore:
    """Score of one encoder on labelled datasets, without the controls.

    Raises UserError when a dataset has no labels, or labels that the other has not.
    """
    extract = FeatureExtractor(model, description, config.feature)
    return _score(extract, description, train, test, config)


def probe(
    model: MaskedAutoencoder, description: ModelDescription, train: ShardSet, test: ShardSet, config: ProbeConfig
) -> ProbeReport:
    """Score of an encoder and of the controls: fresh weights (of a fixed seed), and raw pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fresh = build_model(description.model)
    return ProbeReport(
        encoder=probe_encoder(model, description, train, test, config),
        untrained=probe_encoder(fresh, description, train, test, config),
        pixels=_score(_pixels, description, train, test, config),
        train_samples=min(train.manifest.num_samples, config.max_samples),
        test_samples=min(test.manifest.num_samples, config.max_samples),
    )


def _score(
    extract: Callable[[Tensor], Tensor],
    description: ModelDescription,
    train: ShardSet,
    test: ShardSet,
    config: ProbeConfig,
) -> ProbeScore:
    train_x, train_y = _features(extract, description, train, config)
    test_x, test_y = _features(extract, description, test, config)
    if unknown := set(test_y.tolist()) - set(train_y.tolist()):
        raise UserError(f"{test.storage.uri} has classes that {train.storage.uri} lacks, such as {min(unknown)}")
    if len(set(train_y.tolist())) < 2:
        raise UserError(f"{train.storage.uri} has only one class; a probe needs at least two")
    return fit_probe(train_x, train_y, test_x, test_y, config.seed)


def _features(
    extract: Callable[[Tensor], Tensor], description: ModelDescription, shards: ShardSet, config: ProbeConfig
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    features, labels = [], []
    for batch in iterate_dataset(shards, description.model, config.max_samples):
        if batch.labels is None:
            raise UserError(f"{shards.storage.uri} has samples without a label (member 'cls'); a probe needs labels")
        features.append(extract(batch.images).numpy())
        labels.append(batch.labels)
    return np.concatenate(features), np.concatenate(labels)


def _pixels(images_BCHW: Tensor) -> Tensor:
    height, width = images_BCHW.shape[2:]
    small = (min(height, _PIXEL_SIDE), min(width, _PIXEL_SIDE))
    return F.adaptive_avg_pool2d(images_BCHW.float(), small).flatten(1)
