"""Lossy coding rates of tokens and the sparse rate reduction, the objective of CRATE (arXiv 2306.01129, 2404.02446).

The numbers of the equations are those of docs/equations.md. Shapes: T tokens (the papers' N), D token dimension (d), K
subspaces, P dimension of each (p). Leading dimensions are batches of token sets; each set has its own rate. Rates are
in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 0.5
"""Distortion ε up to which tokens are coded; 0.5 as in earlier work on the coding rate (arXiv 2006.08558)."""


def coding_rate(tokens: Tensor, epsilon: float = EPSILON) -> Tensor:
    """R(Z) = ½ logdet(I + d/(N ε²) ZᵀZ)    (1)

    Rate of each set of tokens (…, T, D), (…,). det(I + a ZᵀZ) = det(I + a ZZᵀ), so the smaller matrix is used.
    """
    count, dim = tokens.shape[-2:]
    return _half_logdet(tokens, dim / (count * epsilon**2))


def codebook_rate(tokens: Tensor, codebook: Tensor, epsilon: float = EPSILON) -> Tensor:
    """R^c(Z | U_[K]) = ½ Σ_k logdet(I + p/(N ε²) (U_kᵀZ)ᵀ(U_kᵀZ))    (2)

    Rate of each set of tokens (…, T, D) against a codebook (K, P, D) of rows U_kᵀ, (…,).
    """
    return subspace_rates(project(tokens, codebook), epsilon).sum(-1)


def subspace_rates(coordinates: Tensor, epsilon: float = EPSILON) -> Tensor:
    """The K terms of (2), (…, K), from coordinates U_kᵀZ, (…, K, T, P)."""
    count, subspace_dim = coordinates.shape[-2:]
    return _half_logdet(coordinates, subspace_dim / (count * epsilon**2))


def sparse_rate_reduction(tokens: Tensor, codebook: Tensor, sparsity_lambda: float, epsilon: float = EPSILON) -> Tensor:
    """R(Z) − R^c(Z | U_[K]) − λ‖Z‖₀    (3)

    The objective that CRATE's layers increase step by step, of each set of tokens (…, T, D), (…,). ‖Z‖₀ is the number
    of non-zero entries. With λ = 0 this is the rate reduction ΔR.
    """
    reduction = coding_rate(tokens, epsilon) - codebook_rate(tokens, codebook, epsilon)
    return reduction - sparsity_lambda * tokens.count_nonzero(dim=(-2, -1))


def project(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Coordinates U_kᵀz of tokens (…, T, D) in the subspaces of a codebook (K, P, D), (…, K, T, P)."""
    return tokens.unsqueeze(-3) @ codebook.transpose(-1, -2)


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of x (…, T, P), (…,); from 1 to min(T, P).

    From Roy & Vetterli 2007. Singular values are the roots of the eigenvalues of the smaller Gram matrix. This is
    several times faster than a decomposition of x and exact to about 1e-8 of the largest singular value.
    """
    values = torch.linalg.eigvalsh(_gram(x.double())).clamp_min(0).sqrt()
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


def orthonormal_bases(codebook: Tensor) -> Tensor:
    """Orthonormal bases of a codebook's subspaces, as rows, (K, P, D) float64; P is at most D."""
    return torch.linalg.qr(codebook.double().transpose(-1, -2)).Q.transpose(-1, -2)


def coherence(codebook: Tensor) -> Tensor:
    """Largest cosine between directions of two subspaces of a codebook (K, P, D), (K, K).

    0: the subspaces are orthogonal; 1: they share a direction. The rows of the codebook need not be orthonormal, as
    each subspace is their span. The diagonal is 1.
    """
    basis_KDP = orthonormal_bases(codebook).transpose(-1, -2)
    cosines_KKPP = basis_KDP.unsqueeze(1).transpose(-1, -2) @ basis_KDP.unsqueeze(0)
    return torch.linalg.matrix_norm(cosines_KKPP, ord=2).clamp(max=1.0)


def _gram(x_TP: Tensor) -> Tensor:
    """XᵀX or XXᵀ, whichever is smaller; they have the same non-zero eigenvalues."""
    tall = x_TP.shape[-2] > x_TP.shape[-1]
    return x_TP.transpose(-1, -2) @ x_TP if tall else x_TP @ x_TP.transpose(-1, -2)


def _half_logdet(x_TP: Tensor, scale: float) -> Tensor:
    gram = _gram(x_TP.double())
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # By Cholesky: the matrix is symmetric, and its eigenvalues are at least 1.
    return torch.linalg.cholesky(identity + scale * gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)
