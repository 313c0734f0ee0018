"""The gate of a promotion: a version and the champion are measured on the same samples, and compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from crate_ray.config import PromoteConfig
from crate_ray.data.format.classes import class_name, new_numbers, renumber
from crate_ray.data.format.dataset import ShardSet
from crate_ray.errors import UserError
from crate_ray.evaluation.evaluated_model import EvaluatedModel, check_input
from crate_ray.evaluation.feature_cache import FeatureSet
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.evaluation.features import compute_device, iterate_dataset
from crate_ray.evaluation.intervals import paired_difference_low
from crate_ray.evaluation.knn import knn_predict
from crate_ray.evaluation.probe import choose_solver, labelled_features, predict_by_probe, same_classes
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, Normalizer
from crate_ray.structure.coding_rate import effective_rank
from crate_ray.tracking.decision import Check, Data, Decision, Measure

_GROUPS = 20
_COPIES = 0.01  # largest share of test samples that may be copies of training samples
_UNTRAINED, _PIXELS, _MAJORITY = "the untrained encoder", "raw pixels", "the most frequent class"


@dataclass(frozen=True)
class Version:
    """A registered model."""

    number: int
    """Its version."""
    model: MaskedAutoencoder | Classifier
    """The model."""
    description: ModelDescription
    """Its architecture and preprocessing."""

    @property
    def title(self) -> str:
        """Name in sentences."""
        return f"version {self.number}"


class _Result(NamedTuple):
    """Results of a model on the test samples."""

    samples: NDArray[np.int64]
    """(n,) their numbers, in rising order."""
    right: dict[Measure, NDArray[np.bool_]]
    """(n,) which of them are classified correctly."""
    features: NDArray[np.float32]
    """(n, dim); (n, 0) for a classifier."""
    train_samples: int = 0
    """Number of training samples."""

    def value(self, measure: Measure) -> float:
        """The number to report."""
        if measure == "rank":
            return effective_rank(torch.from_numpy(self.features)).item()
        return float(self.right[measure].mean())


def judge_encoders(
    version: Version, champion: Version | None, train: ShardSet, test: ShardSet, config: PromoteConfig
) -> Decision:
    """Compare an encoder with the champion, or, without one, with an untrained encoder and raw pixels.

    Raises:
        UserError: the data does not fit the models, has no labels, or the test data is among the training data.
    """
    if train.manifest.digest() == test.manifest.digest():
        raise UserError(f"{test.storage.uri} is the dataset {train.storage.uri}; give held-out data as --probe.test")
    for each in [version, *([champion] if champion else [])]:
        for shards in (train, test):
            check_input(each.description, shards.manifest, shards.storage.uri)
    pixels = [InProcess().pixels(version.description, shards, config.probe.max_samples) for shards in (train, test)]
    notes = [_copies(pixels[0], pixels[1], train, test), *(_seen(each, test) for each in (version, champion) if each)]
    evaluated = _evaluated(version)
    new = _probed(evaluated, train, test, config)
    if champion is None:
        (fitted,), (tested,) = same_classes(train, test, pixels[:1], pixels[1:])
        floors = {
            _UNTRAINED: _probed(evaluated.untrained(config.probe.seed), train, test, config, floor=True),
            _PIXELS: _predicted(fitted, tested, config, floor=True),
        }
        checks = [_check("probe", new, other, name, 0.0) for name, other in floors.items()]
        old = None
    else:
        old = _probed(_evaluated(champion), train, test, config)
        checks = [_check(measure, new, old, champion.title, -config.margin) for measure in config.criteria]
    return _decide(version, champion, checks, new, old, (train, test), notes, config)


def judge_classifiers(version: Version, champion: Version | None, test: ShardSet, config: PromoteConfig) -> Decision:
    """Compare a classifier with the champion, or, without one, with the most frequent class of the test data.

    Raises:
        UserError: the data has other classes, does not fit the models, or is what a classifier was trained on.
    """
    for each in [version, *([champion] if champion else [])]:
        check_input(each.description, test.manifest, test.storage.uri)
        if each.description.dataset == test.manifest.digest():
            raise UserError(f"{each.title} was trained on {test.storage.uri}; give held-out data as --probe.test")
    new, labels = _classified(version, test, config)
    if champion is None:
        most_frequent = labels == np.bincount(labels).argmax()
        floor = _Result(new.samples, {"top1": most_frequent}, new.features)
        checks, old = [_check("top1", new, floor, _MAJORITY, 0.0)], None
    else:
        old, _ = _classified(champion, test, config)
        checks = [_check("top1", new, old, champion.title, -config.margin)]
    return _decide(version, champion, checks, new, old, (None, test), [], config)


def _decide(
    version: Version,
    champion: Version | None,
    checks: list[Check],
    new: _Result,
    old: _Result | None,
    data: tuple[ShardSet | None, ShardSet],
    notes: Sequence[str | None],
    config: PromoteConfig,
) -> Decision:
    train, test = data
    measures: list[Measure] = [*new.right]
    if train is not None and "rank" in config.criteria:
        measures.append("rank")
    probe = config.probe.model_dump(include={"feature", "layer", "seed"} if train else set())
    return Decision(
        version=version.number,
        champion=champion.number if champion else None,
        at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        train=None if train is None else _data(train, new.train_samples),
        test=_data(test, len(new.samples)),
        margin=config.margin,
        checks=tuple(checks),
        values={measure: new.value(measure) for measure in measures},
        champion_values={measure: old.value(measure) for measure in measures} if old else {},
        settings=probe | {"max_samples": config.probe.max_samples},
        notes=tuple(note for note in notes if note),
        forced=config.reason if not all(check.passed for check in checks) else None,
    )


def _data(shards: ShardSet, samples: int) -> Data:
    return Data(uri=shards.storage.uri, digest=shards.manifest.digest(), samples=samples)


def _check(measure: Measure, new: _Result, other: _Result, rival: str, above: float) -> Check:
    """Compare two models on the samples that both could read."""
    _, rows, other_rows = np.intersect1d(new.samples, other.samples, assume_unique=True, return_indices=True)
    if measure == "rank":
        value, rival_value = new.value("rank"), other.value("rank")
        low = relative_rank_low(new.features[rows], other.features[other_rows])
        return Check(measure=measure, rival=rival, value=value, rival_value=rival_value, low=low, above=above)
    right, rival_right = new.right[measure][rows], other.right[measure][other_rows]
    better, worse = int((right & ~rival_right).sum()), int((~right & rival_right).sum())
    return Check(
        measure=measure,
        rival=rival,
        value=float(right.mean()),
        rival_value=float(rival_right.mean()),
        low=paired_difference_low(better, worse, len(rows)),
        above=above,
        only_version=better,
        only_rival=worse,
    )


def relative_rank_low(features: NDArray[np.float32], rival: NDArray[np.float32]) -> float:
    """Lower end of the one-sided 95 % interval of rank / rival's rank − 1, for features (n, …) of the same samples.

    Delete-group jackknife of the logarithm. A bootstrap would be biased: repeated rows lower the rank.
    """
    groups = min(_GROUPS, len(features))
    if groups < 2:
        return -1.0
    of_row = np.arange(len(features)) % groups

    def log_ratio(rows: NDArray[np.bool_]) -> float:
        new, old = (effective_rank(torch.from_numpy(x[rows])).item() for x in (features, rival))
        return math.log(new / old)

    whole = log_ratio(np.ones(len(features), bool))
    parts = np.array([log_ratio(of_row != group) for group in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((parts - parts.mean()) ** 2).sum()))
    return math.expm1(whole - float(student.ppf(0.95, groups - 1)) * error)


def _evaluated(version: Version) -> EvaluatedModel:
    assert isinstance(version.model, MaskedAutoencoder)
    return EvaluatedModel("trained", version.model, version.description)


def _probed(
    evaluated: EvaluatedModel, train: ShardSet, test: ShardSet, config: PromoteConfig, *, floor: bool = False
) -> _Result:
    return _predicted(*labelled_features(evaluated, train, test, config.probe), config, floor=floor)


def _predicted(fitted: FeatureSet, tested: FeatureSet, config: PromoteConfig, *, floor: bool = False) -> _Result:
    """Which test samples are classified correctly. A floor needs the probe alone."""
    device = compute_device(None)
    solver = choose_solver(config.probe.solver, fitted.features)
    train_x, train_y = fitted.features, fitted.labels
    predicted, _ = predict_by_probe(train_x, train_y, tested.features, config.probe.seed, solver, device)
    right: dict[Measure, NDArray[np.bool_]] = {"probe": predicted == tested.labels}
    if not floor:
        right["knn"] = knn_predict(train_x, train_y, tested.features, device=device) == tested.labels
    return _Result(tested.samples, right, tested.features, len(train_y))


@torch.no_grad()
def _classified(version: Version, test: ShardSet, config: PromoteConfig) -> tuple[_Result, NDArray[np.int64]]:
    """Which test samples a classifier classifies correctly, and their classes in the classifier's numbers."""
    model, manifest, uri = version.model, test.manifest, test.storage.uri
    assert isinstance(model, Classifier)
    if manifest.num_classes is None:
        raise UserError(f"not every sample of {uri} has a class (a member `cls` with its number); give labelled data")
    numbers = new_numbers(model.config.classes, manifest, uri, f"the classifier of {version.title}")
    device = compute_device(None)
    normalizer = Normalizer.of(version.description.mean, version.description.std, device)
    model = model.to(device)
    samples, found, labels = [], [], []
    for batch in iterate_dataset(test, version.description.model, config.probe.max_samples):
        assert batch.labels is not None
        own = renumber(batch.labels, numbers)
        if len(unknown := batch.labels[(own < 0) | (own >= model.config.num_classes)]):
            raise UserError(
                f"{uri} has samples of class {class_name(manifest, int(unknown[0]))}, which the classifier of "
                f"{version.title} does not know; give data with the classes that it was trained on"
            )
        scores = model(normalizer(batch.images.to(device))).scores
        samples.append(batch.samples)
        found.append(scores.argmax(1).cpu().numpy())
        labels.append(own)
    if not samples:
        raise UserError(f"{uri} has no samples; a promotion needs some")
    y = np.concatenate(labels)
    result = _Result(np.concatenate(samples), {"top1": np.concatenate(found) == y}, np.empty((len(y), 0), np.float32))
    return result, y


def _copies(train_pixels: FeatureSet, test_pixels: FeatureSet, train: ShardSet, test: ShardSet) -> str | None:
    """Say how many test samples have the pixels of a training sample.

    Raises:
        UserError: they are more than one in a hundred.
    """
    known = {row.tobytes() for row in train_pixels.features}
    copies = sum(row.tobytes() in known for row in test_pixels.features)
    if not copies:
        return None
    sentence = f"{copies} of {len(test_pixels.features)} samples of {test.storage.uri} are also in {train.storage.uri}"
    if copies > _COPIES * len(test_pixels.features):
        raise UserError(f"{sentence}, so accuracies would be too high; give held-out data as --probe.test")
    return sentence


def _seen(version: Version, test: ShardSet) -> str | None:
    """Say that an encoder was trained on the test data (without its labels)."""
    if version.description.dataset != test.manifest.digest():
        return None
    return f"{version.title} was pretrained on {test.storage.uri}, without its labels"
