"""Signals of whether the models can learn, on masked held-out images; see structure.signals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from crate_ray.config import Record
from crate_ray.data.batch import Batch
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.structure.signals import Signals, measure_signals
from crate_ray.training.step import probe_noise

_IMAGES = 64


class ModelLearning(Record):
    """Signals of one model."""

    title: str
    """Name of the model."""
    encoder: dict[str, tuple[float, ...]]
    """By layer, by signal; those of gradients are 'gradient of U' and so on."""
    decoder: dict[str, tuple[float, ...]]
    """By layer, by signal."""


class Learning(Record):
    """Signals of all models."""

    data: str
    """Address of the dataset."""
    images: int
    """Number of images."""
    visible_share: float
    """Share of visible patches."""
    models: dict[str, ModelLearning]
    """By name: 'trained', 'untrained', 'baseline'."""

    def metrics(self) -> dict[str, float]:
        """The trained model's signals of the last encoder layer, for MLflow."""
        last = self.models["trained"].encoder
        return {f"signals_{name}_last": last[name][-1] for name in ("token_cosine", "token_rank", "unused_codes")}


def measure_learning(
    all_evaluated: Sequence[EvaluatedModel], loaded: Sequence[Batch], uri: str, device: torch.device
) -> Learning | None:
    """Measure all models that have a decoder on loaded images. None if none has."""
    images = torch.cat([batch.images for batch in loaded])[:_IMAGES]
    samples = torch.cat([torch.as_tensor(batch.samples) for batch in loaded])[:_IMAGES].numpy()
    models, share = {}, 0.0
    for evaluated in all_evaluated:
        if not evaluated.model.has_decoder:
            continue
        model = evaluated.model.to(device)
        noise = probe_noise(samples, model.num_patches).to(device)
        found = measure_signals(model, evaluated.normalizer(device)(images.to(device)), noise)
        model.cpu()
        share = found.visible_share
        models[evaluated.name] = ModelLearning(
            title=evaluated.title, encoder=by_name(found.encoder), decoder=by_name(found.decoder)
        )
    if "trained" not in models:
        return None
    return Learning(data=uri, images=len(images), visible_share=share, models=models)


def by_name(signals: Signals) -> dict[str, tuple[float, ...]]:
    """The signals that the layers have, as in ModelLearning."""
    fields = {f.name: getattr(signals, f.name) for f in dataclasses.fields(signals) if f.name != "gradients"}
    gradients = {f"gradient of {part}": values for part, values in signals.gradients.items()}
    return {name: tuple(values) for name, values in (fields | gradients).items() if values}
