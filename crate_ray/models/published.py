"""Import and export of checkpoints in the form of the published code, exact in both directions.

Files are read as tensors only (`weights_only=True` or safetensors), so that no code in them is ever executed.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from crate_ray.config import CRATE_PRESETS, CrateMAEConfig
from crate_ray.errors import UserError, invalid_value
from crate_ray.models.crate import CrateMAE
from crate_ray.models.fit import check_not_empty, check_plain_zip, check_stored, safetensors_shapes
from crate_ray.models.patches import sincos_positions

POSITION_TABLES = ("pos_embed", "decoder_pos_embed")
UNUSED = (*POSITION_TABLES, "decoder_embed.weight", "decoder_embed.bias")
"""Tensors of every published checkpoint that are not trained."""

POSITION_TOLERANCE = 1e-6


def load_published(
    source: str | Path | Mapping[str, Any],
    config: CrateMAEConfig | None = None,
) -> CrateMAE:
    """Load a published checkpoint into a CRATE-MAE on the CPU, in the checkpoint's dtype.

    Parameters
    ----------
    source
        A safetensors file (by its suffix) or a file of `torch.save`, or the content of one: tensors or NumPy arrays
        by published name, at the top level or under 'model' or 'state_dict', with or without the prefix 'module.'.
    config
        Config of the model. By default it is inferred from the tensors' shapes, for a square grid of patches. No shape
        depends on the number of subspaces, which is that of the preset with the same sizes. Settings that no shape
        depends on (λ, η, mask ratio, loss) have the published defaults.

    Raises
    ------
    UserError
        If the file is not a checkpoint of tensors, names are missing or unexpected, the config cannot be inferred or
        disagrees with the sizes, dtypes are mixed, or the position tables are not those of the model.
    """
    state = _plain_state(_read(Path(source)) if isinstance(source, str | Path) else source)
    sizes = _sizes(state)
    if config is None:
        config = _infer_config(sizes)
    _require_published_form(config)
    _check_sizes(sizes, config)
    names = dict(_parameter_names(config))
    _check_names(state, {*names, *UNUSED})

    dtypes = {state[name].dtype for name in names}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = ", ".join(sorted(map(str, dtypes)))
        raise UserError(f"the checkpoint's parameters have the dtypes {found}; convert all to one float dtype")

    with torch.device("meta"):
        own_shapes = {name: tensor.shape for name, tensor in CrateMAE(config).state_dict().items()}
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own_shapes[own])}"
        for name, own in names.items()
        if state[name].shape != own_shapes[own]
    ]
    if wrong:
        raise UserError(f"shapes in the checkpoint differ from those of the config: {_listing(wrong)}")
    _check_positions(state, config)

    model = CrateMAE(config).to(dtypes.pop())
    model.load_state_dict({own: state[name] for name, own in names.items()})
    model.unused_published = {name: state[name].clone() for name in UNUSED}
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
    table = _position_table(model.config).to(torch.promote_types(dtype, torch.float32))
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


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            check_not_empty(safetensors_shapes(path))
            content: Any = safetensors.torch.load_file(path)
        else:
            check_plain_zip(path)
            # MAE's training script saves its parsed arguments with the weights. They are plain attributes, not code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise any exception
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} is not a readable checkpoint of tensors, and nothing in it was executed "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _plain_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor):
            raise UserError(f"entry {name!r} of the checkpoint is a {type(value).__name__}, not a tensor")
        try:
            check_stored(str(name), value)
        except ValueError as error:
            raise UserError(f"the checkpoint is damaged: {error}") from None
        state[str(name).removeprefix("module.")] = value.detach().cpu()
    return state


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of the model, inferred from the shapes, by their name in the config or a description."""
    kernel, table, qkv = "patch_embed.proj.weight", "decoder_pos_embed", "blocks.0.layers.0.0.fn.qkv.weight"
    dimensions = {kernel: 4, table: 3, qkv: 2}
    missing = [name for name in dimensions if name not in state]
    if missing:
        raise UserError(f"this is not a published CRATE-MAE checkpoint: missing {_listing(missing)}")
    for name, expected in dimensions.items():
        if state[name].ndim != expected:
            raise UserError(f"{name} of the checkpoint has {state[name].ndim} dimensions instead of {expected}")

    def depth(blocks: str) -> int:
        found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in state)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    dim, channels, patch_h, patch_w = state[kernel].shape
    if state[table].shape[2] != dim:
        raise UserError(f"{table} of the checkpoint has tokens of {state[table].shape[2]} numbers, not {dim}")
    return {
        "dim": dim,
        "depth": depth("blocks"),
        "decoder_depth": depth("decoder_blocks"),
        "channels": channels,
        "patch_size": (patch_h, patch_w),
        "number of patches": state[table].shape[1] - 1,
        "num_subspaces × subspace_dim": state[qkv].shape[0],
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


def _check_sizes(sizes: Mapping[str, Any], config: CrateMAEConfig) -> None:
    wrong = [
        f"{name} is {sizes[name]} in the checkpoint and {expected} in the config"
        for name, expected in _config_sizes(config).items()
        if sizes[name] != expected
    ]
    if wrong:
        raise UserError(f"the config does not match the checkpoint: {'; '.join(wrong)}")


def _check_names(state: Mapping[str, Tensor], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    parts = [f"missing {_listing(missing)}"] if missing else []
    parts += [f"unexpected {_listing(unexpected)}"] if unexpected else []
    if parts:
        raise UserError(f"the checkpoint's names are not those of a published CRATE-MAE: {'; '.join(parts)}")


def _check_positions(state: Mapping[str, Tensor], config: CrateMAEConfig) -> None:
    shape = (1, config.num_patches + 1, config.dim)
    for name in POSITION_TABLES:
        if state[name].shape != shape:
            raise UserError(f"{name} of the checkpoint has shape {tuple(state[name].shape)}, not {shape}")
    ours = _position_table(config).double()
    for name in POSITION_TABLES:
        theirs = state[name]
        tolerance = POSITION_TOLERANCE
        if theirs.is_floating_point():  # a checkpoint in half precision rounds its tables
            tolerance = max(tolerance, torch.finfo(theirs.dtype).eps if theirs.element_size() < 4 else 0)
        difference = (theirs.double() - ours).abs().max().item()
        if not difference <= tolerance:
            grid = " × ".join(map(str, config.grid_hw))
            raise UserError(
                f"{name} of the checkpoint differs by up to {difference:.2g} from the sine-cosine positions of a grid "
                f"of {grid} patches; for another grid pass a config with its image_size"
            )


def _position_table(config: CrateMAEConfig) -> Tensor:
    """The published table (1, 1 + N, D): a zero position for the CLS token, then the grid's."""
    return torch.nn.functional.pad(sincos_positions(config.dim, config.grid_hw), (0, 0, 1, 0))


def _require_published_form(config: CrateMAEConfig) -> None:
    switches = {"output_map": "learned", "attention": "softmax", "decoder_maps": "free", "encoder_tokens": "all"}
    other = [name for name, value in switches.items() if getattr(config, name) != value]
    if other:
        raise UserError(f"published checkpoints exist only with the default of {_listing(other)}")
    if config.num_subspaces == 1 and config.subspace_dim == config.dim:
        raise UserError("the published model has no output map W if there is one subspace of the full dimension")


def _listing(names: list[str], limit: int = 8) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
