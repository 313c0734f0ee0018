"""Encoder and decoder layer of CRATE-MAE, and the one place where weights of all models are initialised.

Shapes: B batch, T tokens, D token dimension, C = K·P rows of the codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crate_ray.config import CrateMAEConfig
from crate_ray.models.ista import ISTA
from crate_ray.models.kernels.linear import linear
from crate_ray.models.mssa import MSSA


def build_mssa(config: CrateMAEConfig, *, own_subspaces: bool = True) -> MSSA:
    """The subspace attention that `config` describes."""
    assert config.subspace_dim is not None  # filled in by the config's validation
    return MSSA(
        config.dim,
        config.num_subspaces,
        config.subspace_dim,
        output_map=config.output_map,
        attention=config.attention,
        own_subspaces=own_subspaces,
    )


class EncoderLayer(nn.Module):
    """Z½ = Z + MSSA(LN(Z));  Z' = ISTA(LN(Z½)), without a residual around ISTA  (arXiv 2404.02446)."""

    num_branches = 1
    """Residual branches that drop path may skip."""

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        self.mssa_norm = nn.LayerNorm(config.dim)
        self.mssa = build_mssa(config)
        self.ista_norm = nn.LayerNorm(config.dim)
        self.ista = ISTA(config.dim, step_size=config.step_size, sparsity_lambda=config.sparsity_lambda)

    def compress(self, z_BTD: Tensor) -> Tensor:
        """Z½, the tokens after the compression step; R^c is measured on them."""
        return z_BTD + self.mssa(self.mssa_norm(z_BTD))

    def sparsify(self, z_half_BTD: Tensor) -> Tensor:
        """Z', the tokens after the sparsification step; sparsity is measured on them."""
        return self.ista(self.ista_norm(z_half_BTD))

    def forward(self, z_BTD: Tensor, scale_BR: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) after this layer; scales (B, 1) are those of the compression step (drop path)."""
        if scale_BR is None:
            return self.sparsify(self.compress(z_BTD))
        return self.sparsify(z_BTD + scale_BR[:, :1, None] * self.mssa(self.mssa_norm(z_BTD)))

    def attention(self, z_BTD: Tensor) -> Tensor:
        """Attention maps (B, K, T, T) of this layer for its input tokens."""
        return self.mssa.attention(self.mssa_norm(z_BTD))

    def keys(self, z_BTD: Tensor) -> Tensor:
        """Subspace coordinates Uᵀ LN(z), (B, T, K·P), of this layer's input tokens."""
        return self.mssa.keys(self.mssa_norm(z_BTD))


class DecoderLayer(nn.Module):
    """Y½ = E LN(Y);  Y' = Y½ − MSSA(LN(Y½)): an encoder layer backwards in time  (arXiv 2404.02446).

    With `decoder_maps` 'tied' the layer owns neither E nor its codebook; `forward` is given the mirrored encoder
    layer's.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        own = config.decoder_maps == "free"
        self.expansion_norm = nn.LayerNorm(config.dim)
        self.expansion = nn.Parameter(torch.empty(config.dim, config.dim)) if own else None
        self.mssa_norm = nn.LayerNorm(config.dim)
        self.mssa = build_mssa(config, own_subspaces=own)

    def forward(self, y_BTD: Tensor, expansion_DD: Tensor | None = None, subspaces_CD: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) after this layer; E and V_[K] (rows V_1ᵀ … V_Kᵀ) are given where the layer has none."""
        expansion_DD = self.expansion if expansion_DD is None else expansion_DD
        assert expansion_DD is not None, "a tied decoder layer needs the encoder's maps"
        y_half_BTD = linear(self.expansion_norm(y_BTD), expansion_DD)
        return y_half_BTD - self.mssa(self.mssa_norm(y_half_BTD), subspaces_CD)


def initialize_weights(model: nn.Module) -> None:
    """Draw all weights anew from torch's global generator, as the published code does.

    Linear maps and the codebooks U (published as linear maps) Xavier-uniform with zero biases; the patch embedding's
    kernel Xavier-uniform as the linear map of a flattened patch, its bias as PyTorch draws it; D and E Kaiming-uniform;
    LayerNorm 1 and 0; CLS and mask token normal with standard deviation 0.02.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()
            nn.init.xavier_uniform_(module.weight.flatten(1))
        elif isinstance(module, MSSA):
            if module.subspaces is not None:
                nn.init.xavier_uniform_(module.subspaces)
        elif isinstance(module, ISTA):
            nn.init.kaiming_uniform_(module.dictionary)
        elif isinstance(module, DecoderLayer) and module.expansion is not None:
            nn.init.kaiming_uniform_(module.expansion)
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)
