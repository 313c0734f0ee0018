"""What each encoder layer does to the tokens of a batch: compression against its codebook, then sparsification.

Works for CRATE, where the codebook is the layer's own, and for a transformer, whose key projection is taken for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_ray.models import MaskedAutoencoder
from crate_ray.models.crate import EncoderLayer
from crate_ray.models.vit import TransformerLayer
from crate_ray.structure.coding_rate import (
    EPSILON,
    codebook_rates,
    coding_rate,
    coherence,
    effective_rank,
    orthonormal_bases,
    project,
)
from crate_ray.structure.sparsity import gini, zero_share

THRESHOLDS = (0.01, 0.1)
"""Sizes below which numbers of a token count as small, as multiples of the token's root mean square."""


@dataclass(frozen=True)
class LayerView:
    """The parts of an encoder layer that the measures need."""

    codebook: Tensor
    """U_kᵀ, (K, P, D); of a transformer, its key projection."""
    norm: Callable[[Tensor], Tensor]
    """The LayerNorm through which attention sees the tokens."""
    halves: Callable[[Tensor], tuple[Tensor, Tensor]]
    """From a layer's input to the tokens after its attention, Z½, and after all of it, Z'."""


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of each of L encoder layers on each of B images, (L, B) float64 (one of K subspaces too); tokens
    include CLS.

    Rates come in three forms, because a rate depends on the scale of tokens and codebook: of the tokens as the layer's
    attention sees them, LN(Z), against the codebook as it is; of the same against orthonormal bases of the codebook's
    subspaces (`_span`), in which no learned scale is left; and of the tokens without the norm (`_raw`).
    """

    rate_before: Tensor
    """R^c(LN(Z) | U): the layer's input against its codebook, before the compression step."""
    rate_after: Tensor
    """R^c(LN(Z½) | U): the same after the compression step; the paper says that it falls from layer to layer."""
    rate: Tensor
    """R(LN(Z½)): coding rate of the compressed tokens by themselves."""
    rate_reduction: Tensor
    """ΔR = R(LN(Z½)) − R^c(LN(Z½) | U)."""
    rate_before_span: Tensor
    """R^c(LN(Z) | basis of U)."""
    rate_after_span: Tensor
    """R^c(LN(Z½) | basis of U)."""
    rate_reduction_span: Tensor
    """ΔR = R(LN(Z½)) − R^c(LN(Z½) | basis of U)."""
    rate_before_raw: Tensor
    """R^c(Z | U)."""
    rate_after_raw: Tensor
    """R^c(Z½ | U)."""
    rate_raw: Tensor
    """R(Z½)."""
    rate_reduction_raw: Tensor
    """ΔR = R(Z½) − R^c(Z½ | U)."""
    zero_share: Tensor
    """Share of zeros in Z', the tokens after the sparsification step; the paper says that it rises."""
    below_01: Tensor
    """Share of numbers of Z' below 0.01 of their token's root mean square."""
    below_1: Tensor
    """Share of numbers of Z' below 0.1 of their token's root mean square."""
    gini: Tensor
    """Gini index of Z'."""
    effective_rank: Tensor
    """Effective rank of U_kᵀ LN(Z½) of each subspace, (L, B, K): from 1 to p."""

    def means(self) -> dict[str, list[float]]:
        """Mean over the images (and subspaces), by measure, layer by layer."""
        return {name: values.flatten(1).mean(1).tolist() for name, values in vars(self).items()}

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Measures of all images of several batches."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts], 1) for f in fields(cls)})


def view_layer(layer: nn.Module) -> LayerView:
    """Codebook, norm and steps of an encoder layer of either model."""
    if isinstance(layer, EncoderLayer):
        assert layer.mssa.subspaces is not None  # an encoder layer owns its codebook

        def halves(z_BTD: Tensor) -> tuple[Tensor, Tensor]:
            half_BTD = layer.compress(z_BTD)
            return half_BTD, layer.sparsify(half_BTD)

        return LayerView(layer.mssa.subspaces.unflatten(0, (layer.mssa.num_subspaces, -1)), layer.mssa_norm, halves)
    transformer = cast(TransformerLayer, layer)
    key_CD = transformer.qkv.weight.chunk(3)[1]

    def watch(z_BTD: Tensor) -> tuple[Tensor, Tensor]:
        # The tokens between attention and MLP are what the MLP's norm is given.
        seen: list[Tensor] = []
        handle = transformer.mlp_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            out_BTD = transformer(z_BTD)
        finally:
            handle.remove()
        return seen[0], out_BTD

    return LayerView(key_CD.unflatten(0, (transformer.num_heads, -1)), transformer.attention_norm, watch)


@torch.no_grad()
def measure_layers(
    model: MaskedAutoencoder, images_BCHW: Tensor, noise_BN: Tensor | None = None, epsilon: float = EPSILON
) -> LayerMeasures:
    """Measure the encoder layers on images, whole or masked by noise.

    The layers' own maps are applied to the tokens as they are in the model: U_k is the k-th block of p rows of the
    codebook; biases of a transformer's keys are left out, as a codebook has none.
    """
    rows: list[list[Tensor]] = []
    z_BTD, _ = model.embed(images_BCHW, noise_BN)
    for module in model.encoder:
        layer = view_layer(module)
        half_BTD, next_BTD = layer.halves(z_BTD)
        seen_BTD, seen_half_BTD = layer.norm(z_BTD), layer.norm(half_BTD)
        bases_KPD = orthonormal_bases(layer.codebook)

        def against(tokens_BTD: Tensor, codebook_KPD: Tensor) -> Tensor:
            return codebook_rates(project(tokens_BTD, codebook_KPD.to(tokens_BTD.dtype)), epsilon).sum(-1)

        after, after_span = against(seen_half_BTD, layer.codebook), against(seen_half_BTD, bases_KPD)
        after_raw = against(half_BTD, layer.codebook)
        rate, rate_raw = coding_rate(seen_half_BTD, epsilon), coding_rate(half_BTD, epsilon)
        relative_BTD = next_BTD / next_BTD.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        rows.append(
            [
                against(seen_BTD, layer.codebook),
                after,
                rate,
                rate - after,
                against(seen_BTD, bases_KPD),
                after_span,
                rate - after_span,
                against(z_BTD, layer.codebook),
                after_raw,
                rate_raw,
                rate_raw - after_raw,
                zero_share(next_BTD),
                *(zero_share(relative_BTD, threshold) for threshold in THRESHOLDS),
                gini(next_BTD),
                effective_rank(project(seen_half_BTD, layer.codebook)),
            ]
        )
        z_BTD = next_BTD
    return LayerMeasures(*(torch.stack(column).cpu() for column in zip(*rows, strict=True)))


@torch.no_grad()
def measure_codebooks(model: MaskedAutoencoder) -> tuple[list[float], list[float]]:
    """Coherence of each layer's codebook: largest and mean |cosine| between directions of two of its subspaces.

    The mean is over pairs of subspaces, of the largest cosine of each pair. With one subspace both are 0.
    """
    largest, means = [], []
    for module in model.encoder:
        cosines_KK = coherence(view_layer(module).codebook.cpu())
        count = len(cosines_KK)
        pairs = cosines_KK[~torch.eye(count, dtype=torch.bool)]
        largest.append(float(pairs.max()) if count > 1 else 0.0)
        means.append(float(pairs.mean()) if count > 1 else 0.0)
    return largest, means


@dataclass(frozen=True)
class UndoErrors:
    """How far decoder layers are from undoing encoder layers, (L, B) float64; row l is decoder layer l + 1 of L.

    Decoder layer l's output is compared with the input of encoder layer L − l + 1, which it is to undo.
    """

    relative: Tensor
    """‖Y − Z‖ / ‖Z‖ over all tokens of an image: 0 where the layer is undone exactly."""
    scaled: Tensor
    """The same with each image's Y times the factor that fits Z best: from 0 to 1."""
    other_image: Tensor
    """`scaled` against the tokens of another image of the batch: what is reached by knowing images in general."""


@torch.no_grad()
def measure_undoing(model: MaskedAutoencoder, images_BCHW: Tensor) -> UndoErrors | None:
    """Compare what decoder layers give with what mirrored encoder layers were given, on whole images.

    None where the decoder has another width or depth than the encoder, so that no layer has a counterpart. Needs two
    images or more.
    """
    embedded_BTD, _ = model.embed(images_BCHW)
    encoded = model.encode(images_BCHW, return_layers=True)
    decoded = model.decode(encoded.tokens, return_layers=True)
    assert encoded.layers is not None and decoded.layers is not None
    if len(encoded.layers) != len(decoded.layers) or decoded.layers[0].shape != embedded_BTD.shape:
        return None
    inputs = [embedded_BTD, *encoded.layers[:-1]]
    rows = []
    for y_BTD, z_BTD in zip(decoded.layers, reversed(inputs), strict=True):
        y_BX, z_BX = y_BTD.double().flatten(1), z_BTD.double().flatten(1)
        rows.append(
            (
                torch.linalg.vector_norm(y_BX - z_BX, dim=1) / torch.linalg.vector_norm(z_BX, dim=1),
                _unexplained(y_BX, z_BX),
                _unexplained(y_BX, z_BX.roll(1, 0)),
            )
        )
    return UndoErrors(*(torch.stack(column).cpu() for column in zip(*rows, strict=True)))


def _unexplained(y_BX: Tensor, z_BX: Tensor) -> Tensor:
    """min over a of ‖a y − z‖ / ‖z‖ = √(1 − cos²)."""
    return (1 - F.cosine_similarity(y_BX, z_BX, dim=1).square()).clamp_min(0).sqrt()


def batches(images_BCHW: Tensor, size: int) -> Iterator[Tensor]:
    """Parts of at least two images, so that each has another one to be compared with."""
    parts = list(images_BCHW.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from parts
