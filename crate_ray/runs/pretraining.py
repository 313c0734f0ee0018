"""Open a pretraining run: check it against its data and its record, and store the weights that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from crate_ray.config import OnlineProbeConfig, PretrainConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.runs.initial_weights import INITIAL_WEIGHTS, write_initial_weights
from crate_ray.runs.planning import Run, plan_run, with_absolute_paths
from crate_ray.runs.record import write_record
from crate_ray.runs.references import load_weights
from crate_ray.storage.interface import open_storage


def open_run(config: PretrainConfig) -> Run:
    """Check the settings against the data and, if the run exists, against its record. Writes and starts nothing.

    Raises:
        UserError: the data is missing or does not fit, or the run was started with other data or another model.
    """
    config = with_absolute_paths(config)
    if config.probe:
        config = config.model_copy(update={"probe": _check_probe(config.probe, config)})
    return plan_run(config, config.model)


def _check_probe(probe: OnlineProbeConfig, config: PretrainConfig) -> OnlineProbeConfig:
    """Open the labelled datasets, so that mistakes are found before training. Returns the probe with absolute paths."""
    opened = {name: load_dataset(open_storage(getattr(probe, name), config.s3)) for name in ("train", "test")}
    for name, shards in opened.items():
        uri, manifest = shards.storage.uri, shards.manifest
        if manifest.num_classes is None:
            raise UserError(f"probe.{name} {uri} has samples without a class number (member 'cls'); give labelled data")
        if manifest.kind == "grid" and manifest.channels != config.model.channels:
            raise UserError(
                f"probe.{name} {uri} has {manifest.channels} channels, the model has {config.model.channels}; give "
                "data like the training data"
            )
    return probe.model_copy(update={name: shards.storage.uri for name, shards in opened.items()})


def open_pretraining(config: PretrainConfig) -> Run:
    """Open a run and store the weights of `init_from`, if any. Needs the run's lease (see planning.driver_lease).

    Raises:
        UserError: as `open_run` and `start_from`.
    """
    return start_from(open_run(config))


def start_from(run: Run, load: Callable[[str], Mapping[str, Tensor]] | None = None) -> Run:
    """Store the weights of `init_from` with the run, unless it has begun. Returns the run with their digest.

    The reference is resolved once. A repeated start uses the weights that the first start stored, even if an alias has
    moved since. Needs the run's lease (see planning.driver_lease).

    Args:
        run: the run.
        load: loads weights by reference; by default references.load_weights.

    Raises:
        UserError: the weights do not exist or do not fit the model.
    """
    config, record = run.config, run.record
    assert isinstance(config, PretrainConfig)
    if config.init_from is None or run.first_step:
        return run
    if record.initial_weights and run.storage.exists(INITIAL_WEIGHTS):
        return run
    if load is None:
        weights: Mapping[str, Tensor] = load_weights(config.init_from, config.model, config.tracking, config.s3)
    else:
        weights = load(config.init_from)
    _check_shapes(weights, config)
    digest = write_initial_weights(run.storage, {name: tensor.float() for name, tensor in weights.items()})
    record = record.model_copy(update={"initial_weights": digest})
    write_record(run.storage, record)
    return replace(run, record=record)


def _check_shapes(weights: Mapping[str, Tensor], config: PretrainConfig) -> None:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build_model(config.model).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted({*expected, *given}):
        if expected.get(name) != given.get(name):
            described = f"{name} has the shape {given[name]}" if name in given else f"there is no {name}"
            wanted = f"the run's model has {expected[name]}" if name in expected else "the run's model has none"
            raise UserError(
                f"the weights of init_from {config.init_from} do not fit the model: {described}, {wanted}; "
                "give the model settings that they were trained with, or other weights"
            )
