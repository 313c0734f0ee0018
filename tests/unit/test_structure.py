"""Coding rates and sparsity against closed forms, and the paper's link between the rate's gradient and denoising."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import CrateMAEConfig
from crate_ray.models import CrateMAE
from crate_ray.structure.coding_rate import (
    codebook_rates,
    coding_rate,
    coherence,
    effective_rank,
    project,
    rate_reduction,
)
from crate_ray.structure.layerwise import measure_layers
from crate_ray.structure.sparsity import gini, zero_share


def orthonormal(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(rows, dim) with orthonormal rows."""
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, rows, generator=random, dtype=torch.float64)).Q.T


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.1, 3), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_rate_is_the_definition_by_eigenvalues(tokens: int, dim: int, epsilon: float, seed: int) -> None:
    z = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = torch.linalg.svdvals(z) ** 2
    expected = 0.5 * torch.log1p(dim / (tokens * epsilon**2) * spectrum).sum(-1)
    assert torch.allclose(coding_rate(z, epsilon), expected, rtol=1e-10, atol=1e-10)


def test_rates_of_a_known_mixture_of_subspaces() -> None:
    # K orthogonal subspaces of dimension p, N / K tokens in each with covariance s² I there: every rate is closed.
    dim, count, p, per, s, epsilon = 24, 4, 3, 12, 1.7, 0.5
    basis = orthonormal(count * p, dim).reshape(count, p, dim)
    parts = [math.sqrt(per) * s * orthonormal(p, per, seed=k + 1).T @ basis[k] for k in range(count)]
    z = torch.cat(parts)
    tokens = count * per
    whole = 0.5 * count * p * math.log1p(dim * per * s**2 / (tokens * epsilon**2))
    against = count * 0.5 * p * math.log1p(p * per * s**2 / (tokens * epsilon**2))
    assert coding_rate(z).item() == pytest.approx(whole, rel=1e-12)
    assert codebook_rates(project(z, basis)).sum(-1).item() == pytest.approx(against, rel=1e-12)
    assert rate_reduction(z, basis).item() == pytest.approx(whole - against, rel=1e-12)
    # Any other codebook of the same size codes these tokens worse than their own subspaces, tokens of one at a time.
    own = codebook_rates(project(parts[0], basis))
    assert own[0] > 1 and own[1:].abs().max() < 1e-12
    assert coherence(basis).fill_diagonal_(0).max() < 1e-7
    tilted = basis.clone()
    tilted[1, 0] = math.cos(0.3) * basis[0, 0] + math.sin(0.3) * basis[1, 0]
    assert coherence(tilted)[0, 1].item() == pytest.approx(math.cos(0.3))
    assert effective_rank(project(z, basis)).tolist() == pytest.approx([p] * count)


def test_a_step_down_the_rate_denoises_tokens_of_a_known_mixture() -> None:
    # Tokens near one of K orthogonal subspaces, coded against the others: the rate counts what sticks out of the
    # token's own subspace, and its gradient points from the signal to the noise (arXiv 2311.13110, section 2.3).
    dim, count, p, tokens = 32, 4, 4, 256
    random = torch.Generator().manual_seed(3)
    basis = orthonormal(count * p, dim).reshape(count, p, dim)
    signal = torch.randn(tokens, p, generator=random, dtype=torch.float64) @ basis[0]
    noise = 0.1 * torch.randn(tokens, dim, generator=random, dtype=torch.float64)
    noise -= noise @ basis[0].T @ basis[0]
    z = (signal + noise).requires_grad_()
    codebook_rates(project(z, basis[1:])).sum().backward()
    assert z.grad is not None
    inside = noise @ basis[1:].reshape(-1, dim).T @ basis[1:].reshape(-1, dim)
    cosine = torch.nn.functional.cosine_similarity(z.grad.flatten(), inside.flatten(), dim=0)
    assert cosine > 0.99
    assert torch.nn.functional.cosine_similarity(z.grad.flatten(), signal.flatten(), dim=0).abs() < 0.01


def test_sparsity_of_known_codes() -> None:
    one_hot, even = torch.eye(8)[None], torch.full((1, 5, 8), -3.0)
    assert zero_share(one_hot).item() == 7 / 8 and zero_share(even).item() == 0
    assert zero_share(torch.tensor([[[0.1, -0.2, 0.3, 0.0]]]), 0.2).item() == 0.75
    assert gini(one_hot).item() == pytest.approx(7 / 8) and gini(even).item() == pytest.approx(0)
    assert gini(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).item() == pytest.approx(0.25)
    assert gini(torch.zeros(1, 2, 4)).item() == 0
    # Of |normal| numbers: 2 Φ-integral, √2 − 1.
    sample = torch.randn(1, 1, 200_000, generator=torch.Generator().manual_seed(0))
    assert gini(sample).item() == pytest.approx(math.sqrt(2) - 1, abs=2e-3)


def test_layers_are_measured_where_they_act() -> None:
    config = CrateMAEConfig(image_size=16, patch_size=4, dim=16, depth=3, num_subspaces=2, mask_ratio=0.5)
    torch.manual_seed(0)
    model = CrateMAE(config).double()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(5, 16, dtype=torch.float64)
    found = measure_layers(model, images, noise)
    layers = model.encode(images, noise, return_layers=True).layers
    assert layers is not None and found.rate_after.shape == (3, 5)
    assert torch.equal(found.zero_share[1], (layers[1] == 0).double().mean((1, 2)))
    last = model.encoder[2]
    tokens = last.mssa_norm(last.compress(layers[1]))  # type: ignore[operator, union-attr]
    codebook = last.mssa.subspaces.reshape(2, 8, 16)  # type: ignore[union-attr, operator]
    assert torch.allclose(found.rate_after[2], codebook_rates(project(tokens, codebook)).sum(-1))
    assert found.means()["gini"] == pytest.approx(found.gini.mean(1).tolist())
