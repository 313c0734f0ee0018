"""Turns a sweep's settings into pretraining configs. Settings are merged as plain YAML values, then validated."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from crate_ray.config import PretrainConfig, SweepConfig
from crate_ray.config.values import dotted_names, expand, load_settings, merge, nested, suggest, validate
from crate_ray.errors import UserError
from crate_ray.sweeps.candidates import check_space
from crate_ray.sweeps.combinations import Values, valid_combination

TRIALS_FOLDER = "trials"
_OURS = ("name", "storage", "tracking", "s3")
_CHANGES_LOSS = (
    "model.mask_ratio", "model.norm_pix_loss", "model.patch_size", "model.image_size", "model.channels",
    "data.validation", "data.mean", "data.std",
)  # fmt: skip
"""Settings that change which error the validation loss is the mean of. CRATE-MAE and ViT-MAE have the same loss."""


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
    for name, space in sweep.search.items():

        def why(value: Any, name: str = name) -> str:
            try:
                valid_combination(sweep, partial(why_invalid, sweep, shared), {name: value})
            except UserError as error:
                return str(error)
            return ""

        check_space(name, space, why)
    config = reference_config(sweep, shared)
    if sweep.objective == "validation_loss" and config.data.validation is None:
        raise UserError("objective 'validation_loss' needs held-out data: set data.validation in base or settings")
    if sweep.early_stopping != "none" and config.training.validate_every is None:
        raise UserError("early_stopping needs an objective during training: set training.validate_every in settings")
    _check_comparable(sweep, config)
    return shared


def why_invalid(sweep: SweepConfig, shared: dict[str, Any], values: Values) -> str:
    """Why values are no valid settings together; empty if they are."""
    try:
        trial_config(sweep, shared, values, "check")
    except UserError as error:
        return str(error)
    return ""


def reference_config(sweep: SweepConfig, shared: dict[str, Any]) -> PretrainConfig:
    """Settings of a trial that can work: those of the base, with searched values if the base alone is not valid."""
    try:
        values = valid_combination(sweep, partial(why_invalid, sweep, shared))
    except UserError as error:
        raise UserError(f"no combination of the searched values works: {error}") from None
    return trial_config(sweep, shared, values, "check")


def _check_comparable(sweep: SweepConfig, config: PretrainConfig) -> None:
    """Raise UserError if trials would measure their validation loss in different ways."""
    searched = {
        name for name, space in sweep.search.items() if space.choice is None or len(set(map(str, space.choice))) > 1
    }
    different = sorted(searched & set(_CHANGES_LOSS))
    if "data.train" in searched and not (config.data.mean and config.data.std):
        different.append("data.train (whose mean and standard deviation normalise the images)")
    if sweep.objective == "validation_loss" and different:
        raise UserError(
            f"validation losses of trials with different {' and '.join(different)} are not comparable; search with "
            "objective probe_accuracy, and set probe.train and probe.test"
        )
