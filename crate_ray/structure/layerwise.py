"""Measures of each encoder layer: does it compress the tokens against its codebook, and does it make them sparse?

CRATE's layers have a codebook. For a transformer, the key projection is used as the codebook.
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
    codebook_rate,
    coding_rate,
    coherence,
    effective_rank,
    orthonormal_bases,
    project,
)
from crate_ray.structure.sparsity import gini, zero_share

THRESHOLDS = (0.01, 0.1)
"""Codes of a token up to these multiples of their root mean square count as small."""


@dataclass(frozen=True)
class LayerOperators:
    """The parts of an encoder layer that the measures need."""

    codebook: Tensor
    """U_kᵀ, (K, P, D); for a transformer, its key projection without biases."""
    norm: Callable[[Tensor], Tensor]
    """The LayerNorm before attention."""
    attention_step: Callable[[Tensor], Tensor]
    """The layer's first half: its input Z to Z½, the tokens after attention."""
    second_step: Callable[[Tensor], Tensor]
    """The layer's second half: Z½ to its output Z'."""
    codes: Callable[[Tensor], Tensor]
    """Z½ to what should be sparse: the codes of ISTA, which are Z' as published; for a transformer, Z'."""


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of each of L encoder layers on each of B images, (L, B) float64. Tokens include CLS.

    A rate depends on the scale of tokens and codebook, so there are three forms. Rates without a suffix use the tokens
    as attention sees them, LN(Z), and the codebook as it is. `_span` uses orthonormal bases of the codebook's subspaces
    instead, which removes the codebook's learned scale. `_raw` uses the tokens without the norm.
    """

    rate_before: Tensor
    """R^c(LN(Z) | U): the layer's input against its codebook, before the compression step."""
    rate_after: Tensor
    """R^c(LN(Z½) | U): the same after the compression step. The paper claims that it falls from layer to layer."""
    rate: Tensor
    """R(LN(Z½)): coding rate of the compressed tokens."""
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
    """Share of zeros in the codes of the sparsification step (Z' as published). The paper claims that it rises."""
    below_01: Tensor
    """Share of codes up to 0.01 of their token's root mean square."""
    below_1: Tensor
    """Share of codes up to 0.1 of their token's root mean square."""
    gini: Tensor
    """Gini index of the codes."""
    effective_rank: Tensor
    """Effective rank of U_kᵀ LN(Z½) for each subspace, (L, B, K); from 1 to p."""

    def means(self) -> dict[str, list[float]]:
        """Mean over images (and subspaces) of each measure, layer by layer."""
        return {name: values.flatten(1).mean(1).tolist() for name, values in vars(self).items()}

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Join the measures of several batches of images."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts], 1) for f in fields(cls)})


def layer_operators(layer: nn.Module) -> LayerOperators:
    """Codebook, norm and both halves of an encoder layer of either model."""
    if isinstance(layer, EncoderLayer):
        assert layer.mssa.subspaces is not None  # an encoder layer has its own codebook
        codebook = layer.mssa.subspaces.unflatten(0, (layer.mssa.num_subspaces, -1))
        return LayerOperators(codebook, layer.mssa_norm, layer.compress, layer.sparsify, layer.codes)
    transformer = cast(TransformerLayer, layer)
    keys = transformer.qkv.weight.chunk(3)[1].unflatten(0, (transformer.num_heads, -1))

    def second_step(z_half: Tensor) -> Tensor:
        return z_half + transformer.mlp_branch(z_half)

    return LayerOperators(
        keys,
        transformer.attention_norm,
        lambda z: z + transformer.attention_branch(z),
        second_step,
        second_step,
    )


@torch.no_grad()
def measure_layers(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor | None = None, epsilon: float = EPSILON
) -> LayerMeasures:
    """Measure the encoder layers on images (B, channels, H, W), masked if noise (B, N) is given.

    Each layer is measured on the tokens that it gets in the model.
    """
    layers: list[dict[str, Tensor]] = []
    z_BTD, _ = model.embed(images, noise)
    for module in model.encoder:
        layer = layer_operators(module)
        half_BTD = layer.attention_step(z_BTD)
        next_BTD = layer.second_step(half_BTD)
        layers.append(_rates(layer, z_BTD, half_BTD, epsilon) | _sparsity(layer.codes(half_BTD)))
        z_BTD = next_BTD
    return LayerMeasures(**{name: torch.stack([measured[name] for measured in layers]).cpu() for name in layers[0]})


def _rates(layer: LayerOperators, z_BTD: Tensor, half_BTD: Tensor, epsilon: float) -> dict[str, Tensor]:
    codebook_KPD = layer.codebook
    bases_KPD = orthonormal_bases(codebook_KPD).to(z_BTD.dtype)
    normed_BTD, normed_half_BTD = layer.norm(z_BTD), layer.norm(half_BTD)
    rate, rate_raw = coding_rate(normed_half_BTD, epsilon), coding_rate(half_BTD, epsilon)
    after = codebook_rate(normed_half_BTD, codebook_KPD, epsilon)
    after_span = codebook_rate(normed_half_BTD, bases_KPD, epsilon)
    after_raw = codebook_rate(half_BTD, codebook_KPD, epsilon)
    return {
        "rate_before": codebook_rate(normed_BTD, codebook_KPD, epsilon),
        "rate_after": after,
        "rate": rate,
        "rate_reduction": rate - after,
        "rate_before_span": codebook_rate(normed_BTD, bases_KPD, epsilon),
        "rate_after_span": after_span,
        "rate_reduction_span": rate - after_span,
        "rate_before_raw": codebook_rate(z_BTD, codebook_KPD, epsilon),
        "rate_after_raw": after_raw,
        "rate_raw": rate_raw,
        "rate_reduction_raw": rate_raw - after_raw,
        "effective_rank": effective_rank(project(normed_half_BTD, codebook_KPD)),
    }


def _sparsity(codes_BTM: Tensor) -> dict[str, Tensor]:
    relative_BTM = codes_BTM / codes_BTM.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    below_01, below_1 = (zero_share(relative_BTM, threshold) for threshold in THRESHOLDS)
    return {"zero_share": zero_share(codes_BTM), "below_01": below_01, "below_1": below_1, "gini": gini(codes_BTM)}


@torch.no_grad()
def measure_codebooks(model: MaskedAutoencoder) -> tuple[list[float], list[float]]:
    """Coherence of each layer's codebook: over pairs of its subspaces, the maximum and the mean of their coherence.

    The coherence of two subspaces is the largest |cosine| between their directions. With a single subspace both
    numbers are 0.
    """
    largest, means = [], []
    for module in model.encoder:
        cosines_KK = coherence(layer_operators(module).codebook.cpu())
        count = len(cosines_KK)
        pairs = cosines_KK[~torch.eye(count, dtype=torch.bool)]
        largest.append(float(pairs.max()) if count > 1 else 0.0)
        means.append(float(pairs.mean()) if count > 1 else 0.0)
    return largest, means


@dataclass(frozen=True)
class InversionErrors:
    """How far decoder layers are from inverting encoder layers, (L, B) float64; row l is decoder layer l + 1 of L.

    The output Y of decoder layer l is compared with the input Z of encoder layer L − l + 1, which it should restore.
    """

    relative: Tensor
    """‖Y − Z‖ / ‖Z‖ over all tokens of an image; 0 for an exact inverse."""
    scaled: Tensor
    """Relative error after each image's Y is multiplied by the factor that fits Z best; from 0 to 1."""
    other_image: Tensor
    """`scaled` against the tokens of another image of the batch: the error of a guess that does not depend on the
    image."""


@torch.no_grad()
def measure_inversion(model: MaskedAutoencoder, images: Tensor) -> InversionErrors | None:
    """Compare the output of decoder layers with the input of the mirrored encoder layers, on whole images.

    Needs at least two images (B, channels, H, W). None if decoder and encoder differ in width or depth, so that layers
    have no counterparts, and for a model without a decoder.
    """
    if not model.has_decoder:
        return None
    embedded_BTD, _ = model.embed(images)
    encoded = model.encode(images, return_layers=True)
    decoded = model.decode(encoded.tokens, return_layers=True)
    assert encoded.layers is not None and decoded.layers is not None
    if len(encoded.layers) != len(decoded.layers) or decoded.layers[0].shape != embedded_BTD.shape:
        return None
    inputs = [embedded_BTD, *encoded.layers[:-1]]
    rows = []
    for y_BTD, z_BTD in zip(decoded.layers, reversed(inputs), strict=True):
        y_BX, z_BX = y_BTD.double().flatten(1), z_BTD.double().flatten(1)
        relative_B = torch.linalg.vector_norm(y_BX - z_BX, dim=1) / torch.linalg.vector_norm(z_BX, dim=1)
        rows.append((relative_B, _scaled_error(y_BX, z_BX), _scaled_error(y_BX, z_BX.roll(1, 0))))
    return InversionErrors(*(torch.stack(column).cpu() for column in zip(*rows, strict=True)))


def _scaled_error(y_BX: Tensor, z_BX: Tensor) -> Tensor:
    """min over a of ‖a y − z‖ / ‖z‖ = √(1 − cos²), (B,)."""
    return (1 - F.cosine_similarity(y_BX, z_BX, dim=1).square()).clamp_min(0).sqrt()


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of at least two images, as `measure_inversion` needs."""
    parts = list(images.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from parts
