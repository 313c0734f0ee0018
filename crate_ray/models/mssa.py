"""Multi-head subspace self-attention: the compression step of CRATE, a gradient step on R^c(Z | U_[K]).

Also the plain attention that it shares with the ViT baseline. Shapes: B batch, T tokens, D token dimension, K subspaces
(or heads), P dimension of one, C = K·P.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_ray.models.kernels.cpu_attention import self_attention
from crate_ray.models.kernels.linear import linear


def split_subspaces(w_BTC: Tensor, num_subspaces: int) -> Tensor:
    """Coordinates of all subspaces side by side, (B, T, K·P), as (B, K, T, P)."""
    return w_BTC.unflatten(-1, (num_subspaces, -1)).transpose(1, 2)


def merge_subspaces(w_BKTP: Tensor) -> Tensor:
    """Inverse of `split_subspaces`: (B, K, T, P) to (B, T, K·P)."""
    return w_BKTP.transpose(1, 2).flatten(2)


def softmax_attention(q_BKTP: Tensor, k_BKTP: Tensor) -> Tensor:
    """Attention maps softmax(q kᵀ / √P), (B, K, T, T); rows sum to one."""
    scale = q_BKTP.shape[-1] ** -0.5
    return torch.softmax((q_BKTP * scale) @ k_BKTP.transpose(-1, -2), dim=-1)


_EXPLICIT_TOKENS = 2048


def attend(q_BKTP: Tensor, k_BKTP: Tensor, v_BKTP: Tensor) -> Tensor:
    """softmax(q kᵀ / √P) v, (B, K, T, P), in the form that is fast on the tensors' device.

    That is the fused kernel, which also never holds the maps (B, K, T, T), but in bf16 on the CPU it is slower: forward
    and backward pass of 197 tokens take 2.1 times as long as with maps, of 1,025 tokens 2.3 times. There it is used
    where maps would be large: from 2,048 tokens on, where it is as fast.
    """
    if q_BKTP.device.type == "cpu" and q_BKTP.dtype == torch.bfloat16 and q_BKTP.shape[-2] < _EXPLICIT_TOKENS:
        return softmax_attention(q_BKTP, k_BKTP) @ v_BKTP
    return F.scaled_dot_product_attention(q_BKTP, k_BKTP, v_BKTP)


def self_attend(w_BKTP: Tensor) -> Tensor:
    """softmax(w wᵀ / √P) w, (B, K, T, P): `attend` with query = key = value, without keeping maps anywhere."""
    if w_BKTP.device.type == "cpu" and w_BKTP.dtype == torch.bfloat16 and not torch.compiler.is_exporting():
        return self_attention(w_BKTP.flatten(0, 1).contiguous()).unflatten(0, w_BKTP.shape[:2])
    return F.scaled_dot_product_attention(w_BKTP, w_BKTP, w_BKTP)


class MSSA(nn.Module):
    """MSSA(Z) = W [SSA(Z | U_1); …; SSA(Z | U_K)]  (arXiv 2404.02446).

    SSA(Z | U_k) = (U_kᵀZ) softmax((U_kᵀZ)ᵀ(U_kᵀZ) / √p): query, key and value are the same coordinates.

    Parameters
    ----------
    dim, num_subspaces, subspace_dim
        d, K and p; K·p may differ from d.
    output_map
        'learned': W (d × K·p) with a bias, as published. 'tied': [U_1 … U_K] itself, which the gradient of R^c gives;
        no parameters of its own.
    attention
        'softmax', as published. 'linear': the dots without softmax, over √p·T. This is the data-dependent part of the
        gradient: with α = p / (T ε²),

            ∇R^c(Z) = α Σ_k U_k U_kᵀZ (I + α (U_kᵀZ)ᵀ(U_kᵀZ))⁻¹ ≈ α Σ_k U_k U_kᵀZ (I − α (U_kᵀZ)ᵀ(U_kᵀZ)),

        whose part linear in Z goes into the residual and whose other part is, up to its step size, U_k U_kᵀZ times
        α (U_kᵀZ)ᵀ(U_kᵀZ). Of the free ε we take ε² = p^{3/2}, so that α = 1 / (√p T): the expansion
        softmax(s)_j = (1 + s_j − mean(s)) / T + O(s²) of the published map at s = (U_kᵀZ)ᵀ(U_kᵀZ) / √p has the same
        term, so both maps have the same scale, for any number of tokens.
    own_subspaces
        False for a decoder layer that is given the encoder's codebook in `forward`.
    """

    def __init__(
        self,
        dim: int,
        num_subspaces: int,
        subspace_dim: int,
        *,
        output_map: Literal["learned", "tied"] = "learned",
        attention: Literal["softmax", "linear"] = "softmax",
        own_subspaces: bool = True,
    ) -> None:
        super().__init__()
        rows = num_subspaces * subspace_dim
        self.num_subspaces = num_subspaces
        self.linear_attention = attention == "linear"
        self.subspaces = nn.Parameter(torch.empty(rows, dim)) if own_subspaces else None
        self.output = nn.Linear(rows, dim) if output_map == "learned" else None

    def keys(self, z_BTD: Tensor, subspaces_CD: Tensor | None = None) -> Tensor:
        """Coordinates U_kᵀz of every token in all subspaces, (B, T, K·P); they are query, key and value at once."""
        return linear(z_BTD, self._codebook(subspaces_CD))

    def attention(self, z_BTD: Tensor, subspaces_CD: Tensor | None = None) -> Tensor:
        """Attention maps, (B, K, T, T), [.., i, j] = weight of token j in the update of token i."""
        w_BKTP = split_subspaces(self.keys(z_BTD, subspaces_CD), self.num_subspaces)
        if self.linear_attention:
            return (w_BKTP * _linear_scale(w_BKTP)) @ w_BKTP.transpose(-1, -2)
        return softmax_attention(w_BKTP, w_BKTP)

    def forward(self, z_BTD: Tensor, subspaces_CD: Tensor | None = None) -> Tensor:
        """The update of every token, (B, T, D), from normalised tokens and, where this layer has none, a codebook.

        `subspaces_CD` holds U_1ᵀ … U_Kᵀ as its rows.
        """
        codebook_CD = self._codebook(subspaces_CD)
        w_BKTP = split_subspaces(linear(z_BTD, codebook_CD), self.num_subspaces)
        if self.linear_attention:
            # (w wᵀ) w = w (wᵀ w): linear in the number of tokens without the softmax.
            o_BKTP = w_BKTP @ (w_BKTP.transpose(-1, -2) @ (w_BKTP * _linear_scale(w_BKTP)))
        else:
            o_BKTP = self_attend(w_BKTP)
        o_BTC = merge_subspaces(o_BKTP)
        if self.output is None:
            return linear(o_BTC, codebook_CD.t())
        return linear(o_BTC, self.output.weight, self.output.bias)

    def _codebook(self, subspaces_CD: Tensor | None) -> Tensor:
        codebook_CD = self.subspaces if subspaces_CD is None else subspaces_CD
        assert codebook_CD is not None, "a tied decoder layer needs the encoder's maps"
        return codebook_CD


def _linear_scale(w_BKTP: Tensor) -> float:
    return w_BKTP.shape[-1] ** -0.5 / w_BKTP.shape[-2]
