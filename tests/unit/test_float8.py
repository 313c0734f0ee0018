"""Layers in float8, emulated: what torchao rounds, and what stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crate_ray.config import CrateMAEConfig, ModelConfig, ViTMAEConfig
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.crate import MSSA
from crate_ray.models.kernels.float8 import supports_float8, use_float8

SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2}
MODELS: list[Any] = [
    pytest.param(CrateMAEConfig(**SIZES, num_subspaces=4), id="crate_mae"),
    pytest.param(CrateMAEConfig(**SIZES, num_subspaces=4, output_map="tied", decoder_maps="tied"), id="tied"),
    pytest.param(
        ViTMAEConfig(**SIZES, num_heads=4, decoder_dim=32, decoder_depth=1, decoder_num_heads=4), id="vit_mae"
    ),
]


def in_float8(rows: Tensor) -> Tensor:
    """Rows rounded to float8, each with a scale that is a power of two and uses the range."""
    scale = torch.exp2(torch.floor(torch.log2(448 / rows.abs().amax(-1, keepdim=True))))
    return (rows * scale).to(torch.float8_e4m3fn).float() / scale


def test_products_round_both_factors_by_row_and_the_weights_gradient_does_not() -> None:
    torch.manual_seed(0)
    layer = MSSA(32, 2, 16)
    use_float8([layer], emulate=True)
    x = torch.randn(3, 5, 32, requires_grad=True)
    weight = torch.randn(48, 32, requires_grad=True)
    bias = torch.randn(48)
    y = layer.product(x, weight, bias)
    torch.testing.assert_close(y, in_float8(x) @ in_float8(weight).t() + bias, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    torch.testing.assert_close(weight.grad, gradient.flatten(0, 1).t() @ x.detach().flatten(0, 1))
    assert not torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("config", MODELS)
def test_losses_and_gradients_stay_near_and_names_stay_the_same(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = build_model(config)
    names = list(model.state_dict())
    images, noise = torch.randn(8, 3, 16, 16), torch.rand(8, 16)
    results = []
    for float8 in (False, True):
        if float8:
            use_float8([*model.encoder, *model.decoder], emulate=True)
        model.zero_grad()
        # torchao's own layers take part in CUDA's autocast only.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=isinstance(config, CrateMAEConfig)):
            loss = model(images, noise).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    assert list(model.state_dict()) == names
    (loss, gradient), (their_loss, their_gradient) = results
    assert loss != their_loss
    torch.testing.assert_close(their_loss, loss, rtol=0.05, atol=0)
    assert torch.cosine_similarity(gradient, their_gradient, dim=0) > 0.98


def test_what_does_not_fit_is_refused() -> None:
    model = build_model(CrateMAEConfig(image_size=16, patch_size=4, dim=24, depth=1, num_subspaces=4))
    with pytest.raises(UserError, match=r"multiples of 16, and mssa.subspaces is \(24, 24\)"):
        use_float8(model.encoder)
    assert not supports_float8(torch.device("cpu"))
