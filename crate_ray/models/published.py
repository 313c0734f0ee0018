"""Import of published checkpoints of CRATE-MAE, CRATE, CRATE-α and ViT-MAE, and export of CRATE-MAE, exact both ways.

`checkpoint_file` reads the files. `published_crate` has the names of CRATE and CRATE-α, `published_vit` those of
ViT-MAE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from pydantic import ValidationError
from torch import Tensor

from crate_ray.config import CRATE_PRESETS, CrateMAEConfig, ViTMAEConfig
from crate_ray.errors import UserError, invalid_value
from crate_ray.models.checkpoint_file import (
    check_names,
    check_sizes,
    check_tensors,
    depth_of,
    listing,
    plain_tensors,
    read_checkpoint,
    saved_arguments,
)
from crate_ray.models.crate import CrateMAE
from crate_ray.models.position_tables import position_table, table_grid
from crate_ray.models.published_crate import layout_of, load_crate_encoder
from crate_ray.models.published_vit import is_vit, load_vit
from crate_ray.models.vit import ViTMAE

POSITION_TABLES = ("pos_embed", "decoder_pos_embed")
UNUSED = (*POSITION_TABLES, "decoder_embed.weight", "decoder_embed.bias")
"""Tensors of every published checkpoint of CRATE-MAE that are not trained."""
_MSSA = "blocks.0.layers.0.0.fn.qkv.weight"


@overload
def load_published(
    source: str | Path | Mapping[str, Any], config: CrateMAEConfig, *, name: str | None = None
) -> CrateMAE: ...


@overload
def load_published(
    source: str | Path | Mapping[str, Any], config: ViTMAEConfig, *, name: str | None = None
) -> ViTMAE: ...


@overload
def load_published(
    source: str | Path | Mapping[str, Any],
    config: CrateMAEConfig | ViTMAEConfig | None = None,
    *,
    name: str | None = None,
) -> CrateMAE | ViTMAE: ...


def load_published(
    source: str | Path | Mapping[str, Any],
    config: CrateMAEConfig | ViTMAEConfig | None = None,
    *,
    name: str | None = None,
) -> CrateMAE | ViTMAE:
    """Load a published checkpoint of CRATE-MAE, CRATE, CRATE-α or ViT-MAE on the CPU, in the checkpoint's dtype.

    Checkpoints of CRATE and CRATE-α, and most of ViT-MAE, become encoders without a decoder. Their heads are left out.

    Parameters
    ----------
    source
        A safetensors file or a file of `torch.save`, or the content of one: tensors or NumPy arrays by published name.
        They may be stored under 'model', 'state_dict', 'teacher' and the like, and their names may begin with
        'module.', '_orig_mod.' and the like.
    config
        Config of the model. By default it is inferred from the tensors' shapes, for a square grid of patches. No shape
        depends on the number of subspaces or heads, which is that of the published model with the same sizes. Settings
        that no shape depends on (λ, η, mask ratio, loss) have the published defaults. For CRATE and CRATE-α, the
        settings of the layers' form are the checkpoint's. The image size of CRATE-MAE and ViT-MAE may be another one
        than the checkpoint's, because their positions are computed.
    name
        Name of the file in messages, if it is another one.

    Raises
    ------
    UserError
        If the file is not a checkpoint of tensors, names are missing or unexpected, the config cannot be inferred or
        disagrees with the sizes, dtypes are mixed, or the positions of a CRATE-MAE or ViT-MAE are learned.
    """
    content = read_checkpoint(Path(source), name) if isinstance(source, str | Path) else source
    state = plain_tensors(content)
    where = name or (str(source) if isinstance(source, str | Path) else "the checkpoint")
    if is_vit(state):
        if isinstance(config, CrateMAEConfig):
            raise UserError(f"{where} is a checkpoint of ViT-MAE; set model.architecture vit_mae")
        return load_vit(state, config, saved_arguments(content))
    layout = layout_of(state)
    if isinstance(config, ViTMAEConfig):
        if layout is not None or _MSSA in state:
            title = "CRATE-MAE" if layout is None else layout.title
            raise UserError(f"{where} is a checkpoint of {title}; set model.architecture crate_mae")
        raise UserError(f"{where} is not a checkpoint of ViT-MAE: it has no blocks.0.attn.qkv.weight")
    if layout is not None:
        return load_crate_encoder(state, layout, config)
    return _load_crate(state, config)


def _load_crate(state: Mapping[str, Tensor], config: CrateMAEConfig | None) -> CrateMAE:
    sizes = _sizes(state)
    if config is None:
        config = _infer_config(sizes)
    _require_published_form(config.model_copy(update={"position_grid": None}))
    expected = _config_sizes(config)
    del expected["number of patches"]  # positions are computed
    check_sizes(sizes, expected)
    names = dict(_parameter_names(config))
    check_names(state, {*names, *UNUSED}, "a published CRATE-MAE")

    with torch.device("meta"):
        dtype = check_tensors(state, names, CrateMAE(config).state_dict())
    same_grid = _check_positions(state, config)

    model = CrateMAE(config).to(dtype)
    model.load_state_dict({own: state[name] for name, own in names.items()})
    unused = UNUSED if same_grid else [name for name in UNUSED if name not in POSITION_TABLES]
    model.unused_published = {name: state[name].clone() for name in unused}
    return model


def export_published(model: CrateMAE) -> dict[str, Tensor]:
    """Copies of the model's weights on the CPU, by published name. `load_published` reads them back exactly.

    The published code also stores two position tables and a linear map that it does not use. The export has the values
    that the model was imported with, or else computed tables and a linear map of zeros.

    Raises
    ------
    UserError
        If the published code does not have such a model (switches of the ablations).
    """
    _require_published_form(model.config)
    own = model.state_dict()
    exported = {name: own[own_name].detach().cpu().clone() for name, own_name in _parameter_names(model.config)}
    # load_published would not recognise tables of lower precision than float32.
    dtype = exported["cls_token"].dtype
    table = position_table(model.config.dim, model.config.grid_hw).to(torch.promote_types(dtype, torch.float32))
    dim = model.config.dim
    fresh = {
        "pos_embed": table,
        "decoder_pos_embed": table,
        "decoder_embed.weight": torch.zeros(dim, dim, dtype=dtype),
        "decoder_embed.bias": torch.zeros(dim, dtype=dtype),
    }
    return exported | {name: model.unused_published.get(name, fresh[name]).clone() for name in UNUSED}


def _parameter_names(config: CrateMAEConfig) -> Iterator[tuple[str, str]]:
    """Pairs (published name, our name) of all parameters.

    In the published code, `blocks.L.layers.0.0` and `.1` are the first and second operator of layer L, each with its
    norm. These are MSSA and ISTA in the encoder, and the linear map E and MSSA in the decoder.
    """
    assert config.decoder_depth is not None
    yield from (("cls_token", "cls_token"), ("mask_token", "mask_token"))
    mssa = {"fn.qkv.weight": "subspaces", "fn.to_out.0.weight": "output.weight", "fn.to_out.0.bias": "output.bias"}
    norm = ("weight", "bias")
    for part in norm:
        yield f"patch_embed.proj.{part}", f"patch_embed.{part}"
        yield f"norm.{part}", f"encoder_norm.{part}"
        yield f"decoder_norm.{part}", f"decoder_norm.{part}"
        yield f"decoder_pred.{part}", f"prediction.{part}"
    for theirs, ours, depth, mssa_index, map_index, map_norm, map_weight in (
        ("blocks", "encoder", config.depth, 0, 1, "ista_norm", "ista.dictionary"),
        ("decoder_blocks", "decoder", config.decoder_depth, 1, 0, "expansion_norm", "expansion"),
    ):
        for index in range(depth):
            layer, own = f"{theirs}.{index}.layers.0", f"{ours}.{index}"
            for part in norm:
                yield f"{layer}.{mssa_index}.norm.{part}", f"{own}.mssa_norm.{part}"
                yield f"{layer}.{map_index}.norm.{part}", f"{own}.{map_norm}.{part}"
            for name, own_name in mssa.items():
                yield f"{layer}.{mssa_index}.{name}", f"{own}.mssa.{own_name}"
            yield f"{layer}.{map_index}.fn.weight", f"{own}.{map_weight}"


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of the model, inferred from the shapes, by their name in the config or a description."""
    kernel, table = "patch_embed.proj.weight", "decoder_pos_embed"
    dimensions = {kernel: 4, table: 3, _MSSA: 2}
    missing = [name for name in dimensions if name not in state]
    if missing:
        raise UserError(
            f"this is no checkpoint of CRATE-MAE, CRATE, CRATE-α or ViT-MAE: missing {listing(missing)}; its names "
            f"are {listing(sorted(state), 4) or 'none'}"
        )
    for name, expected in dimensions.items():
        if state[name].ndim != expected:
            raise UserError(f"{name} of the checkpoint has {state[name].ndim} dimensions instead of {expected}")

    dim, channels, patch_h, patch_w = state[kernel].shape
    if state[table].shape[2] != dim:
        raise UserError(f"{table} of the checkpoint has tokens of {state[table].shape[2]} numbers, not {dim}")
    return {
        "dim": dim,
        "depth": depth_of(state, "blocks"),
        "decoder_depth": depth_of(state, "decoder_blocks"),
        "channels": channels,
        "patch_size": (patch_h, patch_w),
        "number of patches": state[table].shape[1] - 1,
        "num_subspaces × subspace_dim": state[_MSSA].shape[0],
    }


def _infer_config(sizes: Mapping[str, Any]) -> CrateMAEConfig:
    patches = sizes["number of patches"]
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise UserError(f"the checkpoint's {patches} patches are not a square grid; pass a config with its image_size")
    for preset in CRATE_PRESETS:
        try:
            config = CrateMAEConfig.model_validate(
                {
                    "preset": preset,
                    "channels": sizes["channels"],
                    "patch_size": sizes["patch_size"],
                    "image_size": tuple(side * patch for patch in sizes["patch_size"]),
                }
            )
        except ValidationError as error:
            raise UserError(f"the checkpoint's sizes are those of no model: {invalid_value(error)}") from None
        if _config_sizes(config) == dict(sizes):
            return config
    raise UserError(
        f"no preset has dim {sizes['dim']}, depth {sizes['depth']} and decoder_depth {sizes['decoder_depth']}, and the "
        "number of subspaces cannot be inferred from a checkpoint; pass a config"
    )


def _config_sizes(config: CrateMAEConfig) -> dict[str, Any]:
    assert config.subspace_dim is not None
    return {
        "dim": config.dim,
        "depth": config.depth,
        "decoder_depth": config.decoder_depth,
        "channels": config.channels,
        "patch_size": config.patch_hw,
        "number of patches": config.num_patches,
        "num_subspaces × subspace_dim": config.num_subspaces * config.subspace_dim,
    }


def _check_positions(state: Mapping[str, Tensor], config: CrateMAEConfig) -> bool:
    """Whether the position tables are those of the config's grid. Raises UserError if they are of none."""
    shape = state[POSITION_TABLES[1]].shape  # `_sizes` has checked this one
    for name in POSITION_TABLES:
        if state[name].shape != shape:
            raise UserError(f"{name} of the checkpoint has shape {tuple(state[name].shape)}, not {tuple(shape)}")
    grids = {table_grid(name, state[name], config.dim, config.grid_hw) for name in POSITION_TABLES}
    return grids == {config.grid_hw}


def _require_published_form(config: CrateMAEConfig) -> None:
    if config.unpublished:
        raise UserError(f"published checkpoints exist only with the default of {listing(config.unpublished)}")
    if config.num_subspaces == 1 and config.subspace_dim == config.dim:
        raise UserError("the published model has no output map W if there is one subspace of the full dimension")
    if not config.decoder_depth:
        raise UserError("a published CRATE-MAE has a decoder, and this model is an encoder alone")
