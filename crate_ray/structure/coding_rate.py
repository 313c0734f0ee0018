"""Lossy coding rates of token sets, against nothing and against a codebook of subspaces (arXiv 2306.01129, 2404.02446).

Shapes: T tokens (the papers' N), D token dimension (d), K subspaces, P dimension of each (p); leading dimensions are
batches, each of whose token sets is measured for itself. Rates are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 0.5
"""Distortion ε up to which tokens are coded; 0.5 as in the coding rate's other uses (arXiv 2006.08558)."""


def coding_rate(z_TD: Tensor, epsilon: float = EPSILON) -> Tensor:
    """R(Z) = ½ logdet(I + d/(N ε²) ZᵀZ) of each set of tokens, (...,).

    The determinant is taken on the smaller side: that of I + a ZᵀZ and of I + a ZZᵀ are the same.
    """
    tokens, dim = z_TD.shape[-2:]
    return _half_logdet(z_TD, dim / (tokens * epsilon**2))


def codebook_rates(w_KTP: Tensor, epsilon: float = EPSILON) -> Tensor:
    """½ logdet(I + p/(N ε²) (U_kᵀZ)ᵀ(U_kᵀZ)) of each subspace, (..., K), from coordinates w = U_kᵀZ, (..., K, T, P).

    Their sum over the subspaces is R^c(Z | U_[K]).
    """
    tokens, subspace_dim = w_KTP.shape[-2:]
    return _half_logdet(w_KTP, subspace_dim / (tokens * epsilon**2))


def project(z_TD: Tensor, codebook_KPD: Tensor) -> Tensor:
    """Coordinates U_kᵀz of tokens (..., T, D) in the subspaces of a codebook, (..., K, T, P)."""
    return z_TD.unsqueeze(-3) @ codebook_KPD.transpose(-1, -2)


def rate_reduction(z_TD: Tensor, codebook_KPD: Tensor, epsilon: float = EPSILON) -> Tensor:
    """ΔR(Z | U_[K]) = R(Z) − R^c(Z | U_[K]) of each set of tokens, (...,)."""
    return coding_rate(z_TD, epsilon) - codebook_rates(project(z_TD, codebook_KPD), epsilon).sum(-1)


def effective_rank(x_TP: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007), (...,): from 1 to min(T, P).

    Singular values are roots of the smaller Gram matrix's eigenvalues: several times faster than a decomposition of
    the tokens, and exact to about 1e-8 of the largest.
    """
    values = torch.linalg.eigvalsh(_gram(x_TP.double())).clamp_min(0).sqrt()
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


def orthonormal_bases(codebook_KPD: Tensor) -> Tensor:
    """Orthonormal rows that span the same subspaces as a codebook's, (K, P, D) float64; P is at most D."""
    return torch.linalg.qr(codebook_KPD.double().transpose(-1, -2)).Q.transpose(-1, -2)


def coherence(codebook_KPD: Tensor) -> Tensor:
    """Largest cosine between directions of two subspaces, (K, K): 0 where they are orthogonal, 1 where they meet.

    The codebook's rows need not be orthonormal; each subspace is taken as their span. The diagonal is 1.
    """
    basis_KDP = orthonormal_bases(codebook_KPD).transpose(-1, -2)
    cosines_KKPP = basis_KDP.unsqueeze(1).transpose(-1, -2) @ basis_KDP.unsqueeze(0)
    return torch.linalg.matrix_norm(cosines_KKPP, ord=2).clamp(max=1.0)


def _gram(x_TP: Tensor) -> Tensor:
    """XᵀX or XXᵀ, whichever is smaller; their eigenvalues are the same but for zeros."""
    tall = x_TP.shape[-2] > x_TP.shape[-1]
    return x_TP.transpose(-1, -2) @ x_TP if tall else x_TP @ x_TP.transpose(-1, -2)


def _half_logdet(x_TP: Tensor, scale: float) -> Tensor:
    gram = _gram(x_TP.double())
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # By Cholesky: the matrix is symmetric and its eigenvalues are at least 1.
    return torch.linalg.cholesky(identity + scale * gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)
