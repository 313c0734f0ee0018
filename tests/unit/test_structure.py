"""Coding rates and sparsity against closed forms, and the paper's link between the rate's gradient and denoising."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.config import CrateMAEConfig, ViTMAEConfig
from crate_ray.models import CrateMAE, ViTMAE, build_model
from crate_ray.structure.coding_rate import (
    codebook_rate,
    coding_rate,
    coherence,
    effective_rank,
    orthonormal_bases,
    project,
    sparse_rate_reduction,
    subspace_rates,
)
from crate_ray.structure.layerwise import layer_operators, measure_codebooks, measure_inversion, measure_layers
from crate_ray.structure.sparsity import gini, zero_share


def orthonormal(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(rows, dim) with orthonormal rows."""
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, rows, generator=random, dtype=torch.float64)).Q.T


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.1, 3), st.integers(0, 100))
def test_rate_is_the_definition_by_eigenvalues(tokens: int, dim: int, epsilon: float, seed: int) -> None:
    z = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = torch.linalg.svdvals(z) ** 2
    expected = 0.5 * torch.log1p(dim / (tokens * epsilon**2) * spectrum).sum(-1)
    assert torch.allclose(coding_rate(z, epsilon), expected, rtol=1e-10, atol=1e-10)


def test_rates_of_a_known_mixture_of_subspaces() -> None:
    # K orthogonal subspaces of dimension p, with N / K tokens of covariance s² I in each: every rate has a closed form.
    dim, count, p, per, s, epsilon = 24, 4, 3, 12, 1.7, 0.5
    basis = orthonormal(count * p, dim).reshape(count, p, dim)
    parts = [math.sqrt(per) * s * orthonormal(p, per, seed=k + 1).T @ basis[k] for k in range(count)]
    z = torch.cat(parts)
    tokens = count * per
    whole = 0.5 * count * p * math.log1p(dim * per * s**2 / (tokens * epsilon**2))
    against = count * 0.5 * p * math.log1p(p * per * s**2 / (tokens * epsilon**2))
    assert coding_rate(z).item() == pytest.approx(whole, rel=1e-12)
    assert codebook_rate(z, basis).item() == pytest.approx(against, rel=1e-12)
    assert sparse_rate_reduction(z, basis, 0.0).item() == pytest.approx(whole - against, rel=1e-12)
    sparse = z.masked_fill(torch.arange(dim) == 5, 0)
    penalty = sparse_rate_reduction(sparse, basis, 0.0) - sparse_rate_reduction(sparse, basis, 0.25)
    assert penalty.item() == pytest.approx(0.25 * tokens * (dim - 1))
    # The tokens of one subspace have a rate against that subspace only.
    own = subspace_rates(project(parts[0], basis))
    assert own[0] > 1 and own[1:].abs().max() < 1e-12
    assert coherence(basis).fill_diagonal_(0).max() < 1e-7
    tilted = basis.clone()
    tilted[1, 0] = math.cos(0.3) * basis[0, 0] + math.sin(0.3) * basis[1, 0]
    assert coherence(tilted)[0, 1].item() == pytest.approx(math.cos(0.3))
    assert effective_rank(project(z, basis)).tolist() == pytest.approx([p] * count)


def test_a_step_down_the_rate_denoises_tokens_of_a_known_mixture() -> None:
    # Tokens near one of K orthogonal subspaces, coded against the others. Only the noise outside the tokens' own
    # subspace has a rate, so the gradient points along the noise (arXiv 2311.13110, section 2.3).
    dim, count, p, tokens = 32, 4, 4, 256
    random = torch.Generator().manual_seed(3)
    basis = orthonormal(count * p, dim).reshape(count, p, dim)
    signal = torch.randn(tokens, p, generator=random, dtype=torch.float64) @ basis[0]
    noise = 0.1 * torch.randn(tokens, dim, generator=random, dtype=torch.float64)
    noise -= noise @ basis[0].T @ basis[0]
    z = (signal + noise).requires_grad_()
    codebook_rate(z, basis[1:]).backward()
    assert z.grad is not None
    inside = noise @ basis[1:].reshape(-1, dim).T @ basis[1:].reshape(-1, dim)
    cosine = torch.nn.functional.cosine_similarity(z.grad.flatten(), inside.flatten(), dim=0)
    assert cosine > 0.99
    assert torch.nn.functional.cosine_similarity(z.grad.flatten(), signal.flatten(), dim=0).abs() < 0.01


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_a_step_down_the_rate_of_a_whole_mixture_removes_noise_outside_each_tokens_subspace(epsilon: float) -> None:
    # Tokens in all of K orthogonal subspaces that span the space, plus noise, against the full codebook. The gradient
    # is mostly along the signal, which a step down the rate shrinks. Its part outside a token's own subspace is along
    # the noise, which the step removes.
    count, p, per = 4, 4, 256
    random = torch.Generator().manual_seed(3)
    basis = orthonormal(count * p, count * p).reshape(count, p, -1)
    own = basis[torch.arange(count).repeat_interleave(per)]

    def outside(x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD - torch.einsum("tp,tpd->td", torch.einsum("td,tpd->tp", x_TD, own), own)

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()

    coordinates = torch.randn(count * per, p, generator=random, dtype=torch.float64)
    signal = torch.einsum("tp,tpd->td", coordinates, own)
    noise = 0.1 * torch.randn(count * per, count * p, generator=random, dtype=torch.float64)
    z = (signal + noise).requires_grad_()
    codebook_rate(z, basis, epsilon).backward()
    assert z.grad is not None
    assert cosine(outside(z.grad), outside(noise)) > 0.98
    assert cosine(z.grad, signal) > 0.95 and cosine(z.grad, outside(noise)) < 0.2


def test_sparsity_of_known_codes() -> None:
    one_hot, even = torch.eye(8)[None], torch.full((1, 5, 8), -3.0)
    assert zero_share(one_hot).item() == 7 / 8 and zero_share(even).item() == 0
    assert zero_share(torch.tensor([[[0.1, -0.2, 0.3, 0.0]]]), 0.2).item() == 0.75
    assert gini(one_hot).item() == pytest.approx(7 / 8) and gini(even).item() == pytest.approx(0)
    assert gini(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).item() == pytest.approx(0.25)
    assert gini(torch.zeros(1, 2, 4)).item() == 0
    # The Gini index of |normal| numbers is √2 − 1.
    sample = torch.randn(1, 1, 200_000, generator=torch.Generator().manual_seed(0))
    assert gini(sample).item() == pytest.approx(math.sqrt(2) - 1, abs=2e-3)


def test_layers_are_measured_on_the_tokens_that_they_get() -> None:
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
    assert torch.allclose(found.rate_after[2], codebook_rate(tokens, codebook))
    assert found.means()["gini"] == pytest.approx(found.gini.mean(1).tolist())
    ranks = effective_rank(project(tokens, codebook))
    assert ranks.shape == (5, 2) and torch.allclose(found.effective_rank[2], ranks)
    assert found.means()["effective_rank"][2] == pytest.approx(ranks.mean().item())


def test_effective_rank_is_the_entropy_of_singular_values() -> None:
    x = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(x)
    share = values / values.sum(-1, keepdim=True)
    expected = torch.exp(-(share * share.log()).sum(-1))
    assert torch.allclose(effective_rank(x), expected)
    assert torch.allclose(effective_rank(x.mT), expected)


def test_forms_of_the_rate_agree_where_scales_are_one() -> None:
    config = CrateMAEConfig(image_size=16, patch_size=4, dim=16, depth=2, num_subspaces=2)
    torch.manual_seed(0)
    model = CrateMAE(config).double().eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.encoder:
            subspaces = layer.mssa.subspaces  # type: ignore[union-attr]
            bases = orthonormal_bases(subspaces.unflatten(0, (2, 8)))  # type: ignore[operator]
            subspaces.copy_(bases.flatten(0, 1))  # type: ignore[operator]
    plain = measure_layers(model, images)
    assert torch.allclose(plain.rate_after, plain.rate_after_span)
    assert torch.allclose(plain.rate_reduction, plain.rate - plain.rate_after)
    with torch.no_grad():
        for layer in model.encoder:
            layer.mssa.subspaces.mul_(1.7)  # type: ignore[union-attr, operator]
    seen = measure_layers(model, images)
    assert (seen.rate_before[0] > plain.rate_before[0]).all()
    assert torch.allclose(seen.rate_before_span[0], plain.rate_before_span[0])  # the first layer's input is the same
    largest, means = measure_codebooks(model)
    assert largest == pytest.approx([coherence(layer_operators(x).codebook)[0, 1].item() for x in model.encoder])
    assert means == pytest.approx(largest)  # there is one pair
    assert (seen.below_01 >= seen.zero_share).all() and (seen.below_1 >= seen.below_01).all()


def test_a_transformer_is_measured_by_its_keys() -> None:
    torch.manual_seed(0)
    model = ViTMAE(ViTMAEConfig(image_size=16, patch_size=4, dim=16, depth=2, num_heads=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.normal_()
    images = torch.randn(3, 3, 16, 16)
    found = measure_layers(model, images)
    encoded = model.encode(images, return_layers=True, return_keys=True)
    assert encoded.keys is not None and encoded.layers is not None
    layer = model.encoder[1]
    bias = layer.qkv.bias.chunk(3)[1]  # type: ignore[union-attr, operator]
    keys = (encoded.keys[1] - bias).unflatten(-1, (4, 4)).transpose(1, 2)
    assert torch.allclose(found.rate_before[1], subspace_rates(keys).sum(-1), rtol=1e-4)
    half = layer_operators(layer).attention_step(encoded.layers[0])
    out = layer_operators(layer).second_step(half)
    assert torch.equal(out, encoded.layers[1])
    mlp = layer.mlp_output(torch.nn.functional.gelu(layer.mlp_input(layer.mlp_norm(half))))  # type: ignore[union-attr, operator]
    assert torch.allclose(half + mlp, out, atol=1e-6)


class Replay(torch.nn.Module):
    """A decoder layer that returns fixed tokens."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.tokens


def test_a_decoder_that_inverts_the_encoder_has_no_error() -> None:
    torch.manual_seed(0)
    model = build_model(CrateMAEConfig(image_size=16, patch_size=4, dim=16, depth=3, num_subspaces=2)).eval()
    images = torch.randn(4, 3, 16, 16)
    layers = model.encode(images, return_layers=True).layers
    assert layers is not None
    before = [model.embed(images)[0], *layers[:-1]]
    random = torch.randn_like(before[0])
    model.decoder = torch.nn.ModuleList([Replay(before[2]), Replay(-3 * before[1]), Replay(random)])
    found = measure_inversion(model, images)
    assert found is not None
    assert found.relative[0].max() < 1e-6 and found.scaled[:2].max() < 1e-3  # a square root of rounding errors
    assert torch.allclose(found.relative[1], torch.full((4,), 4.0, dtype=torch.float64))
    assert found.scaled[2].min() > 0.9
    assert torch.allclose(
        found.relative[2],
        (random - before[0]).flatten(1).norm(dim=1).double() / before[0].flatten(1).norm(dim=1),
        rtol=1e-5,
    )
    assert (found.other_image[:2] > 0.01).all()
    vit = ViTMAEConfig(image_size=16, patch_size=4, dim=16, depth=2, num_heads=2, decoder_depth=1)
    assert measure_inversion(build_model(vit).eval(), images) is None
