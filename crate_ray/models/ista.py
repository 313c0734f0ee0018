"""One step of ISTA: the sparsification step of CRATE.

A proximal gradient step of the non-negative LASSO in the dictionary D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ISTA(nn.Module):
    """ISTA(Z) = ReLU(Z + η Dᵀ(Z − D Z) − η λ), D ∈ R^{d×d}  (arXiv 2404.02446).

    The published code forms DᵀZ − Dᵀ(D Z) with three products; two give the same up to rounding.

    Parameters
    ----------
    dim
        d.
    step_size, sparsity_lambda
        η and λ.
    """

    def __init__(self, dim: int, *, step_size: float, sparsity_lambda: float) -> None:
        super().__init__()
        self.step_size = step_size
        self.sparsity_lambda = sparsity_lambda
        self.dictionary = nn.Parameter(torch.empty(dim, dim))

    def forward(self, z_BTD: Tensor) -> Tensor:
        """Sparser, non-negative codes (B, T, D) of normalised tokens (B, T, D)."""
        residual_BTD = z_BTD - F.linear(z_BTD, self.dictionary)
        gradient_BTD = F.linear(residual_BTD, self.dictionary.t())
        return F.relu(z_BTD + self.step_size * gradient_BTD - self.step_size * self.sparsity_lambda)
