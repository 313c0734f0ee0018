"""What followed CRATE-MAE, as parts of the same layers: CRATE-α's overcomplete dictionary, and LayerScale.

Shapes: B batch, T tokens, D token dimension (d), M atoms of a dictionary (m).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crate_ray.models.kernels.ista import relu
from crate_ray.models.kernels.linear import Product, linear


class OvercompleteISTA(nn.Module):
    """A₁ = ReLU(η DᵀZ − ηλ);  A₂ = ReLU(A₁ − η Dᵀ(D A₁ − Z) − ηλ);  Z ↦ D′ A₂    (6α)

    Two steps of ISTA from A₀ = 0 in an overcomplete dictionary D ∈ R^{d×m}, and a map D′ ∈ R^{d×m} of the codes back to
    tokens (CRATE-α, arXiv 2405.20299). D′ = D would be the derivation's own choice; CRATE-α decouples the two. Weights
    are not initialised here; see `initialize_weights`.

    Parameters
    ----------
    dim, atoms
        d and m.
    step_size, sparsity_lambda
        η and λ.
    learned_threshold
        Learn the threshold of each atom, starting at ηλ.
    """

    def __init__(
        self, dim: int, atoms: int, *, step_size: float, sparsity_lambda: float, learned_threshold: bool = False
    ) -> None:
        super().__init__()
        self.step_size, self.sparsity_lambda = step_size, sparsity_lambda
        self.dictionary = nn.Parameter(torch.empty(dim, atoms))
        self.synthesis = nn.Parameter(torch.empty(dim, atoms))
        self.log_threshold = nn.Parameter(torch.empty(atoms)) if learned_threshold else None
        self.product: Product = linear
        """Computes products of tokens and weights."""

    def reset_parameters(self) -> None:
        """Draw D and D′ Kaiming-uniform with fan-in d, as CRATE-α does."""
        for weight_DM in (self.dictionary, self.synthesis):
            nn.init.kaiming_uniform_(weight_DM.t())
        reset_threshold(self.log_threshold, self.step_size, self.sparsity_lambda)

    def forward(self, z: Tensor) -> Tensor:
        """Tokens (B, T, D) that the codes of normalised tokens (B, T, D) stand for."""
        return self.product(self.codes(z), self.synthesis)

    def codes(self, z: Tensor) -> Tensor:
        """A₂, the sparse codes (B, T, M) of normalised tokens (B, T, D)."""
        a_BTM = self._shrink(self.step_size * self.product(z, self.dictionary.t()))
        residual_BTD = self.product(a_BTM, self.dictionary) - z
        return self._shrink(a_BTM - self.step_size * self.product(residual_BTD, self.dictionary.t()))

    def _shrink(self, a_BTM: Tensor) -> Tensor:
        return relu(subtract_threshold(a_BTM, self.log_threshold, self.step_size, self.sparsity_lambda))


class LayerScale(nn.Module):
    """Z ↦ γ ⊙ Z with a learned factor γ per channel (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.factor = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        """Set all factors to the initial value."""
        nn.init.constant_(self.factor, self.initial)

    def forward(self, z: Tensor) -> Tensor:
        """Scaled tokens (B, T, D)."""
        return z * self.factor.to(z.dtype)


def subtract_threshold(x: Tensor, log_threshold: Tensor | None, step_size: float, sparsity_lambda: float) -> Tensor:
    """x minus ISTA's threshold: ηλ, or learned ones of the codes (…, M), which stay positive."""
    return x - (step_size * sparsity_lambda if log_threshold is None else log_threshold.exp().to(x.dtype))


def reset_threshold(log_threshold: Tensor | None, step_size: float, sparsity_lambda: float) -> None:
    """Set learned thresholds to ηλ."""
    if log_threshold is not None:
        nn.init.constant_(log_threshold, torch.tensor(step_size * sparsity_lambda).log().item())
