"""ViT-MAE, the baseline (arXiv 2111.06377): pre-norm transformer layers and an encoder of visible patches only.

Shapes: B batch, T tokens, D token dimension, K heads, P dimension of a head.
"""

from __future__ import annotations

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from crate_ray.config import ViTMAEConfig
from crate_ray.models.autoencoder import MaskedAutoencoder, initialize_weights
from crate_ray.models.kernels.attention import attention, attention_maps, merge_heads, split_heads

NORM_EPS = 1e-6


class TransformerLayer(nn.Module):
    """z½ = z + Attention(LN(z));  z' = z½ + MLP(LN(z½)), with a GELU MLP of width ⌊mlp_ratio · dim⌋."""

    num_branches = 2
    """Residual branches that drop path may skip."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attention_output = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp_input = nn.Linear(dim, hidden)
        self.mlp_output = nn.Linear(hidden, dim)

    def forward(self, z: Tensor, scale: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) after this layer. `scale` (B, 2) multiplies attention and MLP (drop path)."""
        attended_BTD = self.attention_branch(z)
        z_half_BTD = z + (attended_BTD if scale is None else scale[:, :1, None].to(z.dtype) * attended_BTD)
        mapped_BTD = self.mlp_branch(z_half_BTD)
        return z_half_BTD + (mapped_BTD if scale is None else scale[:, 1:, None].to(z.dtype) * mapped_BTD)

    def attention_branch(self, z: Tensor) -> Tensor:
        """Attention(LN(z)), (B, T, D)."""
        return self.attention_output(merge_heads(attention(*self._query_key_value(z))))

    def mlp_branch(self, z_half: Tensor) -> Tensor:
        """MLP(LN(z½)), (B, T, D)."""
        return self.mlp_output(F.gelu(self.mlp_input(self.mlp_norm(z_half))))

    def attention(self, z: Tensor) -> Tensor:
        """Attention maps (B, K, T, T) of this layer for its input tokens."""
        query_BKTP, key_BKTP, _ = self._query_key_value(z)
        return attention_maps(query_BKTP, key_BKTP)

    def keys(self, z: Tensor) -> Tensor:
        """Keys (B, T, D) of this layer's input tokens, all heads side by side."""
        return merge_heads(self._query_key_value(z)[1])

    def _query_key_value(self, z_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(self.attention_norm(z_BTD)).chunk(3, dim=-1)
        heads = self.num_heads
        return split_heads(query, heads), split_heads(key, heads), split_heads(value, heads)


class ViTMAE(MaskedAutoencoder):
    """ViT-MAE, with the interface of `CrateMAE`. `MaskedAutoencoder` documents what surrounds the layers."""

    def __init__(self, config: ViTMAEConfig) -> None:
        # Set by the config's validation.
        assert config.decoder_dim is not None
        assert config.decoder_depth is not None
        assert config.decoder_num_heads is not None
        width, heads = config.decoder_dim, config.decoder_num_heads
        mlp_ratio, qkv_bias = config.mlp_ratio, config.qkv_bias
        super().__init__(
            config,
            encoder=(TransformerLayer(config.dim, config.num_heads, mlp_ratio, qkv_bias) for _ in range(config.depth)),
            decoder=(TransformerLayer(width, heads, mlp_ratio, qkv_bias) for _ in range(config.decoder_depth)),
            dim=config.dim,
            decoder_dim=width,
            encoder_tokens="visible",
            decoder_embed=nn.Linear(config.dim, width),
            norm_eps=NORM_EPS,
        )
        self.config = config
        initialize_weights(self)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """A preset of `ViTMAEConfig` with fresh weights. Overrides are config fields."""
        return cls(ViTMAEConfig.model_validate({"preset": preset, **overrides}))
