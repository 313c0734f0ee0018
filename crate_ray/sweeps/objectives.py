"""The objectives of a trial: what is followed during training, and what is measured at its end."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import torch

from crate_ray.config import ModelConfig, PretrainConfig, SweepConfig
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.errors import UserError
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.knn import knn_predict
from crate_ray.evaluation.probe import labelled_features, probe_encoder
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import ModelDescription, Normalizer
from crate_ray.runs.metrics import (
    GPU_MEMORY_BYTES,
    IMAGES_PER_SECOND,
    KNN_ACCURACY,
    MEMORY_BYTES,
    PROBE_ACCURACY,
    VALIDATION_LOSS,
)
from crate_ray.runs.planning import Run
from crate_ray.runs.references import load_encoder
from crate_ray.storage.interface import open_storage
from crate_ray.training.pretraining import validation_loss

DURING_TRAINING = {
    "validation_loss": VALIDATION_LOSS,
    "probe_accuracy": PROBE_ACCURACY,
    "knn_accuracy": KNN_ACCURACY,
}
"""Metric of a run that measures an objective while it trains."""


def num_parameters(config: ModelConfig) -> int:
    """Number of trained parameters of a model."""
    with torch.device("meta"):
        model = build_model(config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass
class Followed:
    """What the metrics of a run said so far."""

    last: dict[str, float] = field(default_factory=dict)
    """The last value of every metric."""
    speeds: list[float] = field(default_factory=list)
    """Images per second of every log step."""
    memory: float = 0.0
    """Peak memory in bytes, of the GPU if there is one."""

    def add(self, values: dict[str, float]) -> None:
        """Add metrics of a step."""
        self.last |= values
        if IMAGES_PER_SECOND in values:
            self.speeds.append(values[IMAGES_PER_SECOND])
        self.memory = max(self.memory, values.get(GPU_MEMORY_BYTES, values.get(MEMORY_BYTES, 0.0)))

    def against(self, sweep: SweepConfig, config: ModelConfig) -> dict[str, float]:
        """The second objective, if the sweep has one and it is known."""
        if sweep.against == "parameters":
            return {"parameters": float(num_parameters(config))}
        if sweep.against == "images_per_second" and self.speeds:
            steady = self.speeds[1:] or self.speeds  # the first steps warm up
            return {"images_per_second": statistics.median(steady)}
        if sweep.against == "memory" and self.memory:
            return {"memory": self.memory}
        return {}


def objectives(sweep: SweepConfig, run: Run, followed: Followed, earlier: dict[str, float]) -> dict[str, float]:
    """All objectives of a trial that has been trained, by name, the first one first.

    Args:
        sweep: the sweep.
        run: the trial's run.
        followed: its metrics in this start.
        earlier: objectives that were known when an earlier start of the trial was interrupted.

    Raises:
        UserError: an objective is not finite, or was not measured.
    """
    assert isinstance(run.config, PretrainConfig)
    found: dict[str, float] = {sweep.objective: _first_objective(sweep, run, run.config, followed)}
    if sweep.against:
        second = {**earlier, **followed.against(sweep, run.config.model)}.get(sweep.against)
        if second is None:
            raise UserError(f"{sweep.against} was not measured: the trial made no log step; lower tracking.log_every")
        found[sweep.against] = second
    for name, value in found.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} after the last step; try lower learning rates")
    return found


def _first_objective(sweep: SweepConfig, run: Run, config: PretrainConfig, followed: Followed) -> float:
    if sweep.objective == "validation_loss" and VALIDATION_LOSS in followed.last:
        return followed.last[VALIDATION_LOSS]

    def dataset(uri: str) -> ShardSet:
        return load_dataset(open_storage(uri, config.s3))

    model, description = load_encoder(run.storage.uri, config.tracking, config.s3)
    if sweep.objective == "validation_loss":
        # The run had finished before the trial was interrupted: measure its model again.
        assert config.data.validation is not None
        normalizer = Normalizer.of(description.mean, description.std, torch.device("cpu"))
        return validation_loss(model, dataset(config.data.validation), config, normalizer, None)
    assert sweep.probe is not None  # checked by the config's validation
    train, test = dataset(sweep.probe.train), dataset(sweep.probe.test)
    if sweep.objective == "probe_accuracy":
        return probe_encoder(model, description, train, test, sweep.probe).accuracy
    return _knn_accuracy(sweep, model, description, train, test)


def _knn_accuracy(
    sweep: SweepConfig, model: MaskedAutoencoder, description: ModelDescription, train: ShardSet, test: ShardSet
) -> float:
    assert sweep.probe is not None
    fitted, tested = labelled_features(EvaluatedModel("trained", model, description), train, test, sweep.probe)
    predicted = knn_predict(fitted.features, fitted.labels, tested.features)
    return float((predicted == tested.labels).mean())
