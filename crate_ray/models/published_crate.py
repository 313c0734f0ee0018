"""Import of public checkpoints of supervised CRATE and of CRATE-α, as encoders without a decoder.

Three layouts are known, by the authors' code:

* CRATE (arXiv 2306.01129): patches are normalised before and after a linear embedding, and positions are learned. Its
  layers are those of CRATE-MAE's encoder with λ = 0.1.
* CRATE-α (arXiv 2405.20299), `crate_alpha_B16.pth` and `crate_alpha_L14.pth`: residuals around both branches, an
  overcomplete dictionary, no bias in W, and learned positions.
* CRATE-α trained with text, `crate_alpha_CLIPA_*.pth`: the image encoder has the names of CLIP, and stores the codebook
  three times, as query, key and value.

The head is left out: the map to classes, or the map to the space of texts and the text encoder. The norm before it
becomes the encoder's last norm, so the CLS token is what the published head sees. The position of the CLS token is
added to the token itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from crate_ray.config import CrateMAEConfig
from crate_ray.errors import UserError, invalid_value
from crate_ray.models.checkpoint_file import check_names, check_sizes, check_tensors, depth_of
from crate_ray.models.crate import CrateMAE
from crate_ray.models.published_vit import HEADS

_STEP = {"step_size": 0.1, "sparsity_lambda": 0.1}
"""η and λ of all of them."""
_CHANNELS = 3
_BOTH = ("weight", "bias")


@dataclass(frozen=True)
class Layout:
    """Names of a checkpoint, and the settings of its model."""

    title: str
    """Name of the model."""
    kernel: str
    """Kernel of the patch embedding: (D, C, height, width), or (D, height · width · C) of a linear map."""
    has_bias: bool
    """Whether the patch embedding has a bias."""
    cls: str
    positions: str
    """Positions of CLS and patches, (…, 1 + N, D)."""
    norms: Mapping[str, str]
    """Our names of the norms outside of layers."""
    layers: str
    layer: Mapping[str, str]
    """Our names of a layer's tensors. The first one is the codebook."""
    codebooks: int
    """How often the codebook is stored."""
    unused: str
    """Pattern of the names that are left out."""
    form: Mapping[str, Any]
    """Settings that differ from CRATE-MAE's."""


_MSSA = {"0.fn.qkv.weight": "mssa.subspaces", "0.fn.to_out.0.weight": "mssa.output.weight"}
_LAYER_NORMS = {
    f"{number}.norm.{part}": f"{norm}.{part}"
    for number, norm in enumerate(("mssa_norm", "ista_norm"))
    for part in _BOTH
}
_ALPHA = {
    "output_bias": False, "residual": "all", "dictionary": "overcomplete", "initialization": "small",
    "positions": "learned", "norm_eps": 1e-6,
}  # fmt: skip

LAYOUTS = (
    Layout(
        title="CRATE",
        kernel="to_patch_embedding.2.weight",
        has_bias=True,
        cls="cls_token",
        positions="pos_embedding",
        norms={
            "to_patch_embedding.1": "patch_norm",
            "to_patch_embedding.3": "embedding_norm",
            "mlp_head.0": "encoder_norm",
        },
        layers="transformer.layers",
        layer={
            **_MSSA,
            "0.fn.to_out.0.bias": "mssa.output.bias",
            **_LAYER_NORMS,
            "1.fn.weight": "ista.dictionary",
        },
        codebooks=1,
        unused=r"mlp_head\.1\..+",
        form={"positions": "learned", "patch_norm": True, "last_norm_eps": 1e-5},
    ),
    Layout(
        title="CRATE-α",
        kernel="conv1.weight",
        has_bias=True,
        cls="cls_token",
        positions="pos_embedding",
        norms={"mlp_head.0": "encoder_norm"},
        layers="transformer.layers",
        layer={**_MSSA, **_LAYER_NORMS, "1.fn.D": "ista.dictionary", "1.fn.D1": "ista.synthesis"},
        codebooks=1,
        unused=r"mlp_head\.1\..+",
        form={**_ALPHA, "last_norm_eps": 1e-5},
    ),
    Layout(
        title="CRATE-α-CLIPA",
        kernel="visual.conv1.weight",
        has_bias=False,
        cls="visual.class_embedding",
        positions="visual.positional_embedding",
        norms={"visual.ln_post": "encoder_norm"},
        layers="visual.transformer.resblocks",
        layer={
            "attn.in_proj_weight": "mssa.subspaces",
            "attn.out_proj.weight": "mssa.output.weight",
            **{f"ln_1.{part}": f"mssa_norm.{part}" for part in _BOTH},
            **{f"ln_2.{part}": f"ista_norm.{part}" for part in _BOTH},
            "mlp.c_fc": "ista.dictionary",
            "mlp.c_proj": "ista.synthesis",
        },
        codebooks=3,
        unused=r"visual\.proj|(transformer|token_embedding|ln_final)\..+|positional_embedding|text_projection|logit_scale",
        form={**_ALPHA, "last_norm_eps": 1e-6},
    ),
)


def layout_of(state: Mapping[str, Tensor]) -> Layout | None:
    """The layout of a checkpoint: the one whose dictionary it has. None if it has none of them."""
    return next((layout for layout in LAYOUTS if _in_layer(layout, "ista.dictionary") in state), None)


def load_crate_encoder(state: Mapping[str, Tensor], layout: Layout, config: CrateMAEConfig | None) -> CrateMAE:
    """An encoder with these weights, in their dtype.

    Args:
        state: tensors by the names of the authors' code.
        layout: its layout.
        config: config of the model; inferred if None. Only its sizes count, and η and λ if they are set: the form of
            the layers is the checkpoint's.

    Raises:
        UserError: as `load_published`.
    """
    sizes = _sizes(state, layout, config)
    config = _infer_config(sizes, layout) if config is None else _adapted(config, sizes, layout)
    names = dict(_parameter_names(layout, config.depth))
    needed = {*names, layout.kernel, layout.cls, layout.positions}
    unused = {name for name in state if re.fullmatch(layout.unused, name)}
    check_names(state.keys() - unused, needed, f"a published {layout.title}")
    given = {**state, **_reshaped(state, layout, config)}
    names |= {layout.kernel: "patch_embed.weight", layout.cls: "cls_token", layout.positions: "positions"}
    with torch.device("meta"):
        dtype = check_tensors(given, names, CrateMAE(config).state_dict())
    weights = {own: given[name] for name, own in names.items()}
    if not layout.has_bias:
        weights["patch_embed.bias"] = torch.zeros(config.dim, dtype=dtype)
    model = CrateMAE(config).to(dtype)
    model.load_state_dict(weights)
    return model


def _in_layer(layout: Layout, own: str, index: int = 0) -> str:
    """Published name of a layer's tensor, by our name."""
    name = next(name for name, ours in layout.layer.items() if ours == own)
    return f"{layout.layers}.{index}.{name}"


def _parameter_names(layout: Layout, depth: int) -> Iterator[tuple[str, str]]:
    """Pairs (published name, our name) of all parameters but the kernel, CLS and the positions."""
    if layout.has_bias:
        yield layout.kernel.replace("weight", "bias"), "patch_embed.bias"
    for theirs, ours in layout.norms.items():
        for part in _BOTH:
            yield f"{theirs}.{part}", f"{ours}.{part}"
    for index in range(depth):
        for theirs, ours in layout.layer.items():
            yield f"{layout.layers}.{index}.{theirs}", f"encoder.{index}.{ours}"


def _sizes(state: Mapping[str, Tensor], layout: Layout, config: CrateMAEConfig | None) -> dict[str, Any]:
    """Sizes of the model by their name in the config or a description."""
    codebook, dictionary = (_in_layer(layout, own) for own in ("mssa.subspaces", "ista.dictionary"))
    check_names(
        state, {layout.kernel, layout.positions, codebook, dictionary}, f"a published {layout.title}", only_missing=True
    )
    dimensions = {layout.kernel: (2, 4), layout.positions: (2, 3), codebook: (2,), dictionary: (2,)}
    for name, expected in dimensions.items():
        if state[name].ndim not in expected:
            raise UserError(f"{name} of the checkpoint has {state[name].ndim} dimensions instead of {expected[0]}")
    kernel, table = state[layout.kernel], state[layout.positions]
    dim = kernel.shape[0]
    if (
        table.shape[-1] != dim
        or table.shape[:-2].numel() != 1
        or state.get(layout.cls, table[..., 0, :]).numel() != dim
    ):
        raise UserError(f"{layout.positions} and {layout.cls} of the checkpoint are not tokens of {dim} numbers")
    if kernel.ndim == 4:
        channels, *patch = kernel.shape[1:]
    elif config is not None and config.channels * math.prod(config.patch_hw) == kernel.shape[1]:
        channels, patch = config.channels, list(config.patch_hw)
    else:
        channels, patch = _CHANNELS, [math.isqrt(kernel.shape[1] // _CHANNELS)] * 2
        if channels * math.prod(patch) != kernel.shape[1]:
            raise UserError(
                f"the checkpoint's patches of {kernel.shape[1]} numbers are not squares with {channels} channels; pass "
                "a config with its patch_size and channels"
            )
    return {
        "dim": dim,
        "depth": depth_of(state, layout.layers),
        "channels": channels,
        "patch_size": tuple(patch),
        "number of patches": table.shape[-2] - 1,
        "num_subspaces × subspace_dim": state[codebook].shape[0] // layout.codebooks,
        "atoms of the dictionary": state[dictionary].shape[1],
    }


def _infer_config(sizes: Mapping[str, Any], layout: Layout) -> CrateMAEConfig:
    dim, patches = sizes["dim"], sizes["number of patches"]
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise UserError(f"the checkpoint's {patches} patches are not a square grid; pass a config with its image_size")
    heads = HEADS.get(dim)
    if heads is None or sizes["num_subspaces × subspace_dim"] != dim:
        raise UserError(
            f"no published {layout.title} has the width {dim}, and the number of subspaces cannot be inferred from a "
            "checkpoint; pass a config"
        )
    image_size = tuple(side * patch for patch in sizes["patch_size"])
    return _build(sizes, layout, {"image_size": image_size, "num_subspaces": heads})


def _adapted(config: CrateMAEConfig, sizes: Mapping[str, Any], layout: Layout) -> CrateMAEConfig:
    """The config with the form of the layout. Raises UserError if its sizes are others."""
    assert config.subspace_dim is not None
    expected = {
        "dim": config.dim,
        "depth": config.depth,
        "channels": config.channels,
        "patch_size": config.patch_hw,
        "number of patches": config.num_patches,
        "num_subspaces × subspace_dim": config.num_subspaces * config.subspace_dim,
    }
    check_sizes(sizes, expected)
    kept = ("image_size", "num_subspaces", "subspace_dim", "mask_ratio", "norm_pix_loss")
    values = {name: getattr(config, name) for name in (*kept, *(config.model_fields_set & _STEP.keys()))}
    return _build(sizes, layout, values)


def _build(sizes: Mapping[str, Any], layout: Layout, values: Mapping[str, Any]) -> CrateMAEConfig:
    dim, atoms = sizes["dim"], sizes["atoms of the dictionary"]
    if layout.form.get("dictionary") == "overcomplete":
        if atoms % dim:
            raise UserError(f"the checkpoint's dictionary has {atoms} atoms, which is no multiple of its width {dim}")
        values = {**values, "dictionary_expansion": atoms // dim}
    shared = {name: sizes[name] for name in ("dim", "depth", "channels", "patch_size")}
    try:
        return CrateMAEConfig.model_validate({"decoder_depth": 0, **shared, **layout.form, **_STEP, **values})
    except ValidationError as error:
        raise UserError(f"the checkpoint's sizes are those of no model: {invalid_value(error)}") from None


def _reshaped(state: Mapping[str, Tensor], layout: Layout, config: CrateMAEConfig) -> dict[str, Tensor]:
    """Tensors that our model stores in another form, by their published names."""
    kernel = state[layout.kernel]
    if kernel.ndim == 2:  # of flat patches in the order height, width, channel
        kernel = kernel.unflatten(1, (*config.patch_hw, config.channels)).permute(0, 3, 1, 2)
    table = state[layout.positions].reshape(1, -1, config.dim)
    found = {
        layout.kernel: kernel,
        layout.positions: table[:, 1:],
        layout.cls: state[layout.cls].reshape(1, 1, -1) + table[:, :1],
    }
    rows = config.num_subspaces * (config.subspace_dim or 0)
    for index in range(config.depth if layout.codebooks > 1 else 0):
        name = _in_layer(layout, "mssa.subspaces", index)
        if state[name].shape != (layout.codebooks * rows, config.dim):
            raise UserError(
                f"shapes in the checkpoint differ from those of the config: {name} {tuple(state[name].shape)} instead "
                f"of {(layout.codebooks * rows, config.dim)}"
            )
        first, *others = state[name].chunk(layout.codebooks)
        if not all(torch.equal(first, other) for other in others):
            raise UserError(
                f"{name} of the checkpoint has different maps for queries, keys and values; CRATE has the same for "
                "all, so this is another model"
            )
        found[name] = first
    return found
