"""CRATE-MAE, equation by equation: subspace attention, ISTA, encoder layer, decoder layer, and the whole model.

The white-box masked autoencoder of arXiv 2404.02446, with the switches of its ablations. The numbers of the equations
are those of docs/equations.md. `reference` has the same model without the fast forms of `kernels`.

Shapes: B batch, T tokens (the paper's N), D token dimension (d), K subspaces, P dimension of each (p), C = K·P. Tokens
are the rows of a tensor; in the equations they are the columns of Z.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_ray.config import CrateMAEConfig
from crate_ray.models.autoencoder import MaskedAutoencoder, initialize_weights
from crate_ray.models.kernels.attention import (
    attention_maps,
    choose_self_attention,
    merge_heads,
    self_attention,
    split_heads,
    visible_attention,
    visible_maps,
)
from crate_ray.models.kernels.ista import gradient_step, relu
from crate_ray.models.kernels.linear import Product, linear
from crate_ray.models.patches import Masking
from crate_ray.models.successors import LayerScale, OvercompleteISTA, reset_threshold, subtract_threshold

# --- Compression: a step that lowers the coding rate R^c(Z | U_[K]) --------------------------------------------------


def subspace_attention(coordinates: Tensor, visible: Tensor | None = None) -> Tensor:
    """SSA(Z | U_k) = (U_kᵀZ) softmax((U_kᵀZ)ᵀ(U_kᵀZ) / √p)    (4)

    Maps the coordinates U_kᵀZ in all subspaces, (B, K, T, P), to (B, K, T, P). They are query, key and value at once.
    With `visible` (B, T), each token attends to the visible tokens and to itself only.
    """
    return self_attention(coordinates) if visible is None else visible_attention(coordinates, visible)


def linear_subspace_attention(coordinates: Tensor) -> Tensor:
    """(U_kᵀZ)(U_kᵀZ)ᵀ(U_kᵀZ) / (√p T): (4) without softmax, (B, K, T, P) to (B, K, T, P).

    This is the data-dependent part of the coding rate's gradient. With α = p / (T ε²),

        ∇R^c(Z) = α Σ_k U_k U_kᵀZ (I + α (U_kᵀZ)ᵀ(U_kᵀZ))⁻¹ ≈ α Σ_k U_k U_kᵀZ (I − α (U_kᵀZ)ᵀ(U_kᵀZ)).

    The term linear in Z goes into the residual. The other term is, up to its step size, U_k U_kᵀZ times
    α (U_kᵀZ)ᵀ(U_kᵀZ). ε is free; ε² = p^{3/2} gives α = 1 / (√p T). The expansion
    softmax(s)_j = (1 + s_j − mean(s)) / T + O(s²) of (4) at s = (U_kᵀZ)ᵀ(U_kᵀZ) / √p has the same term, so both forms
    have the same scale for any number of tokens.
    """
    # (w wᵀ) w = w (wᵀ w), whose cost is linear in the number of tokens.
    return coordinates @ (coordinates.transpose(-1, -2) @ (coordinates * _linear_scale(coordinates)))


def _linear_scale(w_BKTP: Tensor) -> float:
    return w_BKTP.shape[-1] ** -0.5 / w_BKTP.shape[-2]


class MSSA(nn.Module):
    """MSSA(Z) = W [SSA(Z | U_1); …; SSA(Z | U_K)]    (5)

    Multi-head subspace self-attention, an approximate gradient step on R^c(Z | U_[K]). Weights are not initialised
    here; see `initialize_weights`.

    Parameters
    ----------
    dim, num_subspaces, subspace_dim
        d, K and p; K·p may differ from d.
    output_map
        'learned': W (d × K·p), as published. 'tied': W = [U_1 … U_K], as the gradient of R^c gives it, without
        parameters of its own.
    output_bias
        Whether a learned W has a bias, as published.
    attention
        'softmax', as published, or 'linear'; see `linear_subspace_attention`.
    own_subspaces
        False for a decoder layer that gets the encoder's codebook in `forward`.
    """

    def __init__(
        self,
        dim: int,
        num_subspaces: int,
        subspace_dim: int,
        *,
        output_map: Literal["learned", "tied"] = "learned",
        output_bias: bool = True,
        attention: Literal["softmax", "linear"] = "softmax",
        own_subspaces: bool = True,
    ) -> None:
        super().__init__()
        rows = num_subspaces * subspace_dim
        self.num_subspaces = num_subspaces
        self.linear_attention = attention == "linear"
        self.subspaces = nn.Parameter(torch.empty(rows, dim)) if own_subspaces else None
        self.output = nn.Linear(rows, dim, bias=output_bias) if output_map == "learned" else None
        self.product: Product = linear
        """Computes products of tokens and weights."""

    def reset_parameters(self) -> None:
        """Draw the codebook Xavier-uniform, as the linear map that it is in the published code."""
        if self.subspaces is not None:
            nn.init.xavier_uniform_(self.subspaces)

    def forward(self, z: Tensor, subspaces: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Update of every token, (B, T, D), from normalised tokens (B, T, D).

        `subspaces` is the codebook (C, D) with the rows U_1ᵀ … U_Kᵀ, for a layer without its own. `visible` (B, T)
        restricts attention; see `subspace_attention`.
        """
        codebook_CD = self._codebook(subspaces)
        w_BKTP = split_heads(self.product(z, codebook_CD), self.num_subspaces)
        o_BKTP = linear_subspace_attention(w_BKTP) if self.linear_attention else subspace_attention(w_BKTP, visible)
        o_BTC = merge_heads(o_BKTP)
        if self.output is None:
            return self.product(o_BTC, codebook_CD.t())
        return self.product(o_BTC, self.output.weight, self.output.bias)

    def keys(self, z: Tensor, subspaces: Tensor | None = None) -> Tensor:
        """Coordinates U_kᵀz of every token in all subspaces, (B, T, K·P)."""
        return linear(z, self._codebook(subspaces))

    def attention(self, z: Tensor, subspaces: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Attention maps, (B, K, T, T); entry [.., i, j] is the weight of token j in the update of token i."""
        w_BKTP = split_heads(self.keys(z, subspaces), self.num_subspaces)
        if self.linear_attention:
            return (w_BKTP * _linear_scale(w_BKTP)) @ w_BKTP.transpose(-1, -2)
        return attention_maps(w_BKTP, w_BKTP) if visible is None else visible_maps(w_BKTP, visible)

    def _codebook(self, subspaces_CD: Tensor | None) -> Tensor:
        codebook_CD = self.subspaces if subspaces_CD is None else subspaces_CD
        assert codebook_CD is not None, "a tied decoder layer needs the encoder's codebook"
        return codebook_CD


# --- Sparsification: a proximal step on the non-negative LASSO ------------------------------------------------------


class ISTA(nn.Module):
    """ISTA(Z) = ReLU(Z + η Dᵀ(Z − D Z) − η λ)    (6)

    One step of the iterative shrinkage-thresholding algorithm for non-negative codes in the dictionary D ∈ R^{d×d}: a
    gradient step on the reconstruction error, then the proximal step of λ‖·‖₁ with non-negativity. Weights are not
    initialised here; see `initialize_weights`.

    Parameters
    ----------
    dim
        d.
    step_size, sparsity_lambda
        η and λ.
    learned_threshold
        Learn the threshold of each code, starting at ηλ.
    """

    def __init__(self, dim: int, *, step_size: float, sparsity_lambda: float, learned_threshold: bool = False) -> None:
        super().__init__()
        self.step_size = step_size
        self.sparsity_lambda = sparsity_lambda
        self.dictionary = nn.Parameter(torch.empty(dim, dim))
        self.log_threshold = nn.Parameter(torch.empty(dim)) if learned_threshold else None
        self.product: Product = F.linear
        """Computes the product of many tokens with Dᵀ − DᵀD."""

    def reset_parameters(self) -> None:
        """Draw D Kaiming-uniform, as published."""
        nn.init.kaiming_uniform_(self.dictionary)
        reset_threshold(self.log_threshold, self.step_size, self.sparsity_lambda)

    def forward(self, z: Tensor) -> Tensor:
        """Sparser, non-negative codes (B, T, D) of normalised tokens (B, T, D)."""
        x_BTD = gradient_step(z, self.dictionary, self.step_size, self.product)
        return relu(subtract_threshold(x_BTD, self.log_threshold, self.step_size, self.sparsity_lambda))

    def codes(self, z: Tensor) -> Tensor:
        """The codes themselves."""
        return self(z)


# --- Layers ---------------------------------------------------------------------------------------------------------


class TokenNorm(nn.LayerNorm):
    """LayerNorm of tokens (B, T, D) whose result has the dtype of its input. Under autocast CUDA's has fp32."""

    def forward(self, z: Tensor) -> Tensor:
        """Normalised tokens."""
        return super().forward(z).to(z.dtype)


class EncoderLayer(nn.Module):
    """Z½ = Z + MSSA(LN(Z));  Z' = ISTA(LN(Z½))    (7)

    Compression, then sparsification. As published, there is no residual around ISTA. With `residual` 'all',
    Z' = Z½ + ISTA(LN(Z½)).
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        self.residual = config.residual == "all"
        self.num_branches = 1 + self.residual
        """Residual branches that drop path may skip."""
        self.mssa_norm = TokenNorm(config.dim, eps=config.norm_eps)
        self.mssa = _build_mssa(config)
        self.ista_norm = TokenNorm(config.dim, eps=config.norm_eps)
        self.ista = _build_ista(config)
        self.mssa_scale = _build_scale(config)
        self.ista_scale = _build_scale(config) if self.residual else None

    def compress(self, z: Tensor, scale: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Z½, the tokens after the compression step. R^c is measured on them."""
        return z + _scaled(self.mssa(self.mssa_norm(z), visible=visible), self.mssa_scale, scale)

    def sparsify(self, z_half: Tensor, scale: Tensor | None = None) -> Tensor:
        """Z', the tokens after the sparsification step."""
        step_BTD = self.ista(self.ista_norm(z_half))
        return z_half + _scaled(step_BTD, self.ista_scale, scale) if self.residual else step_BTD

    def codes(self, z_half: Tensor) -> Tensor:
        """The codes of the sparsification step. Sparsity is measured on them. As published, they are Z'."""
        return self.ista.codes(self.ista_norm(z_half))

    def forward(self, z: Tensor, scale: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) after this layer.

        `scale` (B, branches) multiplies the residual branches (drop path). With `visible` (B, T), tokens attend to the
        visible ones and to themselves only.
        """
        if scale is None:
            return self.sparsify(self.compress(z, visible=visible))
        return self.sparsify(self.compress(z, scale[:, :1], visible), scale[:, 1:])

    def attention(self, z: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attention maps (B, K, T, T) of this layer for its input tokens."""
        return self.mssa.attention(self.mssa_norm(z), visible=visible)

    def keys(self, z: Tensor) -> Tensor:
        """Subspace coordinates Uᵀ LN(z), (B, T, K·P), of this layer's input tokens."""
        return self.mssa.keys(self.mssa_norm(z))


class DecoderLayer(nn.Module):
    """Y½ = E LN(Y);  Y' = Y½ − MSSA(LN(Y½))    (8)

    The encoder layer reversed in time: E ∈ R^{d×d} undoes the sparsification, and the step against MSSA the
    compression. With `decoder_maps` 'tied' the layer has neither E nor a codebook; `forward` gets those of the mirrored
    encoder layer. With `residual` 'all', Y½ = Y + E LN(Y). With an overcomplete dictionary, Y½ = Y + ISTA(LN(Y)) takes
    the step of the encoder layer's second half, in the order of time reversal.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        own = config.decoder_maps == "free"
        square = config.dictionary == "square"
        self.residual = config.residual == "all"
        self.relu = config.decoder_activation == "relu"
        self.expansion_norm = TokenNorm(config.dim, eps=config.norm_eps)
        self.expansion = nn.Parameter(torch.empty(config.dim, config.dim)) if own and square else None
        self.ista = None if square else _build_ista(config)
        self.mssa_norm = TokenNorm(config.dim, eps=config.norm_eps)
        self.mssa = _build_mssa(config, own_subspaces=own)
        self.expansion_scale = _build_scale(config) if self.residual else None
        self.mssa_scale = _build_scale(config)
        self.product: Product = linear
        """Computes the product of tokens and E."""

    def reset_parameters(self) -> None:
        """Draw E Kaiming-uniform, as published."""
        if self.expansion is not None:
            nn.init.kaiming_uniform_(self.expansion)

    def forward(
        self,
        y: Tensor,
        expansion: Tensor | None = None,
        subspaces: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, T, D) after this layer.

        E (D, D) and the codebook (C, D) are given if the layer has none. With `visible` (B, T), tokens attend to the
        visible ones and to themselves only.
        """
        y_half_BTD = self.expand(y, expansion)
        return y_half_BTD - _scaled(self.mssa(self.mssa_norm(y_half_BTD), subspaces, visible), self.mssa_scale)

    def expand(self, y: Tensor, expansion: Tensor | None = None) -> Tensor:
        """Y½, the tokens before the step against MSSA."""
        y_half_BTD = self._expand(self.expansion_norm(y), expansion)
        return y + _scaled(y_half_BTD, self.expansion_scale) if self.residual else y_half_BTD

    def _expand(self, y_BTD: Tensor, expansion_DD: Tensor | None) -> Tensor:
        if self.ista is not None:
            return self.ista(y_BTD)
        expansion_DD = self.expansion if expansion_DD is None else expansion_DD
        assert expansion_DD is not None, "a tied decoder layer needs the encoder's maps"
        expanded_BTD = self.product(y_BTD, expansion_DD)
        return relu(expanded_BTD) if self.relu else expanded_BTD


def _scaled(branch_BTD: Tensor, layer_scale: nn.Module | None, scale_B1: Tensor | None = None) -> Tensor:
    """A residual branch times its LayerScale and its factors of drop path, if there are any."""
    if layer_scale is not None:
        branch_BTD = layer_scale(branch_BTD)
    return branch_BTD if scale_B1 is None else scale_B1[:, :, None].to(branch_BTD.dtype) * branch_BTD


def _build_scale(config: CrateMAEConfig) -> nn.Module | None:
    return None if config.layer_scale is None else LayerScale(config.dim, config.layer_scale)


def _build_ista(config: CrateMAEConfig) -> ISTA | OvercompleteISTA:
    learned, sizes = config.threshold == "learned", (config.step_size, config.sparsity_lambda)
    if config.dictionary == "square":
        return ISTA(config.dim, step_size=sizes[0], sparsity_lambda=sizes[1], learned_threshold=learned)
    atoms = config.dictionary_expansion * config.dim
    return OvercompleteISTA(config.dim, atoms, step_size=sizes[0], sparsity_lambda=sizes[1], learned_threshold=learned)


def _build_mssa(config: CrateMAEConfig, *, own_subspaces: bool = True) -> MSSA:
    assert config.subspace_dim is not None  # set by the config's validation
    return MSSA(
        config.dim,
        config.num_subspaces,
        config.subspace_dim,
        output_map=config.output_map,
        output_bias=config.output_bias,
        attention=config.attention,
        own_subspaces=own_subspaces,
    )


# --- The model ------------------------------------------------------------------------------------------------------


def build_layers(config: CrateMAEConfig) -> tuple[Iterable[nn.Module], Iterable[nn.Module]]:
    """Encoder and decoder layers that a config describes. This is the one place where layers are chosen."""
    assert config.decoder_depth is not None  # set by the config's validation
    encoder = (EncoderLayer(config) for _ in range(config.depth))
    decoder = (DecoderLayer(config) for _ in range(config.decoder_depth))
    return encoder, decoder


def _draw_small(model: nn.Module) -> None:
    """Draw U and W of every MSSA from N(0, 0.02²), as CRATE-α does (arXiv 2405.20299)."""
    for module in model.modules():
        if isinstance(module, MSSA):
            for weight in (module.subspaces, None if module.output is None else module.output.weight):
                if weight is not None and not weight.is_meta:
                    nn.init.normal_(weight, std=_SMALL_STD)


_SMALL_STD = 0.02


def _visible_tokens(masking: Masking | None) -> dict[str, Tensor]:
    if masking is None:
        return {}
    removed_BM = masking.removed if masking.decoded is None else masking.removed.gather(1, masking.decoded)
    return {"visible": F.pad(~removed_BM, (1, 0), value=True)}


class CrateMAE(MaskedAutoencoder):
    """CRATE-MAE: encoder layers (7) and decoder layers (8) in the masked autoencoder (9)-(11).

    `MaskedAutoencoder` documents what surrounds the layers, and `CrateMAEConfig` the settings. In `forward` every
    parameter gets a gradient, with every setting. With `decoder_maps` 'tied', decoder layer l uses the codebook U and
    Dᵀ of encoder layer L − 1 − l; each tensor is stored once.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        encoder, decoder = build_layers(config)
        super().__init__(
            config,
            encoder=encoder,
            decoder=decoder,
            dim=config.dim,
            decoder_dim=config.dim,
            encoder_tokens=config.encoder_tokens,
            norm_eps=config.last_norm_eps,
            learned_positions=config.positions == "learned",
            patch_norm_eps=config.norm_eps if config.patch_norm else None,
        )
        self.config = config
        self.num_predicted = config.num_predicted
        self.tied_decoder = config.decoder_maps == "tied"
        self.unused_published: dict[str, Tensor] = {}
        """Tensors of an imported checkpoint that the model does not use, kept for the export; see `published`."""
        initialize_weights(self)
        if config.initialization == "small":
            _draw_small(self)

    def encoder_mask(self, masking: Masking | None) -> dict[str, Tensor]:
        """Which tokens are visible, (B, T), if encoder layers attend to these only."""
        return _visible_tokens(masking) if self.config.attend_to == "visible" else {}

    def decoder_mask(self, masking: Masking | None) -> dict[str, Tensor]:
        """Which tokens are visible, (B, T), if decoder layers attend to these only."""
        return _visible_tokens(masking) if self.config.decoder_attend_to == "visible" else {}

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """A published size ('tiny', 'small', 'base' or 'large') with fresh weights. Overrides are config fields."""
        return cls(CrateMAEConfig.model_validate({"preset": preset, **overrides}))

    def choose_kernels(self, batch_size: int, dtype: torch.dtype) -> list[str]:
        """Measure the kernels of attention on the current GPU for batches of this size, and use the fastest.

        Returns a sentence for each shape of the model, for the log.
        """
        if self.config.attention == "linear" or dtype == torch.float32:
            return []
        heads, dim = self.config.num_subspaces, self.config.subspace_dim
        assert dim is not None  # set by the config's validation
        encoder_tokens = self.num_visible if self.visible_only else self.num_patches
        shapes = sorted({encoder_tokens + 1, self.num_patches + 1})
        return [choose_self_attention(batch_size, heads, tokens, dim, dtype) for tokens in shapes]

    def decoder_layer(self, index: int, y: Tensor, **masked: Tensor) -> Tensor:
        """Tokens after decoder layer `index`, which uses the mirrored encoder layer's maps if they are tied."""
        return self.run_layer(self.decoder[index], y, *self.tied_maps(index), **masked)

    def tied_maps(self, index: int) -> tuple[Tensor, ...]:
        """E and the codebook that a decoder layer gets from the mirrored encoder layer; empty if it has its own."""
        if not self.tied_decoder:
            return ()
        mirrored = cast("EncoderLayer", self.encoder[len(self.encoder) - 1 - index])
        codebook_CD = cast("Tensor", mirrored.mssa.subspaces)
        return mirrored.ista.dictionary.t(), codebook_CD
