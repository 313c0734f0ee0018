"""Measures on held-out images whether layers follow the derivation: coding rates, sparsity, codebooks, inversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from crate_ray.config import Record
from crate_ray.data.batch import Batch
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.intervals import Estimate, bootstrap, mean
from crate_ray.models import CrateMAE
from crate_ray.structure.layerwise import (
    InversionErrors,
    LayerMeasures,
    batches,
    layer_operators,
    measure_codebooks,
    measure_inversion,
    measure_layers,
)

_BATCH = 32
_TREND_MEASURES = ("rate_after", "rate_after_span", "rate_after_raw", "rate_reduction", "zero_share", "gini")


class Trend(Record):
    """How a measure changes from the first layer to the last."""

    first: float
    """Mean over images at the first layer."""
    last: float
    """Mean over images at the last layer."""
    falls: int
    """Number of steps from a layer to the next in which the mean falls."""
    rises: int
    """Number of steps in which the mean rises."""
    steps: int
    """Number of steps."""
    spearman: Estimate | None
    """Rank correlation of the mean curve with the layer number; the interval resamples the images. None if the curve is
    flat or there are fewer than three layers."""
    slope: Estimate
    """Least-squares change per layer; the interval resamples the images."""

    @property
    def verdict(self) -> Literal["falls", "rises", "has no clear trend"]:
        """The direction, if the whole interval of the slope and most of the steps agree with it."""
        if self.slope.high < 0 and self.falls > self.steps / 2:
            return "falls"
        if self.slope.low > 0 and self.rises > self.steps / 2:
            return "rises"
        return "has no clear trend"


class EncoderStructure(Record):
    """Measures of one model's layers, from the first layer to the last."""

    title: str
    """Name of the model."""
    codebook: str
    """The matrix that is used as the codebook, in words."""
    subspace_dim: int
    """p."""
    num_subspaces: int
    """K."""
    measures: dict[str, tuple[Estimate, ...]]
    """Means over images by measure (see structure.layerwise.LayerMeasures); effective ranks also over subspaces."""
    effective_ranks: tuple[tuple[float, ...], ...]
    """Effective rank of U_kᵀ LN(Z½) for each layer's K subspaces, (L, K); means over images."""
    trends: dict[str, Trend]
    """Trends of some of the measures."""
    compressing_layers: int
    """Number of layers whose attention step lowers the mean R^c against their own codebook."""
    compressing_layers_span: int
    """The number of such layers if R^c is measured against orthonormal bases of the codebook."""
    coherence_largest: tuple[float, ...]
    """Largest |cosine| between directions of two subspaces of a layer: 0 if orthogonal, 1 if they intersect."""
    coherence_mean: tuple[float, ...]
    """Mean over pairs of subspaces of their largest |cosine|."""
    undoing: dict[str, tuple[Estimate, ...]] | None
    """Inversion errors of decoder layers (see structure.layerwise.InversionErrors), first decoder layer first. None if
    decoder layers do not correspond to encoder layers."""


class Structure(Record):
    """Measures of the layers on whole (unmasked) held-out images."""

    data: str
    """Address of the dataset."""
    images: int
    """Number of images."""
    epsilon: float
    """Distortion ε of the rates."""
    encoders: dict[str, EncoderStructure]
    """By name: 'trained', 'untrained', 'baseline'."""

    def metrics(self) -> dict[str, float]:
        """The trained model's trends for MLflow."""
        out = {}
        for name, trend in self.encoders["trained"].trends.items():
            out[f"structure_{name}_first"], out[f"structure_{name}_last"] = trend.first, trend.last
        return out


def measure_structure(
    all_evaluated: Sequence[EvaluatedModel], loaded: Sequence[Batch], uri: str, epsilon: float, device: torch.device
) -> Structure:
    """Measure every encoder on loaded images, unmasked."""
    images = torch.cat([batch.images for batch in loaded])
    return Structure(
        data=uri,
        images=len(images),
        epsilon=epsilon,
        encoders={evaluated.name: _measure(evaluated, images, epsilon, device) for evaluated in all_evaluated},
    )


def trend(values_LB: NDArray[np.float64]) -> Trend:
    """Trend over L layers of values on B images, (L, B)."""
    curve = values_LB.mean(1)
    layers = np.arange(1, len(curve) + 1)
    steps = np.diff(curve)

    def slope(curves_RL: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = layers - layers.mean()
        return curves_RL @ centred / max((centred**2).sum(), 1.0)

    def rank_correlation(curves_RL: NDArray[np.float64]) -> NDArray[np.float64]:
        ranks_RL = rankdata(curves_RL, axis=1)
        ranks_RL -= ranks_RL.mean(1, keepdims=True)
        centred = layers - layers.mean()
        norms = np.sqrt((ranks_RL**2).sum(1) * (centred**2).sum())
        return ranks_RL @ centred / np.where(norms > 0, norms, 1)  # 0 for a flat curve

    return Trend(
        first=float(curve[0]),
        last=float(curve[-1]),
        falls=int((steps < 0).sum()),
        rises=int((steps > 0).sum()),
        steps=len(steps),
        spearman=bootstrap(values_LB, rank_correlation) if len(curve) > 2 and np.ptp(curve) > 0 else None,
        slope=bootstrap(values_LB, slope),
    )


def _measure(evaluated: EvaluatedModel, images: torch.Tensor, epsilon: float, device: torch.device) -> EncoderStructure:
    model, normalizer = evaluated.model.to(device), evaluated.normalizer(device)
    measured: list[LayerMeasures] = []
    undone: list[InversionErrors] = []
    for part in batches(images, _BATCH):
        normalised = normalizer(part.to(device))
        measured.append(measure_layers(model, normalised, epsilon=epsilon))
        if len(part) > 1 and (errors := measure_inversion(model, normalised)) is not None:
            undone.append(errors)
    model.cpu()
    found = LayerMeasures.concatenate(measured)
    layers = vars(found) | {"effective_rank": found.effective_rank.mean(2)}
    largest, means = measure_codebooks(model)
    heads, size, _ = layer_operators(model.encoder[0]).codebook.shape
    return EncoderStructure(
        title=evaluated.title,
        codebook="its own codebook U" if isinstance(model, CrateMAE) else "its key projection, biases left out",
        subspace_dim=size,
        num_subspaces=heads,
        measures={name: tuple(mean(row) for row in values.numpy()) for name, values in layers.items()},
        effective_ranks=tuple(tuple(row) for row in found.effective_rank.mean(1).tolist()),
        trends={name: trend(layers[name].numpy()) for name in _TREND_MEASURES},
        compressing_layers=int((layers["rate_after"].mean(1) < layers["rate_before"].mean(1)).sum()),
        compressing_layers_span=int((layers["rate_after_span"].mean(1) < layers["rate_before_span"].mean(1)).sum()),
        coherence_largest=tuple(largest),
        coherence_mean=tuple(means),
        undoing=_undoing(undone),
    )


def _undoing(parts: list[InversionErrors]) -> dict[str, tuple[Estimate, ...]] | None:
    if not parts:
        return None
    return {
        field.name: tuple(mean(row) for row in torch.cat([getattr(part, field.name) for part in parts], 1).numpy())
        for field in dataclasses.fields(InversionErrors)
    }
