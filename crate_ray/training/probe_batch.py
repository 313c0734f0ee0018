"""A few fixed samples on which a model is probed while it trains: pictures, and measures by layer."""

from __future__ import annotations

import json
import logging
from typing import NamedTuple

import torch

from crate_ray.config import DataConfig, ModelConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import evaluation_loader
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import Normalizer
from crate_ray.runs.metrics import layer_measure
from crate_ray.storage.interface import NotFound, Storage
from crate_ray.structure.layerwise import measure_layers
from crate_ray.training.parallel import gathered
from crate_ray.training.pictures import attention_picture, layers_picture, reconstruction_picture
from crate_ray.training.step import probe_noise

logger = logging.getLogger(__name__)

MEASURES_FILE = "layer_measures.json"
"""In the run's folder: measures by layer, by name, by step."""
_Measures = dict[str, list[float]]
_SAMPLES = 8

LAYER_METRICS = {
    "coding_rate": ("rate_after", "coding rate R$^c$(LN Z | U) / nats"),
    "coding_rate_span": ("rate_after_span", "R$^c$(LN Z | basis of U) / nats"),
    "zero_share": ("zero_share", "share of zeros in Z"),
    "gini": ("gini", "Gini index of Z"),
}
"""Measures by layer: name in MLflow (see runs.metrics.layer_measure), field of structure.layerwise.LayerMeasures, title
in the picture."""


class ProbeResult(NamedTuple):
    """What the probe found after a step."""

    metrics: dict[str, float]
    """Measures by layer, means over the samples; for the names see runs.metrics.layer_measure."""
    pictures: dict[str, bytes]
    """PNGs by name: reconstruction, attention, layers."""


class ProbeBatch:
    """The first samples of a dataset with their fixed masks.

    Args:
        shards: the dataset, held out if possible.
        model, data: settings of the run.
        normalizer: of the run.
        run: the run's folder, which keeps the measures of earlier steps for the layers picture; None for none.
    """

    def __init__(
        self,
        shards: ShardSet,
        model: ModelConfig,
        data: DataConfig,
        normalizer: Normalizer,
        run: Storage | None = None,
    ) -> None:
        data = data.model_copy(update={"memory_bytes": 1})  # a few samples: read their block, not the dataset
        with evaluation_loader(shards, model, data, batch_size=_SAMPLES) as loader:
            batch = next(iter(loader))
        device = normalizer.mean.device
        is_grid = shards.manifest.kind == "grid"
        self._range = (batch.images.min().item(), batch.images.max().item()) if is_grid else (0.0, 1.0)
        self.images = batch.images.to(device)
        self._noise = probe_noise(batch.samples, model.num_patches).to(device)
        self._normalizer, self._run = normalizer, run
        self._measures = _read_measures(run)

    @torch.no_grad()
    def run(self, model: MaskedAutoencoder, step: int) -> ProbeResult:
        """Probe the model after so many steps. A collective call if the model is sharded."""
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
        earlier = {known: values for known, values in self._measures.items() if known < step}
        self._measures = earlier | {step: {name: means[field] for name, (field, _) in LAYER_METRICS.items()}}
        _write_measures(self._run, self._measures)
        titles = {name: title for name, (_, title) in LAYER_METRICS.items()}
        pictures["layers"] = layers_picture(self._measures, titles)
        metrics = {
            layer_measure(name, layer): value
            for name, values in self._measures[step].items()
            for layer, value in enumerate(values, 1)
        }
        return ProbeResult(metrics, pictures)


def _read_measures(run: Storage | None) -> dict[int, _Measures]:
    """Measures by step of earlier starts of the run; those that cannot be read are left out of the picture."""
    if run is None:
        return {}
    try:
        stored: dict[str, _Measures] = json.loads(run.read(MEASURES_FILE))
        return {int(step): values for step, values in stored.items() if values.keys() == LAYER_METRICS.keys()}
    except NotFound:
        return {}
    except (OSError, UserError, ValueError, AttributeError) as error:
        logger.warning("%s/%s: %s; the picture of the layers lacks earlier steps", run.uri, MEASURES_FILE, error)
        return {}


def _write_measures(run: Storage | None, measures: dict[int, _Measures]) -> None:
    """Store the measures; a failure costs nothing but lines of a later picture."""
    if run is None:
        return
    try:
        run.write(MEASURES_FILE, json.dumps(measures).encode())
    except (OSError, UserError) as error:
        logger.warning("%s/%s cannot be written: %s", run.uri, MEASURES_FILE, error)
