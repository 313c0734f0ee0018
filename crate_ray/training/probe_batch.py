"""A few fixed samples on which a model is probed while it trains: pictures, and measures by layer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from crate_ray.config import CrateMAEConfig, DataConfig, ModelConfig
from crate_ray.config.identifiers import Count
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import evaluation_loader
from crate_ray.errors import UserError, invalid_value
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import Normalizer
from crate_ray.runs.metrics import SignalPlace, layer_measure, learning_signal
from crate_ray.storage.interface import NotFound, Storage
from crate_ray.structure.attention import patch_maps
from crate_ray.structure.layerwise import measure_layers
from crate_ray.structure.signals import ModelSignals, Signals, measure_signals
from crate_ray.training.pictures import (
    attention_picture,
    layers_picture,
    reconstruction_picture,
    reconstruction_rows,
    value_range,
)
from crate_ray.training.step import probe_noise

logger = logging.getLogger(__name__)

MEASURES_FILE = "layer_measures.json"
"""In the run's folder: measures by layer, by name, by step."""
_Measures = Mapping[str, Sequence[float | None]]
_MEASURES = TypeAdapter(dict[Count, dict[str, list[float | None]]])
_SAMPLES = 8
_ALIKE_COSINE, _ALIKE_RANK = 0.99, 1.5
_LEAST_GRADIENT = 1e-3  # of the last decoder layer's

LAYER_METRICS = {
    "coding_rate": ("rate_after", "coding rate R$^c$(LN Z | U) / nats"),
    "coding_rate_span": ("rate_after_span", "R$^c$(LN Z | basis of U) / nats"),
    "zero_share": ("zero_share", "share of zeros in Z"),
    "gini": ("gini", "Gini index of Z"),
}
"""Measures by layer: name in MLflow (see runs.metrics.layer_measure), field of structure.layerwise.LayerMeasures, title
in the picture."""
SIGNALS = {
    "token_cosine": "cosine between tokens",
    "token_rank": "effective rank of the tokens",
    "unused_codes": "share of unused codes",
    "visible_attention": "attention to visible patches",
    "gradient_norm": "gradient norm",
}
"""Signals of learning: name in MLflow (see runs.metrics.learning_signal) and in structure.signals.Signals, title in the
picture."""


class ProbeResult(NamedTuple):
    """Result of a probe after a step."""

    metrics: dict[str, float]
    """Measures by layer and signals of learning; for the names see runs.metrics."""
    pictures: dict[str, bytes]
    """PNGs by name: reconstruction, attention, layers, signals."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""


class Observation(NamedTuple):
    """Outputs of a model for the probe batch after a step. Tensors are on the CPU."""

    step: int
    rows: list[Tensor]
    """See pictures.reconstruction_rows."""
    attention: Tensor
    """(B, K, h, w) attention of the last layer's CLS token, by head."""
    measures: dict[str, list[float]]
    """Means over the samples by encoder layer, by name."""
    signals: ModelSignals
    """Of the masked samples."""


class ProbeBatch:
    """The first samples of a dataset with their fixed masks.

    Args:
        shards: the dataset, held out if possible.
        model, data: settings of the run.
        normalizer: of the run.
        run: the run's folder, which stores the measures of earlier steps for the layers picture. None: do not store.
    """

    def __init__(
        self,
        shards: ShardSet,
        model: ModelConfig,
        data: DataConfig,
        normalizer: Normalizer,
        run: Storage | None = None,
    ) -> None:
        data = data.model_copy(update={"memory_bytes": 1})  # read only the blocks of the few samples, not all data
        with evaluation_loader(shards, model, data, batch_size=_SAMPLES) as loader:
            batch = next(iter(loader))
        device = normalizer.mean.device
        self._range = value_range(batch.images)
        self.images = batch.images
        """Loaded, not normalised, on the CPU."""
        self._device_images = batch.images.to(device)
        self._noise = probe_noise(batch.samples, model.num_patches).to(device)
        self._normalizer, self._run, self._config = normalizer, run, model
        self._warned = False
        self._measures = _read_measures(run)

    @torch.no_grad()
    def observe(self, model: MaskedAutoencoder, step: int) -> Observation:
        """Run the model, which has fp32 weights, on the samples after so many steps. `draw` does the rest.

        Layers must not be compiled (see compilation.eager_layers). Weights, their gradients and the state of random
        numbers do not change.
        """
        was_training = model.training
        model.eval()
        images = self._device_images
        rows = reconstruction_rows(model, self._normalizer, images, self._noise)
        attention = patch_maps(model, self._normalizer(images)).attention[:, -1]
        means = measure_layers(model, self._normalizer(images)).means()
        measures = {name: means[field] for name, (field, _) in LAYER_METRICS.items()}
        signals = measure_signals(model, self._normalizer(images), self._noise)
        model.train(was_training)
        return Observation(step, rows, attention, measures, signals)

    def draw(self, seen: Observation) -> ProbeResult:
        """Draw an observation. It needs neither model nor device, so training can go on meanwhile."""
        earlier = {known: values for known, values in self._measures.items() if known < seen.step}
        self._measures = earlier | {seen.step: {**seen.measures, **_by_layer(seen.signals)}}
        _write_measures(self._run, self._measures)
        titles = {name: title for name, (_, title) in LAYER_METRICS.items()}
        uniform = f"{SIGNALS['visible_attention']} (uniform: {seen.signals.visible_share:.2g})"
        pictures = {
            "reconstruction": reconstruction_picture(seen.rows, self._range),
            "attention": attention_picture(self.images, seen.attention, self._range),
            "layers": layers_picture(self._measures, titles),
            "signals": layers_picture(
                self._measures,
                SIGNALS | {"visible_attention": uniform},
                encoder_depth=len(seen.signals.encoder.token_cosine),
                log_scale=("gradient_norm",),
            ),
        }
        metrics = {
            layer_measure(name, layer): value
            for name, values in seen.measures.items()
            for layer, value in enumerate(values, 1)
        }
        return ProbeResult(metrics | dict(_signal_metrics(seen.signals)), pictures, self._notes(seen))

    def _notes(self, seen: Observation) -> tuple[str, ...]:
        """A warning when the model has collapsed. It is given once, and not before the first step."""
        if self._warned or not seen.step or not has_collapsed(seen.signals):
            return ()
        self._warned = True
        encoder, decoder = seen.signals.encoder, seen.signals.decoder
        share = encoder.gradient_norm[0] / decoder.gradient_norm[-1]
        cures = ["a lower optim.lr", "fewer layers"]
        if isinstance(self._config, CrateMAEConfig):
            if self._config.initialization != "small":
                cures.append("model.initialization small")
            if self._config.residual != "all":
                cures.append("model.residual all")
        return (
            "the model seems to have collapsed: after the last encoder layer, an image's tokens are all alike (mean "
            f"cosine {encoder.token_cosine[-1]:.3f}, effective rank {encoder.token_rank[-1]:.1f}), and the first "
            f"encoder layer gets {share:.0e} of the last decoder layer's gradient; if the loss does not fall, start a "
            f"new run with {', '.join(cures[:-1])} or {cures[-1]}",
        )


def has_collapsed(signals: ModelSignals) -> bool:
    """Whether an image's tokens are all alike after the encoder, and hardly any gradient reaches the first layer.

    Either alone also occurs in models that learn: deep published ones start with equal tokens.
    """
    encoder, decoder = signals.encoder, signals.decoder
    if not (encoder.gradient_norm and decoder.gradient_norm):
        return False
    alike = encoder.token_cosine[-1] > _ALIKE_COSINE and encoder.token_rank[-1] < _ALIKE_RANK
    return alike and encoder.gradient_norm[0] < _LEAST_GRADIENT * decoder.gradient_norm[-1]


def _by_layer(signals: ModelSignals) -> _Measures:
    """Signals of the encoder's layers, then of the decoder's, by name. None for layers that do not have a signal."""
    return {
        name: [
            value
            for part in (signals.encoder, signals.decoder)
            for value in getattr(part, name) or [None] * len(part.token_cosine)
        ]
        for name in SIGNALS
    }


def _signal_metrics(signals: ModelSignals) -> Iterator[tuple[str, float]]:
    layers: dict[SignalPlace, tuple[Signals, int]] = {
        "first": (signals.encoder, 0),
        "last": (signals.encoder, -1),
        "decoder": (signals.decoder, -1),
    }
    for name in SIGNALS:
        for place, (part, layer) in layers.items():
            if values := getattr(part, name):
                yield learning_signal(name, place), values[layer]


def _read_measures(run: Storage | None) -> dict[int, _Measures]:
    """Measures by step of earlier starts of the run; those that cannot be read are left out of the picture."""
    if run is None:
        return {}
    try:
        stored = _MEASURES.validate_json(run.read(MEASURES_FILE))
        return {step: values for step, values in stored.items() if values.keys() >= LAYER_METRICS.keys()}
    except NotFound:
        return {}
    except (OSError, UserError, ValidationError) as error:
        cause = invalid_value(error) if isinstance(error, ValidationError) else error
        logger.warning("%s/%s: %s; the picture of the layers lacks earlier steps", run.uri, MEASURES_FILE, cause)
        return {}


def _write_measures(run: Storage | None, measures: Mapping[int, _Measures]) -> None:
    """Store the measures. If this fails, only a later picture lacks some lines, so the error is only logged."""
    if run is None:
        return
    try:
        run.write(MEASURES_FILE, json.dumps(measures).encode())
    except (OSError, UserError) as error:
        logger.warning("%s/%s cannot be written: %s", run.uri, MEASURES_FILE, error)
