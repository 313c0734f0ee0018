"""Import of public checkpoints of ViT-MAE, such as MAE's own (`mae_pretrain_vit_base.pth`).

The names are those of MAE's code. Most public files hold the encoder alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from crate_ray.config import VIT_PRESETS, ViTMAEConfig
from crate_ray.errors import UserError, invalid_value
from crate_ray.models.checkpoint_file import check_names, check_sizes, check_tensors, depth_of
from crate_ray.models.position_tables import table_grid
from crate_ray.models.vit import ViTMAE

_QKV = "blocks.0.attn.qkv.weight"
_TABLES = ("pos_embed", "decoder_pos_embed")
HEADS = {192: 3, 384: 6, 576: 12, 768: 12, 1024: 16, 1280: 16}
"""Heads of published encoders by width."""
_DECODER_HEADS = {512: 16} | {
    sizes["dim"]: sizes.get("decoder_num_heads", sizes["num_heads"])
    for name, sizes in VIT_PRESETS.items()
    if not name.endswith("-matched")
}
"""Heads of published decoders by width: MAE's, and those of the authors of CRATE-MAE."""


def is_vit(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of a vision transformer."""
    return _QKV in state


def load_vit(state: Mapping[str, Tensor], config: ViTMAEConfig | None, arguments: Mapping[str, Any]) -> ViTMAE:
    """A ViT-MAE with these weights, in their dtype. Without a decoder if they have none.

    Args:
        state: tensors by MAE's names.
        config: config of the model; inferred if None. Its decoder_depth does not count if there is no decoder.
        arguments: of the script that trained it, if they are stored.

    Raises:
        UserError: as `load_published`.
    """
    sizes = _sizes(state)
    if config is None:
        config = _infer_config(sizes, arguments)
    else:
        if not sizes["decoder_depth"]:
            config = ViTMAEConfig.model_validate(config.model_dump() | {"decoder_depth": 0})
        _check_sizes(sizes, config)
    names = dict(_parameter_names(config))
    tables = _TABLES if config.decoder_depth else _TABLES[:1]
    hint = ""
    if any(name.startswith(("head.", "fc_norm.")) for name in state):
        hint = "; it is a trained classifier, give the pretrained encoder instead"
    check_names(state, {*names, *tables}, "a ViT-MAE", hint=hint)
    with torch.device("meta"):
        dtype = check_tensors(state, names, ViTMAE(config).state_dict())
    for name, dim in zip(tables, (config.dim, config.decoder_dim or 0), strict=False):
        table_grid(name, state[name], dim, config.grid_hw)
    model = ViTMAE(config).to(dtype)
    model.load_state_dict({own: state[name] for name, own in names.items()})
    return model


def _parameter_names(config: ViTMAEConfig) -> Iterator[tuple[str, str]]:
    """Pairs (MAE's name, our name) of all parameters."""
    layer = {
        "norm1": "attention_norm",
        "attn.qkv": "qkv",
        "attn.proj": "attention_output",
        "norm2": "mlp_norm",
        "mlp.fc1": "mlp_input",
        "mlp.fc2": "mlp_output",
    }
    around = {"patch_embed.proj": "patch_embed", "norm": "encoder_norm"}
    stacks = [("blocks", "encoder", config.depth)]
    yield "cls_token", "cls_token"
    if config.decoder_depth:
        yield "mask_token", "mask_token"
        around |= {"decoder_embed": "decoder_embed", "decoder_norm": "decoder_norm", "decoder_pred": "prediction"}
        stacks.append(("decoder_blocks", "decoder", config.decoder_depth))
    for theirs, ours in around.items():
        for part in ("weight", "bias"):
            yield f"{theirs}.{part}", f"{ours}.{part}"
    for their_stack, our_stack, depth in stacks:
        for index in range(depth):
            for theirs, ours in layer.items():
                for part in ("weight", "bias"):
                    if theirs != "attn.qkv" or part == "weight" or config.qkv_bias:
                        yield f"{their_stack}.{index}.{theirs}.{part}", f"{our_stack}.{index}.{ours}.{part}"


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of the model by their name in the config."""
    dimensions = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    decoder = any(name.startswith("decoder_") for name in state)
    if decoder:
        dimensions["decoder_embed.weight"] = 2
    check_names(state, dimensions.keys(), "a ViT-MAE", only_missing=True)
    for name, expected in dimensions.items():
        if state[name].ndim != expected:
            raise UserError(f"{name} of the checkpoint has {state[name].ndim} dimensions instead of {expected}")

    dim, channels, *patch_hw = state["patch_embed.proj.weight"].shape
    return {
        "dim": dim,
        "depth": depth_of(state, "blocks"),
        "decoder_dim": state["decoder_embed.weight"].shape[0] if decoder else dim,
        "decoder_depth": depth_of(state, "decoder_blocks") if decoder else 0,
        "channels": channels,
        "patch_size": tuple(patch_hw),
        "the MLP's hidden width": state["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "patches": state["pos_embed"].shape[1] - 1,
    }


def _infer_config(sizes: Mapping[str, Any], arguments: Mapping[str, Any]) -> ViTMAEConfig:
    side = math.isqrt(max(sizes["patches"], 0))
    if side < 1 or side * side != sizes["patches"]:
        raise UserError(
            f"the checkpoint's {sizes['patches']} patches are not a square grid; pass a config with its image_size"
        )
    dim, decoder_dim = sizes["dim"], sizes["decoder_dim"]
    heads, decoder_heads = HEADS.get(dim), _DECODER_HEADS.get(decoder_dim)
    if heads is None or (sizes["decoder_depth"] and decoder_heads is None):
        raise UserError(
            f"no published ViT-MAE has the widths {dim} and {decoder_dim}, and the number of heads cannot be inferred "
            "from a checkpoint; pass a config"
        )
    hidden = sizes["the MLP's hidden width"]
    ratio = hidden / dim
    kept = ("dim", "depth", "decoder_depth", "channels", "patch_size", "qkv_bias")
    values = {name: sizes[name] for name in kept} | {
        "num_heads": heads,
        "decoder_dim": decoder_dim,
        "decoder_num_heads": decoder_heads if sizes["decoder_depth"] else heads,
        "mlp_ratio": ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim,  # the width is rounded down
        "image_size": tuple(side * patch for patch in sizes["patch_size"]),
        "norm_pix_loss": arguments.get("norm_pix_loss") is True,
    }
    try:
        return ViTMAEConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"the checkpoint's sizes are those of no model: {invalid_value(error)}") from None


def _check_sizes(sizes: Mapping[str, Any], config: ViTMAEConfig) -> None:
    expected: dict[str, Any] = {
        "dim": config.dim,
        "depth": config.depth,
        "channels": config.channels,
        "patch_size": config.patch_hw,
        "the MLP's hidden width": int(config.dim * config.mlp_ratio),
        "qkv_bias": config.qkv_bias,
    }
    if config.decoder_depth:
        expected |= {"decoder_dim": config.decoder_dim, "decoder_depth": config.decoder_depth}
    check_sizes(sizes, expected)
