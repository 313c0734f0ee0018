"""Turns a sweep's settings into pretraining configs. Settings are merged as plain YAML values, then validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crate_ray.config import PretrainConfig, SweepConfig
from crate_ray.config.values import dotted_names, expand, load_settings, merge, nested, suggest, validate
from crate_ray.errors import UserError
from crate_ray.sweeps.candidates import check_space

TRIALS_FOLDER = "trials"
_OURS = ("name", "storage", "tracking", "s3")


def trial_config(sweep: SweepConfig, shared: dict[str, Any], values: dict[str, Any], name: str) -> PretrainConfig:
    """Settings of one trial: the shared YAML values with the sampled (dotted) ones over them, validated together.

    Defaults are filled in only here. So a default that depends on other settings (subspace_dim = dim / num_subspaces)
    depends on the sampled values.
    """
    ours = {
        "name": name,
        "storage": f"{sweep.storage.rstrip('/')}/{sweep.name}/{TRIALS_FOLDER}",
        "tracking": sweep.tracking.model_dump(),
        "s3": sweep.s3.model_dump(),
    }
    return validate(PretrainConfig, merge(merge(shared, nested(values)), ours))


def shared_values(sweep: SweepConfig) -> dict[str, Any]:
    """The values that all trials share: the base's YAML values with the sweep's settings over them.

    Validates every candidate of every searched setting with them. Raises UserError for a setting that does not exist
    (with a suggestion), or a value of the wrong type.
    """
    names = dotted_names(PretrainConfig)
    for name in [*sweep.settings, *sweep.search]:
        if name not in names:
            raise UserError(f"sweep over {name!r}: there is no such pretraining setting{suggest(name, names)}")
        if any(other.startswith(f"{name}.") for other in names):
            raise UserError(f"sweep over {name!r}: it is a group of settings; name one inside, such as {name}.…")
        if name.split(".")[0] in _OURS:
            raise UserError(f"sweep over {name!r}: the sweep itself sets {name.split('.')[0]}")
    base = load_settings(PretrainConfig, Path(sweep.base))
    shared = merge(base, expand(PretrainConfig, sweep.settings, "settings"))
    config = trial_config(sweep, shared, {}, "check")
    for name, space in sweep.search.items():

        def why(value: Any, name: str = name) -> str:
            try:
                trial_config(sweep, shared, {name: value}, "check")
            except UserError as error:
                return str(error)
            return ""

        check_space(name, space, why)
    if sweep.objective == "validation_loss" and config.data.validation is None:
        raise UserError("objective 'validation_loss' needs held-out data: set data.validation in base or settings")
    if sweep.grace_steps and config.training.validate_every is None:
        raise UserError("grace_steps needs validations during training: set training.validate_every in settings")
    return shared
