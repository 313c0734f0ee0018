"""A pretraining run before it trains: open it, and give it the weights that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from crate_ray.config import PretrainConfig
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.runs.checkpoint import INITIAL_WEIGHTS, write_initial_weights, write_record
from crate_ray.runs.planning import Run, plan_run, with_absolute_paths


def open_run(config: PretrainConfig) -> Run:
    """Check the settings against the data and, when the run exists, against its record; nothing is started yet.

    Raises UserError when the data is missing or does not fit, or when the run was begun with other data or another
    model.
    """
    return plan_run(with_absolute_paths(config), config.model)


def start_from(run: Run, load: Callable[[str], Mapping[str, Tensor]]) -> Run:
    """The run, with the weights of `init_from` stored beside it, where it has not begun yet; else the run as it is.

    `load` gives the weights behind the reference. They are looked up once: a start that is repeated finds what the
    first one stored, wherever an alias points by then. Call it with the run's lease (see planning.driver_lease). Raises
    UserError when they do not fit the model.
    """
    config, record = run.config, run.record
    assert isinstance(config, PretrainConfig)
    if config.init_from is None or run.first_step:
        return run
    if record.initial_weights and run.storage.exists(INITIAL_WEIGHTS):
        return run
    weights = load(config.init_from)
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
    digest = write_initial_weights(run.storage, {name: tensor.float() for name, tensor in weights.items()})
    record = record.model_copy(update={"initial_weights": digest})
    write_record(run.storage, record)
    return replace(run, record=record)
