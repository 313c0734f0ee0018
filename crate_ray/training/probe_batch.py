"""A few fixed samples on which a model shows, while it trains, what it has learned: pictures, and measures by layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from crate_ray.config import DataConfig, ModelConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import evaluation_loader
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import Normalizer
from crate_ray.structure.layerwise import measure_layers
from crate_ray.training.parallel import gathered
from crate_ray.training.pictures import attention_picture, layers_picture, reconstruction_picture
from crate_ray.training.step import probe_noise

_SAMPLES = 8

LAYER_METRICS = {
    "coding_rate": ("rate_after", "coding rate R$^c$(LN Z | U) / nats"),
    "coding_rate_span": ("rate_after_span", "R$^c$(LN Z | basis of U) / nats"),
    "zero_share": ("zero_share", "share of zeros in Z"),
    "gini": ("gini", "Gini index of Z"),
}
"""Metrics by layer: name in MLflow (before /layer_01), field of structure.layerwise.LayerMeasures, title."""


class Look(NamedTuple):
    """What the model showed at a step."""

    metrics: dict[str, float]
    """Measures by layer, such as coding_rate/layer_01; means over the samples."""
    pictures: dict[str, bytes]
    """PNGs by name: reconstruction, attention, layers."""


class ProbeBatch:
    """The first samples of a dataset with their fixed masks.

    Args:
        shards: where the samples come from, held out if possible.
        model, data: settings of the run.
        normalizer: of the run.
    """

    def __init__(self, shards: ShardSet, model: ModelConfig, data: DataConfig, normalizer: Normalizer) -> None:
        data = data.model_copy(update={"memory_bytes": 1})  # a few samples: read their block, not the dataset
        with evaluation_loader(shards, model, data, batch_size=_SAMPLES) as loader:
            batch = next(iter(loader))
        device = normalizer.mean.device
        is_grid = shards.manifest.kind == "grid"
        self._range = (batch.images.min().item(), batch.images.max().item()) if is_grid else (0.0, 1.0)
        self.images = batch.images.to(device)
        self._noise = probe_noise(batch.samples, model.num_patches).to(device)
        self._normalizer = normalizer
        self._measured: dict[int, dict[str, list[float]]] = {}

    @torch.no_grad()
    def look(self, model: MaskedAutoencoder, step: int) -> Look:
        """What the model makes of the samples after so many steps. A collective call where the model is sharded."""
        was_training = model.training
        model.eval()
        with gathered(model):
            pictures = {
                "reconstruction": reconstruction_picture(
                    model, self._normalizer, self.images, self._noise, self._range
                ),
                "attention": attention_picture(model, self._normalizer, self.images, self._range),
            }
            means = measure_layers(model, self._normalizer(self.images)).means()
        model.train(was_training)
        self._measured[step] = {name: means[field] for name, (field, _) in LAYER_METRICS.items()}
        pictures["layers"] = layers_picture(self._measured, {name: title for name, (_, title) in LAYER_METRICS.items()})
        metrics = {
            f"{name}/layer_{layer:02d}": value
            for name, values in self._measured[step].items()
            for layer, value in enumerate(values, 1)
        }
        return Look(metrics, pictures)
