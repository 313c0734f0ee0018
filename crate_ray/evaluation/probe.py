"""Linear probe: logistic regression on an encoder's features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from crate_ray.config import ProbeConfig, Record
from crate_ray.data.format.classes import class_name, class_names, new_numbers, renumber
from crate_ray.data.format.dataset import ShardSet
from crate_ray.errors import UserError, first_few
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.feature_cache import FeatureSet
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.evaluation.features import compute_device
from crate_ray.evaluation.intervals import Estimate, share
from crate_ray.evaluation.torch_probe import fit_path
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription
from crate_ray.serving import FeaturePoint

Solver = Literal["sklearn", "torch"]

_STRENGTHS = tuple(10.0**k for k in range(-4, 2))  # scikit-learn's C, the inverse of the L2 penalty
_ITERATIONS = 150
_COMPARED_STRENGTHS, _COMPARED_ITERATIONS = (1e-3, 1e-2, 1e-1, 1.0), 50  # enough to compare layers
_HELD_OUT = 0.2
_IN_MEMORY_BYTES = 2**30
_SMALL_BYTES = 2**25  # with fewer bytes of features, products are so short that one thread is faster than several


class ProbeScore(Record):
    """Test accuracy of one set of features."""

    accuracy: float
    """Share of test samples that are classified correctly."""
    interval: Estimate
    """The accuracy with Wilson's 95 % confidence interval."""
    strength: float
    """Chosen inverse L2 strength C."""
    solver: Solver
    """Solver that fitted it."""


class Split(NamedTuple):
    """Rows of the training samples to fit candidates on, and to compare them on."""

    fit: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_rows(labels: NDArray[np.int64], seed: int) -> Split:
    """Hold out a fifth of the rows, stratified by class if every class has at least two samples."""
    counts = np.bincount(labels)
    stratify = labels if counts[counts > 0].min() > 1 and len(labels) * _HELD_OUT >= (counts > 0).sum() else None
    fit, held_out = train_test_split(np.arange(len(labels)), test_size=_HELD_OUT, random_state=seed, stratify=stratify)
    return Split(np.sort(fit), np.sort(held_out))


def choose_solver(wanted: Literal["auto", "sklearn", "torch"], features: NDArray[np.float32]) -> Solver:
    """Choose the solver for 'auto': scikit-learn, which copies the features several times, up to 1 GiB, else torch."""
    if wanted != "auto":
        return wanted
    return "sklearn" if features.nbytes <= _IN_MEMORY_BYTES else "torch"


def fit_probe(
    train_x: NDArray[np.float32],
    train_y: NDArray[np.int64],
    test_x: NDArray[np.float32],
    test_y: NDArray[np.int64],
    seed: int = 0,
    solver: Solver = "sklearn",
    device: torch.device | str = "cpu",
) -> ProbeScore:
    """Fit logistic regression on standardised features and measure its test accuracy.

    The inverse L2 strength is chosen from a logarithmic grid by the accuracy on a fifth of the training samples. The
    probe is then fitted on all training samples. Test samples are used for the reported accuracy only.

    Args:
        train_x, train_y: features (n, d) and labels (n,).
        test_x, test_y: features (m, d) and labels (m,).
        seed: seed of the split.
        solver: scikit-learn or torch.
        device: where the torch solver computes.
    """
    predicted, strength = predict_by_probe(train_x, train_y, test_x, seed, solver, device)
    interval = share(int((predicted == test_y).sum()), len(test_y))
    return ProbeScore(accuracy=interval.value, interval=interval, strength=strength, solver=solver)


def predict_by_probe(
    train_x: NDArray[np.float32],
    train_y: NDArray[np.int64],
    test_x: NDArray[np.float32],
    seed: int = 0,
    solver: Solver = "sklearn",
    device: torch.device | str = "cpu",
) -> tuple[NDArray[np.int64], float]:
    """Classes (m,) that the probe of `fit_probe` predicts for the test samples, and its inverse L2 strength."""
    rows = split_rows(train_y, seed)
    best = _STRENGTHS[int(np.argmax(_held_out(train_x, train_y, rows, _STRENGTHS, solver, device)))]
    (predicted,) = _predictions(train_x, train_y, None, test_x, None, (best,), solver, device)
    return predicted, best


def held_out_accuracy(
    train_x: NDArray[np.float32], train_y: NDArray[np.int64], rows: Split, device: torch.device | str = "cpu"
) -> float:
    """Best accuracy over a grid of strengths on held-out training samples, for comparing layers.

    Always uses the torch solver, which warm-starts from one strength to the next.
    """
    return max(_held_out(train_x, train_y, rows, _COMPARED_STRENGTHS, "torch", device, _COMPARED_ITERATIONS))


def probe_encoder(
    model: MaskedAutoencoder, description: ModelDescription, train: ShardSet, test: ShardSet, config: ProbeConfig
) -> ProbeScore:
    """Probe one encoder on labelled datasets, in this process and without controls.

    Raises UserError if a dataset has no labels, or if the test set has classes that the training set lacks.
    """
    fitted, tested = labelled_features(EvaluatedModel("trained", model, description), train, test, config)
    solver = choose_solver(config.solver, fitted.features)
    device = compute_device(None)
    return fit_probe(fitted.features, fitted.labels, tested.features, tested.labels, config.seed, solver, device)


def labelled_features(
    evaluated: EvaluatedModel, train: ShardSet, test: ShardSet, config: ProbeConfig
) -> tuple[FeatureSet, FeatureSet]:
    """Features of labelled training and test samples, computed in this process.

    Raises UserError if a dataset has no labels, or if the test set has classes that the training set lacks.
    """
    check_classes(train, test)
    points = [FeaturePoint(config.feature, config.layer)]
    (fitted,), (tested,) = same_classes(
        train, test, *(InProcess().encoder(evaluated, part, points, config.max_samples) for part in (train, test))
    )
    return fitted, tested


def check_classes(train: ShardSet, test: ShardSet) -> None:
    """Raise UserError if the names of the classes show that one dataset cannot test what the other one teaches.

    This takes no time. `same_classes` also sees the samples' labels.
    """
    new_numbers(class_names(train.manifest), test.manifest, test.storage.uri, train.storage.uri)


def same_classes(
    train: ShardSet, test: ShardSet, fitted: Sequence[FeatureSet], tested: Sequence[FeatureSet]
) -> tuple[list[FeatureSet], list[FeatureSet]]:
    """Features of two datasets with labels that mean the same class in both: 0 to C − 1, of the C training classes.

    Classes are matched by name (see data/format/classes.py).

    Args:
        train, test: the datasets.
        fitted, tested: their features. All feature sets of a dataset have the same labels.

    Raises:
        UserError: no classifier can be fitted and tested on these labels.
    """
    train_y, raw_y = fitted[0].labels, tested[0].labels
    for labels, shards in ((train_y, train), (raw_y, test)):
        _check_labelled(labels, shards.storage.uri)
    known, fitted_y = np.unique(train_y, return_inverse=True)
    numbers = new_numbers(class_names(train.manifest), test.manifest, test.storage.uri, train.storage.uri)
    test_y = renumber(raw_y, numbers)
    if (unknown := ~np.isin(test_y, known)).any():
        names = [class_name(test.manifest, number) for number in np.unique(raw_y[unknown]).tolist()]
        raise UserError(
            f"{test.storage.uri} has {int(unknown.sum())} samples of classes that {train.storage.uri} lacks: "
            f"{first_few(names)}; a probe needs samples of each class for training"
        )
    if len(known) < 2:
        raise UserError(f"{train.storage.uri} has only one class; a probe needs at least two")
    if len(train_y) < 10:
        raise UserError(f"{train.storage.uri} has {len(train_y)} samples; a probe needs at least ten")
    tested_y = np.searchsorted(known, test_y)
    return [replace(part, labels=fitted_y) for part in fitted], [replace(part, labels=tested_y) for part in tested]


def _check_labelled(labels: NDArray[np.int64], uri: str) -> None:
    """Raise UserError unless there are labels (n,), and none is below 0, which means no label."""
    if not len(labels):
        raise UserError(f"{uri} has no samples; a probe needs some")
    if missing := int((labels < 0).sum()):
        count = f"{missing} of {len(labels)} samples" if missing < len(labels) else "samples"
        raise UserError(
            f"{uri} has {count} without a label, a member 'cls' with a class number; a probe needs labels: pack class "
            "folders, or shards with class numbers, with crate-ray prepare"
        )


def _held_out(
    train_x: NDArray[np.float32],
    train_y: NDArray[np.int64],
    rows: Split,
    strengths: tuple[float, ...],
    solver: Solver,
    device: torch.device | str,
    iterations: int = _ITERATIONS,
) -> list[float]:
    """Accuracy on the held-out rows for each strength, fitted on the other rows."""
    predictions = _predictions(
        train_x, train_y, rows.fit, train_x, rows.held_out, strengths, solver, device, iterations
    )
    return [float((predicted == train_y[rows.held_out]).mean()) for predicted in predictions]


def _predictions(
    train_x: NDArray[np.float32],
    train_y: NDArray[np.int64],
    train_rows: NDArray[np.int64] | None,
    test_x: NDArray[np.float32],
    test_rows: NDArray[np.int64] | None,
    strengths: tuple[float, ...],
    solver: Solver,
    device: torch.device | str,
    iterations: int = _ITERATIONS,
) -> list[NDArray[np.int64]]:
    """Predicted classes of the test rows for each strength, in increasing order. Rows None: all."""
    fitted_y = train_y if train_rows is None else train_y[train_rows]
    small = 4 * len(fitted_y) * train_x.shape[1] <= _SMALL_BYTES
    with threadpool_limits(1 if small else None), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # expected for weak penalties
        if solver == "torch":
            device = "cpu" if small else device  # its many short steps would wait for a GPU longer than they compute
            path = fit_path(
                train_x,
                train_y,
                strengths,
                num_classes=int(fitted_y.max()) + 1,
                rows_M=train_rows,
                max_iterations=iterations,
                device=device,
            )
            return [fitted.predict(test_x, test_rows) for fitted in path]
        fitted_x = train_x if train_rows is None else train_x[train_rows]
        test_x = test_x if test_rows is None else test_x[test_rows]
        return [
            make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=iterations))
            .fit(fitted_x, fitted_y)
            .predict(test_x)
            for strength in strengths
        ]
