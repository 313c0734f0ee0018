"""Signals of whether a model can learn, layer by layer: do tokens collapse, do branches and gradients reach every part?

They are measured on masked images, as in training, so that they explain a run that does not learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_ray.models import MaskedAutoencoder
from crate_ray.models.crate import CrateMAE, DecoderLayer, EncoderLayer
from crate_ray.models.vit import TransformerLayer
from crate_ray.structure.coding_rate import effective_rank

_CRATE_PARTS = {"mssa.subspaces": "U", "mssa.output.weight": "W", "ista.dictionary": "D", "expansion": "E"}
_VIT_PARTS = {
    "qkv.weight": "QKV", "attention_output.weight": "W", "mlp_input.weight": "MLP in", "mlp_output.weight": "MLP out",
}  # fmt: skip


@dataclass
class Signals:
    """One value per layer, the first layer first. Means over images."""

    token_cosine: list[float] = field(default_factory=list)
    """Mean cosine between two tokens of an image after the layer. 1: all tokens have the same direction."""
    token_rank: list[float] = field(default_factory=list)
    """Effective rank of an image's tokens after the layer; see coding_rate.effective_rank."""
    attention_branch: list[float] = field(default_factory=list)
    """‖attention branch‖ / ‖its stream‖: Z in the encoder, Y½ in CRATE's decoder."""
    second_branch: list[float] = field(default_factory=list)
    """‖second branch‖ / ‖its stream‖, of ISTA, E or an MLP. Without a residual, the branch replaces the stream."""
    unused_codes: list[float] = field(default_factory=list)
    """Share of the codes of ISTA, or hidden units of an MLP, that are not positive for any token of any image."""
    visible_attention: list[float] = field(default_factory=list)
    """Attention of removed patches' tokens to the visible patches' tokens. In encoders of all tokens, and in decoders.
    """
    attention_entropy: list[float] = field(default_factory=list)
    """Entropy of attention over the logarithm of the number of tokens; 1: uniform."""
    gradients: dict[str, list[float]] = field(default_factory=dict)
    """Norm of the loss's gradient by weight: U, W, D, E of CRATE; QKV, W and the MLP of a transformer."""

    @property
    def gradient_norm(self) -> list[float]:
        """Norm of the loss's gradient over these weights of a layer. Empty if the layers have none of them."""
        return norm_over_weights(self.gradients.values())


@dataclass
class ModelSignals:
    """Signals of a model."""

    encoder: Signals
    decoder: Signals
    visible_share: float
    """Share of visible patches: `visible_attention` of uniform attention."""


def norm_over_weights(norms: Iterable[Sequence[float]]) -> list[float]:
    """Norms by layer over several weights, from the norms of each weight by layer."""
    return [math.hypot(*layer) for layer in zip(*norms, strict=True)]


def measure_signals(model: MaskedAutoencoder, images: Tensor, noise: Tensor) -> ModelSignals:
    """Measure the signals of a model on masked images (B, channels, H, W) with mask noise (B, N).

    The gradients that the model holds are not changed.
    """
    encoder, decoder = Signals(), Signals()
    with torch.no_grad():
        z_BTD, masking = model.embed(images, noise)
        assert masking is not None
        masked = model.encoder_mask(masking)
        for module in model.encoder:
            z_BTD = _measure(
                encoder, cast("Any", module), z_BTD, None if model.visible_only else masking.removed, masked
            )
        y_BTD = model.decoder_embed(model.encoder_norm(z_BTD))
        if model.visible_only:
            y_BTD = model.restore_removed(y_BTD, masking)
        for index, module in enumerate(model.decoder):
            tied = model.tied_maps(index) if isinstance(model, CrateMAE) else ()
            y_BTD = _measure(decoder, cast("Any", module), y_BTD, masking.removed, model.decoder_mask(masking), tied)
    _gradients(model, images, noise, encoder, decoder)
    return ModelSignals(encoder, decoder, model.num_visible / model.num_patches)


def _measure(
    out: Signals,
    layer: Any,
    z_BTD: Tensor,
    removed_BN: Tensor | None,
    masked: dict[str, Tensor],
    tied: tuple[Tensor, ...] = (),
) -> Tensor:
    """Add a layer's signals. `tied` are the maps of a decoder layer that has none. Returns the layer's output."""
    codes: Tensor | None = None
    if isinstance(layer, EncoderLayer):
        half_BTD = layer.compress(z_BTD, **masked)
        out.attention_branch.append(_ratio(half_BTD - z_BTD, z_BTD))
        next_BTD = layer.sparsify(half_BTD)
        out.second_branch.append(_ratio(next_BTD - half_BTD if layer.residual else next_BTD, half_BTD))
        codes, maps = layer.codes(half_BTD), layer.attention(z_BTD, **masked)
    elif isinstance(layer, DecoderLayer):
        half_BTD, next_BTD = layer.expand(z_BTD, *tied[:1]), layer(z_BTD, *tied, **masked)
        out.second_branch.append(_ratio(half_BTD - z_BTD if layer.residual else half_BTD, z_BTD))
        out.attention_branch.append(_ratio(next_BTD - half_BTD, half_BTD))
        maps = layer.mssa.attention(layer.mssa_norm(half_BTD), *tied[1:], **masked)
    else:
        transformer = cast("TransformerLayer", layer)
        maps = transformer.attention(z_BTD)
        attended_BTD = transformer.attention_branch(z_BTD)
        half_BTD = z_BTD + attended_BTD
        second_BTD = transformer.mlp_branch(half_BTD)
        next_BTD = half_BTD + second_BTD
        out.attention_branch.append(_ratio(attended_BTD, z_BTD))
        out.second_branch.append(_ratio(second_BTD, half_BTD))
        codes = transformer.mlp_input(transformer.mlp_norm(half_BTD))
    if codes is not None:
        out.unused_codes.append(float((codes <= 0).flatten(0, 1).all(0).float().mean()))
    tokens = z_BTD.shape[1]
    entropy = torch.special.entr(maps.double().clamp_min(0)).sum(-1).mean() / torch.tensor(float(tokens)).log()
    out.attention_entropy.append(float(entropy))
    if removed_BN is not None:
        out.visible_attention.append(_to_visible(maps, removed_BN))
    out.token_cosine.append(_token_cosine(next_BTD))
    out.token_rank.append(float(effective_rank(next_BTD).mean()))
    return next_BTD


def _ratio(branch_BTD: Tensor, stream_BTD: Tensor) -> float:
    norms = [x.flatten(1).norm(dim=1) for x in (branch_BTD, stream_BTD)]
    return float((norms[0] / norms[1].clamp_min(1e-30)).mean())


def _token_cosine(z_BTD: Tensor) -> float:
    """Mean over pairs of different tokens, from the norm of the sum of the unit tokens."""
    unit_BTD = F.normalize(z_BTD, dim=-1)
    tokens = z_BTD.shape[1]
    total_B = unit_BTD.sum(1).square().sum(-1) - unit_BTD.square().sum((1, 2))
    return float((total_B / (tokens * (tokens - 1))).mean())


def _to_visible(maps_BKTT: Tensor, removed_BN: Tensor) -> float:
    """Attention of removed patches to visible ones, without CLS."""
    patches_BKNN = maps_BKTT[:, :, 1:, 1:]
    to_visible_BKN = (patches_BKNN * ~removed_BN[:, None, None, :]).sum(-1)
    weights_BKN = removed_BN[:, None, :].expand_as(to_visible_BKN)
    return float((to_visible_BKN * weights_BKN).sum() / weights_BKN.sum().clamp_min(1))


def _gradients(model: MaskedAutoencoder, images: Tensor, noise: Tensor, encoder: Signals, decoder: Signals) -> None:
    parameters = dict(model.named_parameters())
    checkpoint_layers = model.checkpoint_layers
    # The gradients are the same, but need less memory. A training step may have fewer images, or half precision.
    model.checkpoint_layers = True
    try:
        with torch.enable_grad():
            loss = model(images, noise).loss
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        model.checkpoint_layers = checkpoint_layers
    norms = {
        name: float(gradient.norm()) for name, gradient in zip(parameters, found, strict=True) if gradient is not None
    }
    for signals, layers, prefix in ((encoder, model.encoder, "encoder"), (decoder, model.decoder, "decoder")):
        for index in range(len(layers)):
            for name, part in (_CRATE_PARTS | _VIT_PARTS).items():
                if (norm := norms.get(f"{prefix}.{index}.{name}")) is not None:
                    signals.gradients.setdefault(part, []).append(norm)
