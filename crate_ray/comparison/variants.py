"""The models of a comparison: the base model, baselines and ablations of it, and the user's own variants."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import torch

from crate_ray.config import CompareConfig, CrateMAEConfig, FinetuneConfig, ModelConfig, PretrainConfig, ViTMAEConfig
from crate_ray.config.values import dotted_names, expand, load_settings, merge, nested, suggest, validate
from crate_ray.errors import UserError
from crate_ray.models import build_model

OURS, SAME_SIZE, SAME_PARAMETERS = "crate-mae", "vit-mae", "vit-mae-matched"

_CLOSE = 0.01  # parameter counts that differ by less are equal
_NEIGHBOURS = 4  # widths to try on either side

ABLATIONS: dict[str, dict[str, Any]] = {
    "tied output map": {"model.output_map": "tied"},
    "linear attention": {"model.attention": "linear"},
    "tied decoder": {"model.decoder_maps": "tied"},
    "visible tokens only": {"model.encoder_tokens": "visible"},
    "no sparsity": {"model.sparsity_lambda": 0.0},
}
"""Ablations by name: settings that each change one choice of the published model."""

_RESIDUAL = {"model.residual": "all"}
_OVERCOMPLETE = {**_RESIDUAL, "model.dictionary": "overcomplete"}
SUCCESSORS: dict[str, dict[str, Any]] = {
    "small initialisation": {"model.initialization": "small"},
    "layer scale": {"model.layer_scale": 0.1},
    "all residuals": _RESIDUAL,
    "all residuals and small initialisation": {**_RESIDUAL, "model.initialization": "small"},
    "decoder with ReLU": {**_RESIDUAL, "model.decoder_activation": "relu"},
    "overcomplete x2": {**_OVERCOMPLETE, "model.dictionary_expansion": 2, "model.initialization": "small"},
    "overcomplete x4": {**_OVERCOMPLETE, "model.dictionary_expansion": 4, "model.initialization": "small"},
    "visible keys": {"model.attend_to": "visible"},
    "visible keys in the decoder": {"model.decoder_attend_to": "visible"},
    "long steps": {"model.step_size": 1.0, "model.sparsity_lambda": 0.1},
    "learned thresholds": {"model.threshold": "learned"},
}
"""Variants by name that followed the published model (docs/equations.md), with as many parameters as the base model."""


def count_parameters(model: ModelConfig) -> int:
    """Number of trainable parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(model).parameters())


def vit_of_the_same_size(model: CrateMAEConfig) -> ViTMAEConfig:
    """ViT-MAE of the same width, depth and heads. Its decoder has two thirds of the layers, as in MAE (8 of 12).

    It has no query, key and value biases, like the ViT-MAE of the CRATE-MAE authors.
    """
    return ViTMAEConfig.model_validate(
        {
            **_images(model),
            "dim": model.dim,
            "depth": model.depth,
            "num_heads": _heads(model.dim, model.num_subspaces),
            "decoder_depth": max(1, round(2 / 3 * (model.decoder_depth or model.depth))),
            "qkv_bias": False,
        }
    )


def vit_of_as_many_parameters(model: CrateMAEConfig) -> ViTMAEConfig:
    """ViT-MAE of the same depths. The width, then the MLP ratio, are chosen to match the parameter count."""
    wanted = count_parameters(model)

    def candidate(dim: int, mlp_ratio: float = 4.0) -> ViTMAEConfig:
        return ViTMAEConfig.model_validate(
            {
                **_images(model),
                "dim": dim,
                "depth": model.depth,
                "num_heads": _heads(dim, model.num_subspaces),
                "decoder_depth": model.decoder_depth,
                "mlp_ratio": mlp_ratio,
            }
        )

    def tuned(dim: int) -> tuple[float, ViTMAEConfig]:
        """Relative error of the parameter count at a width, and the config of that width."""
        at_4, at_5 = (count_parameters(candidate(dim, ratio)) for ratio in (4.0, 5.0))
        ratio = min(max(4.0 + (wanted - at_4) / (at_5 - at_4), 2.0), 6.0)
        found = candidate(dim, round(ratio * dim) / dim)
        return abs(count_parameters(found) / wanted - 1), found

    dims = range(4, model.dim + 1, 4)
    middle = bisect.bisect(dims, wanted, key=lambda dim: count_parameters(candidate(dim)))
    found = [tuned(dim) for dim in dims[max(0, middle - _NEIGHBOURS) : middle + _NEIGHBOURS]]
    near = [config for error, config in found if error < _CLOSE]
    if near:
        return min(near, key=lambda config: abs(config.mlp_ratio - 4))
    return min(found, key=lambda pair: pair[0])[1]


def crate_of_as_many_parameters(model: CrateMAEConfig, wanted: int) -> CrateMAEConfig:
    """The same CRATE-MAE with another width, then another dimension p of its subspaces, to have so many parameters."""

    def candidate(dim: int, subspace_dim: int) -> CrateMAEConfig:
        values = model.model_dump(exclude={"preset"}) | {"dim": dim, "subspace_dim": subspace_dim}
        return CrateMAEConfig.model_validate(values)

    def error(found: CrateMAEConfig) -> float:
        return abs(count_parameters(found) / wanted - 1)

    def at(dim: int) -> int:
        return max(1, round(dim / model.num_subspaces))

    dims = range(4, 4 * model.dim, 4)
    middle = bisect.bisect(dims, wanted, key=lambda dim: count_parameters(candidate(dim, at(dim))))
    near = [candidate(dim, at(dim)) for dim in dims[max(0, middle - 2) : middle + 2]]
    found = min(near, key=error)
    if error(found) < _CLOSE:
        return found
    return min((candidate(found.dim, at(found.dim) + more) for more in range(-3, 4) if at(found.dim) + more), key=error)


def plan_variants(config: CompareConfig) -> dict[str, list[PretrainConfig]]:
    """Validated settings of every run: by variant, one per seed.

    Raises UserError for settings that do not exist, and if the base is not a CRATE-MAE.
    """
    names = dotted_names(PretrainConfig)
    for name in [*config.settings, *(name for values in config.variants.values() for name in values)]:
        if name not in names:
            raise UserError(f"there is no pretraining setting {name!r}{suggest(name, names)}")
    base = load_settings(PretrainConfig, Path(config.base))
    base = merge(base, expand(PretrainConfig, config.settings, "settings"))
    model = _run(config, base, OURS, {}, 0).model
    if not isinstance(model, CrateMAEConfig):
        raise UserError(f"{config.base} configures a ViT-MAE; give a CRATE-MAE, from which compare makes the baselines")
    changes: dict[str, dict[str, Any]] = {OURS: {}}
    if config.baselines:
        changes[SAME_SIZE] = {"model": vit_of_the_same_size(model).model_dump(mode="json")}
        changes[SAME_PARAMETERS] = {"model": vit_of_as_many_parameters(model).model_dump(mode="json")}
    if config.ablations:
        changes |= {name: nested(values) for name, values in ABLATIONS.items()}
    if config.successors:
        wanted = count_parameters(model)
        for name, values in SUCCESSORS.items():
            changed = _run(config, base, name, nested(values), 0).model
            assert isinstance(changed, CrateMAEConfig)
            fitting = crate_of_as_many_parameters(changed, wanted)
            changes[name] = {"model": fitting.model_dump(mode="json", exclude={"preset"})}
    for name, values in config.variants.items():
        if name in changes:
            raise UserError(f"variants: {name!r} is the name of a variant that compare makes itself; choose another")
        changes[name] = expand(PretrainConfig, values, f"variants, {name!r}")
    return {name: [_run(config, base, name, values, seed) for seed in config.seeds] for name, values in changes.items()}


def plan_finetunings(config: CompareConfig, run: PretrainConfig) -> dict[str, FinetuneConfig]:
    """Settings of the fine-tunings after a pretraining: 'finetuned', and 'scratch' as a control. Empty if not wanted.

    Raises UserError for settings that do not exist.
    """
    if config.finetune is None:
        return {}
    names = dotted_names(FinetuneConfig)
    for name in config.finetune_settings:
        if name not in names:
            raise UserError(f"there is no fine-tuning setting {name!r}{suggest(name, names)}")
    base = load_settings(FinetuneConfig, Path(config.finetune))
    base = merge(base, expand(FinetuneConfig, config.finetune_settings, "finetune_settings"))
    planned = {}
    for kind in ("finetuned", "scratch"):
        model = f"{run.storage}/{run.name}/model"
        ours = {
            "name": f"{run.name}-{kind}",
            "storage": run.storage,
            "seed": run.seed,
            "model": f"scratch:{model}" if kind == "scratch" else model,
            "data": {"train": config.probe.train, "validation": config.probe.test},
            "tracking": config.tracking.model_dump(),
            "s3": config.s3.model_dump(),
        }
        try:
            planned[kind] = validate(FinetuneConfig, merge(base, ours))
        except UserError as error:
            raise UserError(f"{config.finetune}: {error}") from None
    return planned


def _run(
    config: CompareConfig, base: dict[str, Any], variant: str, changes: dict[str, Any], seed: int
) -> PretrainConfig:
    ours = {
        "name": f"{variant.replace(' ', '-')}-seed-{seed}",
        "storage": f"{config.storage.rstrip('/')}/{config.name}",
        "seed": seed,
        "tracking": config.tracking.model_dump(),
        "s3": config.s3.model_dump(),
    }
    values = dict(base)
    if changes.get("model", {}).get("architecture"):  # another architecture: drop the base's model settings
        values["model"] = {}
    try:
        run = validate(PretrainConfig, merge(merge(values, changes), ours))
    except UserError as error:
        raise UserError(f"variant {variant!r}: {error}") from None
    if run.data.validation is None:
        raise UserError("compare needs held-out data: set data.validation in base or settings")
    if run.init_from is not None:
        raise UserError("compare trains every model from random weights: leave init_from out of base and settings")
    return run


def _images(model: CrateMAEConfig) -> dict[str, Any]:
    names = ("image_size", "patch_size", "channels", "mask_ratio", "norm_pix_loss")
    return {name: getattr(model, name) for name in names}


def _heads(dim: int, wanted: int) -> int:
    """The number of heads nearest to the wanted one that divides a width."""
    return min((heads for heads in range(1, dim + 1) if dim % heads == 0), key=lambda heads: abs(heads - wanted))
