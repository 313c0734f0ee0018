"""Linear probes and k-NN on the features of each encoder and layer, and on raw pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from crate_ray.config import EvaluateConfig, Feature, ProbeConfig, Record
from crate_ray.data.format.dataset import ShardSet
from crate_ray.evaluation.evaluated_model import EvaluatedModel, check_input
from crate_ray.evaluation.feature_cache import FeatureSet
from crate_ray.evaluation.feature_source import FeatureSource
from crate_ray.evaluation.features import all_feature_points, compute_device, pixels_title
from crate_ray.evaluation.intervals import Estimate, share
from crate_ray.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn_predict
from crate_ray.evaluation.probe import (
    ProbeScore,
    Split,
    check_classes,
    choose_solver,
    fit_probe,
    held_out_accuracy,
    same_classes,
    split_rows,
)
from crate_ray.models.exported import ModelDescription
from crate_ray.serving import FeaturePoint

_PCA_SAMPLES = 50_000


class LayerScore(Record):
    """Accuracy of one layer's feature on held-out training samples. It is used only to choose a layer."""

    feature: Feature
    """Mean of patch tokens, or CLS token."""
    layer: int | None
    """Layer 1 … L; None: after the last norm."""
    linear: float
    """Accuracy of the linear probe."""
    knn: float
    """Accuracy of k-NN."""


class FeatureScores(Record):
    """Test accuracies of one set of features."""

    source: str
    """Name of the features."""
    dim: int
    """Numbers per sample."""
    linear: ProbeScore
    """Linear probe."""
    knn: Estimate
    """Accuracy of k-NN."""


class EncoderScores(Record):
    """Scores of one encoder, or of raw pixels."""

    title: str
    """Name of the encoder."""
    standard: FeatureScores
    """Scores of the requested feature."""
    chosen_linear: FeatureScores | None = None
    """Scores of the feature and layer whose linear probe is best on held-out training samples."""
    chosen_knn: FeatureScores | None = None
    """Scores of the feature and layer whose k-NN is best on held-out training samples."""
    layers: tuple[LayerScore, ...] = ()
    """Held-out accuracy of every feature and layer."""


class Classification(Record):
    """Linear probes and k-NN on two labelled datasets."""

    train: str
    """Address of the training set."""
    test: str
    """Address of the test set."""
    train_samples: int
    """Number of training samples."""
    test_samples: int
    """Number of test samples."""
    num_classes: int
    """Number of classes in the training set."""
    majority: Estimate
    """Accuracy of always predicting the training set's most frequent class."""
    neighbours: int
    """k of k-NN."""
    temperature: float
    """τ of k-NN."""
    components: int | None = None
    """Number of principal components that were measured; None: all, or the features themselves."""
    whitened: bool = False
    """Whether components were divided by their standard deviation."""
    encoders: dict[str, EncoderScores]
    """Scores by name: 'trained', 'untrained', 'baseline', 'pixels'."""

    def metrics(self) -> dict[str, float]:
        """Test accuracies for MLflow: of the requested feature and, with `_best`, of the chosen layer."""
        out = {}
        for name, scores in self.encoders.items():
            name = "encoder" if name == "trained" else name
            out[f"probe_accuracy_{name}"] = scores.standard.linear.accuracy
            out[f"knn_accuracy_{name}"] = scores.standard.knn.value
            if scores.chosen_linear and scores.chosen_knn:
                out[f"probe_accuracy_best_{name}"] = scores.chosen_linear.linear.accuracy
                out[f"knn_accuracy_best_{name}"] = scores.chosen_knn.knn.value
        return out


def classify(
    all_evaluated: Sequence[EvaluatedModel],
    train: ShardSet,
    test: ShardSet,
    config: EvaluateConfig,
    probe: ProbeConfig,
    source: FeatureSource,
) -> Classification:
    """Linear probes and k-NN of encoders and of raw pixels.

    Raises UserError if a dataset has no labels, or if the test set has classes that the training set lacks.
    """
    description = all_evaluated[0].description
    pixels, title = _pixels(description, train, test, config, probe, source), pixels_title(description.model)
    train_y, test_y = (part.labels for part in pixels)
    encoders = {
        evaluated.name: classify_by(evaluated, train, test, config, probe, source) for evaluated in all_evaluated
    }
    encoders["pixels"] = EncoderScores(title=title, standard=_scores(title, *pixels, config, probe))
    most_frequent = int(np.bincount(train_y).argmax())
    return Classification(
        train=train.storage.uri,
        test=test.storage.uri,
        train_samples=len(train_y),
        test_samples=len(test_y),
        num_classes=len(np.unique(train_y)),
        majority=share(int((test_y == most_frequent).sum()), len(test_y)),
        neighbours=NEIGHBOURS,
        temperature=TEMPERATURE,
        components=config.components,
        whitened=config.whiten,
        encoders=encoders,
    )


def classify_by(
    evaluated: EvaluatedModel,
    train: ShardSet,
    test: ShardSet,
    config: EvaluateConfig,
    probe: ProbeConfig,
    source: FeatureSource,
) -> EncoderScores:
    """Linear probes and k-NN of one encoder. Raises as `classify` does."""
    _check_input(evaluated.description, train, test)
    every = all_feature_points(len(evaluated.model.encoder)) if config.all_layers else []
    points = list(dict.fromkeys([FeaturePoint(probe.feature, probe.layer), *every]))
    fitted, tested = same_classes(
        train, test, *(source.encoder(evaluated, shards, points, probe.max_samples) for shards in (train, test))
    )
    fitted, tested = _projected(fitted, tested, config)
    rows = split_rows(fitted[0].labels, probe.seed)
    return _encoder_scores(evaluated.title, points, fitted, tested, rows, config, probe)


def classify_by_pixels(
    description: ModelDescription,
    train: ShardSet,
    test: ShardSet,
    config: EvaluateConfig,
    probe: ProbeConfig,
    source: FeatureSource,
) -> FeatureScores:
    """Linear probe and k-NN of the raw pixels of a model's input. Raises as `classify` does."""
    title = pixels_title(description.model)
    return _scores(title, *_pixels(description, train, test, config, probe, source), config, probe)


def _pixels(
    description: ModelDescription,
    train: ShardSet,
    test: ShardSet,
    config: EvaluateConfig,
    probe: ProbeConfig,
    source: FeatureSource,
) -> tuple[FeatureSet, FeatureSet]:
    _check_input(description, train, test)
    (fitted,), (tested,) = same_classes(
        train, test, *([source.pixels(description, shards, probe.max_samples)] for shards in (train, test))
    )
    (fitted,), (tested,) = _projected([fitted], [tested], config)
    return fitted, tested


def _projected(
    train: list[FeatureSet], test: list[FeatureSet], config: EvaluateConfig
) -> tuple[list[FeatureSet], list[FeatureSet]]:
    """The features' principal components, which are those of at most `_PCA_SAMPLES` samples of the training sets."""
    if config.components is None and not config.whiten:
        return train, test
    pairs = []
    for fitted, tested in zip(train, test, strict=True):
        every = -(-len(fitted.features) // _PCA_SAMPLES)
        sample = fitted.features[::every]
        count = min(config.components or sample.shape[1], *sample.shape)
        pca = PCA(count, whiten=config.whiten, svd_solver="covariance_eigh").fit(sample)
        varied = _varied(pca.explained_variance_) if config.whiten else count
        pairs.append([replace(part, features=pca.transform(part.features)[:, :varied]) for part in (fitted, tested)])
    return [fitted for fitted, _ in pairs], [tested for _, tested in pairs]


def _varied(variances: NDArray[np.floating[Any]]) -> int:
    """The number of components whose variance is more than rounding error; whitening would blow up the others.

    A LayerNorm leaves one direction without variance.
    """
    return int((variances > variances[0] * len(variances) * np.finfo(np.float32).eps).sum())


def _check_input(description: ModelDescription, train: ShardSet, test: ShardSet) -> None:
    check_classes(train, test)
    for shards in (train, test):
        check_input(description, shards.manifest, shards.storage.uri)


def _encoder_scores(
    title: str,
    points: list[FeaturePoint],
    train: list[FeatureSet],
    test: list[FeatureSet],
    rows: Split,
    config: EvaluateConfig,
    probe: ProbeConfig,
) -> EncoderScores:
    scored: dict[int, FeatureScores] = {}

    def scores(i: int) -> FeatureScores:
        if i not in scored:
            scored[i] = _scores(str(points[i]), train[i], test[i], config, probe)
        return scored[i]

    if len(points) == 1:
        return EncoderScores(title=title, standard=scores(0))
    layers = [
        LayerScore(
            feature=point.feature,
            layer=point.layer,
            linear=held_out_accuracy(part.features, part.labels, rows, compute_device(config.gpu)),
            knn=_knn_held_out(part, rows, config),
        )
        for point, part in zip(points, train, strict=True)
    ]
    return EncoderScores(
        title=title,
        standard=scores(0),
        chosen_linear=scores(max(range(len(points)), key=lambda i: layers[i].linear)),
        chosen_knn=scores(max(range(len(points)), key=lambda i: layers[i].knn)),
        layers=tuple(layers),
    )


def _scores(
    source: str, train: FeatureSet, test: FeatureSet, config: EvaluateConfig, probe: ProbeConfig
) -> FeatureScores:
    solver, device = choose_solver(probe.solver, train.features), compute_device(config.gpu)
    linear = fit_probe(train.features, train.labels, test.features, test.labels, probe.seed, solver, device)
    predicted = _knn(train, None, test, None, config)
    return FeatureScores(
        source=source,
        dim=train.features.shape[1],
        linear=linear,
        knn=share(int((predicted == test.labels).sum()), len(test.labels)),
    )


def _knn_held_out(train: FeatureSet, rows: Split, config: EvaluateConfig) -> float:
    return float((_knn(train, rows.fit, train, rows.held_out, config) == train.labels[rows.held_out]).mean())


def _knn(
    train: FeatureSet,
    train_rows: NDArray[np.int64] | None,
    test: FeatureSet,
    test_rows: NDArray[np.int64] | None,
    config: EvaluateConfig,
) -> NDArray[np.int64]:
    return knn_predict(
        train.features,
        train.labels,
        test.features,
        train_rows=train_rows,
        test_rows=test_rows,
        device=compute_device(config.gpu),
    )
