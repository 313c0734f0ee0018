"""The models' equations in plain NumPy, to test the torch models against.

They follow the papers (arXiv 2404.02446; MAE for the baseline) with one image and one head at a time, and tokens as
columns of Z ∈ R^{d×N}. The numbers are those of docs/equations.md. Nothing of `crate_ray.models` is used; the position
tables are arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crate_ray.config import CrateMAEConfig, ViTMAEConfig

Array = np.ndarray[Any, np.dtype[np.float64]]
State = dict[str, Array]
erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass
class Result:
    """Results for one image, with tokens as rows, as in torch."""

    loss: float = 0.0
    mask: Array | None = None
    prediction: Array | None = None
    tokens: Array | None = None
    encoder_layers: list[Array] = field(default_factory=list)
    decoder_layers: list[Array] = field(default_factory=list)
    attention: list[Array] = field(default_factory=list)
    keys: list[Array] = field(default_factory=list)


def norm(state: State, name: str, z: Array, eps: float) -> Array:
    centred = z - z.mean(axis=0)
    scaled = centred / np.sqrt((centred**2).mean(axis=0) + eps)
    return scaled * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]


def linear(state: State, name: str, z: Array) -> Array:
    z = state[f"{name}.weight"] @ z
    return z + state[f"{name}.bias"][:, None] if f"{name}.bias" in state else z


def softmax_columns(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=0))
    return powers / powers.sum(axis=0)


def mssa(
    state: State, config: CrateMAEConfig, name: str, codebook: Array, z: Array, hidden: set[int] | None = None
) -> tuple[Array, list[Array]]:
    """MSSA(Z) (5), and the attention maps, whose columns sum to one. Only itself attends to a hidden token."""
    p = config.subspace_dim
    assert p is not None
    heads, maps = [], []
    for k in range(config.num_subspaces):
        projected = codebook[k * p : (k + 1) * p] @ z
        scores = projected.T @ projected / math.sqrt(p)
        for key in hidden or ():
            scores[key, [token for token in range(z.shape[1]) if token != key]] = -math.inf
        maps.append(softmax_columns(scores) if config.attention == "softmax" else scores / z.shape[1])
        heads.append(projected @ maps[-1])
    stacked = np.concatenate(heads)
    out = codebook.T @ stacked if config.output_map == "tied" else linear(state, f"{name}.output", stacked)
    return out, maps


def ista(state: State, config: CrateMAEConfig, name: str, z: Array) -> Array:
    """ISTA(Z) (6), or D' A₂ of an overcomplete dictionary (6α)."""
    eta, D = config.step_size, state[f"{name}.dictionary"]
    threshold: Any = eta * config.sparsity_lambda
    if config.threshold == "learned":
        threshold = np.exp(state[f"{name}.log_threshold"])[:, None]
    if config.dictionary == "square":
        return np.maximum(z + eta * (D.T @ z - D.T @ (D @ z)) - threshold, 0)
    codes = np.zeros((D.shape[1], z.shape[1]))
    for _ in range(2):
        codes = np.maximum(codes - eta * D.T @ (D @ codes - z) - threshold, 0)
    return state[f"{name}.synthesis"] @ codes


def scaled(state: State, name: str, z: Array) -> Array:
    """A residual branch, times its LayerScale if there is one."""
    return state[f"{name}.factor"][:, None] * z if f"{name}.factor" in state else z


def crate_encoder_layer(
    state: State, config: CrateMAEConfig, index: int, z: Array, result: Result, removed: set[int]
) -> Array:
    """Encoder layer (7)."""
    name = f"encoder.{index}"
    codebook = state[f"{name}.mssa.subspaces"]
    normed = norm(state, f"{name}.mssa_norm", z, config.norm_eps)
    hidden = removed if config.attend_to == "visible" else set()
    update, maps = mssa(state, config, f"{name}.mssa", codebook, normed, hidden)
    result.attention.append(np.stack([a.T for a in maps]))
    result.keys.append((codebook @ normed).T)
    half = z + scaled(state, f"{name}.mssa_scale", update)
    step = ista(state, config, f"{name}.ista", norm(state, f"{name}.ista_norm", half, config.norm_eps))
    return half + scaled(state, f"{name}.ista_scale", step) if config.residual == "all" else step


def crate_decoder_layer(state: State, config: CrateMAEConfig, index: int, y: Array, removed: set[int]) -> Array:
    """Decoder layer (8)."""
    name, mirrored = f"decoder.{index}", f"encoder.{config.depth - 1 - index}"
    tied = config.decoder_maps == "tied"
    codebook = state[f"{mirrored if tied else name}.mssa.subspaces"]
    normed = norm(state, f"{name}.expansion_norm", y, config.norm_eps)
    if config.dictionary == "overcomplete":
        half = ista(state, config, f"{name}.ista", normed)
    else:
        E = state[f"{mirrored}.ista.dictionary"].T if tied else state[f"{name}.expansion"]
        half = np.maximum(E @ normed, 0) if config.decoder_activation == "relu" else E @ normed
    if config.residual == "all":
        half = y + scaled(state, f"{name}.expansion_scale", half)
    hidden = removed if config.decoder_attend_to == "visible" else set()
    normed = norm(state, f"{name}.mssa_norm", half, config.norm_eps)
    update = mssa(state, config, f"{name}.mssa", codebook, normed, hidden)[0]
    return half - scaled(state, f"{name}.mssa_scale", update)


def transformer_layer(state: State, name: str, heads: int, z: Array, result: Result | None) -> Array:
    query, key, value = np.split(linear(state, f"{name}.qkv", norm(state, f"{name}.attention_norm", z, 1e-6)), 3)
    p = len(query) // heads
    outputs, maps = [], []
    for k in range(heads):
        part = slice(k * p, (k + 1) * p)
        maps.append(softmax_columns(key[part].T @ query[part] / math.sqrt(p)))
        outputs.append(value[part] @ maps[-1])
    if result is not None:
        result.attention.append(np.stack([a.T for a in maps]))
        result.keys.append(key.T)
    z = z + linear(state, f"{name}.attention_output", np.concatenate(outputs))
    hidden = linear(state, f"{name}.mlp_input", norm(state, f"{name}.mlp_norm", z, 1e-6))
    return z + linear(state, f"{name}.mlp_output", hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))))


def cut_patches(config: CrateMAEConfig | ViTMAEConfig, image_CHW: Array) -> list[Array]:
    """Patches of an image, each (patch height, patch width, channel)."""
    (grid_h, grid_w), (h, w) = config.grid_hw, config.patch_hw
    return [
        image_CHW[:, i * h : (i + 1) * h, j * w : (j + 1) * w].transpose(1, 2, 0)
        for i in range(grid_h)
        for j in range(grid_w)
    ]


def forward(
    state: State,
    config: CrateMAEConfig | ViTMAEConfig,
    image_CHW: Array,
    noise_N: Array | None,
    positions_ND: Array,
    decoder_positions_ND: Array | None,
) -> Result:
    """The whole model for one image, from mask (9) and tokens (10) to the loss (11).

    Without noise the image is not masked, and only the encoder runs.
    """
    result = Result()
    crate = isinstance(config, CrateMAEConfig)
    visible_only = not crate or config.encoder_tokens == "visible"
    patches = cut_patches(config, image_CHW)
    count = len(patches)
    keep = set(range(count))
    if noise_N is not None:
        keep = set(sorted(range(count), key=lambda n: (noise_N[n], n))[: config.num_visible])
    result.mask = np.array([0.0 if n in keep else 1.0 for n in range(count)])
    removed = {1 + n for n in range(count) if n not in keep}

    last_eps = config.last_norm_eps if crate else 1e-6
    if crate and config.positions == "learned":
        positions_ND = state["positions"][0]
    columns = [state["cls_token"].ravel()]
    for n, patch in enumerate(patches):
        if n in keep:
            kernel = state["patch_embed.weight"]
            if crate and config.patch_norm:
                patch = norm(state, "patch_norm", patch.reshape(-1, 1), config.norm_eps).reshape(patch.shape)
            token = np.einsum("dchw,hwc->d", kernel, patch) + state["patch_embed.bias"]
            if crate and config.patch_norm:
                token = norm(state, "embedding_norm", token[:, None], config.norm_eps)[:, 0]
        elif visible_only:
            continue
        else:
            token = state["mask_token"].ravel()
        columns.append(token + positions_ND[n])
    z = np.stack(columns, axis=1)
    for index in range(config.depth):
        if crate:
            z = crate_encoder_layer(state, config, index, z, result, removed)
        else:
            z = transformer_layer(state, f"encoder.{index}", config.num_heads, z, result)
        result.encoder_layers.append(z.T)
    z = norm(state, "encoder_norm", z, last_eps)
    result.tokens = z.T
    if noise_N is None:
        return result

    y = z if crate else linear(state, "decoder_embed", z)
    if visible_only:
        assert decoder_positions_ND is not None
        seen = iter(y[:, 1:].T)
        filled = [next(seen) if n in keep else state["mask_token"].ravel() for n in range(count)]
        y = np.concatenate([y[:, :1], np.stack(filled, axis=1) + decoder_positions_ND.T], axis=1)
    assert config.decoder_depth is not None
    for index in range(config.decoder_depth):
        if crate:
            y = crate_decoder_layer(state, config, index, y, removed)
        else:
            assert config.decoder_num_heads is not None
            y = transformer_layer(state, f"decoder.{index}", config.decoder_num_heads, y, None)
        result.decoder_layers.append(y.T)
    result.prediction = linear(state, "prediction", norm(state, "decoder_norm", y, last_eps)[:, 1:]).T

    errors = []
    for n, patch in enumerate(patches):
        target = patch.ravel()
        if config.norm_pix_loss:
            target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
        if n not in keep or len(keep) == count:
            errors.append(((result.prediction[n] - target) ** 2).mean())
    result.loss = float(np.mean(errors))
    return result
