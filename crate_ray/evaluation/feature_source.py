"""Sources of features of a dataset: this process, or Ray tasks with a cache (see `extraction`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from crate_ray.data.format.dataset import ShardSet
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.feature_cache import UNLABELLED, FeatureSet
from crate_ray.evaluation.features import compute_device, iterate_dataset, pixel_features
from crate_ray.models.exported import ModelDescription
from crate_ray.serving import FeatureExtractor, FeaturePoint


class FeatureSource(Protocol):
    """Computes features of at most max_samples samples, evenly spread over a dataset."""

    def encoder(
        self, evaluated: EvaluatedModel, shards: ShardSet, points: Sequence[FeaturePoint], max_samples: int | None
    ) -> list[FeatureSet]:
        """Features of an encoder at each of the points."""

    def pixels(self, description: ModelDescription, shards: ShardSet, max_samples: int | None) -> FeatureSet:
        """`pixel_features` of the model's input, as the control."""


class InProcess:
    """Computes features in this process, on its GPU if it has one. Nothing is cached."""

    def encoder(
        self, evaluated: EvaluatedModel, shards: ShardSet, points: Sequence[FeaturePoint], max_samples: int | None
    ) -> list[FeatureSet]:
        """See FeatureSource."""
        extract = FeatureExtractor(evaluated.model, evaluated.description, device=compute_device(None))
        return _collect(evaluated.description, shards, max_samples, lambda images: extract.pooled(images, points))

    def pixels(self, description: ModelDescription, shards: ShardSet, max_samples: int | None) -> FeatureSet:
        """See FeatureSource."""
        (found,) = _collect(description, shards, max_samples, lambda images: [pixel_features(images)])
        return found


def _collect(
    description: ModelDescription,
    shards: ShardSet,
    max_samples: int | None,
    compute: Callable[[Tensor], list[Tensor]],
) -> list[FeatureSet]:
    parts, labels, samples = [], [], []
    for batch in iterate_dataset(shards, description.model, max_samples):
        parts.append([features.numpy() for features in compute(batch.images)])
        labels.append(np.full(len(batch.samples), UNLABELLED) if batch.labels is None else batch.labels)
        samples.append(batch.samples)
    y, numbers = np.concatenate(labels), np.concatenate(samples)
    return [FeatureSet(np.concatenate(features), y, numbers) for features in zip(*parts, strict=True)]
