"""One step of ISTA: the sparsification step of CRATE.

A proximal gradient step of the non-negative LASSO in the dictionary D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_ray.models.kernels.linear import gram, linear


class ISTA(nn.Module):
    """ISTA(Z) = ReLU(Z + η Dᵀ(Z − D Z) − η λ), D ∈ R^{d×d}  (arXiv 2404.02446).

    The published code forms DᵀZ − Dᵀ(D Z) with three products of the tokens; two give the same up to rounding, and one
    does, (Dᵀ − DᵀD) Z, once Dᵀ − DᵀD is formed. That takes d tokens' worth of one product, so it is cheaper for more
    than d tokens.

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
        dictionary_DD = self.dictionary
        # An exported program is for any number of tokens, and cannot choose by it.
        if not torch.compiler.is_exporting() and z_BTD.shape[:-1].numel() > z_BTD.shape[-1]:
            step_DD = self.step_size * (dictionary_DD.t() - gram(dictionary_DD))
            moved_BTD = z_BTD + F.linear(z_BTD, step_DD)
        else:
            residual_BTD = z_BTD - linear(z_BTD, dictionary_DD)
            moved_BTD = z_BTD + self.step_size * linear(residual_BTD, dictionary_DD.t())
        return _relu(moved_BTD - self.step_size * self.sparsity_lambda)


def _relu(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == "cpu":
        # The same numbers. Inductor's code for the CPU writes the mask of a ReLU bit by bit: 10 ms instead of 0.4 for
        # a batch of 8 images of the small model.
        return 0.5 * (x + x.abs())
    return F.relu(x)
