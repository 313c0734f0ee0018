"""FLOPs of a training step: against hand counts, against a count of whole models, and against earlier figures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crate_ray.config import CrateMAEConfig, ModelConfig, ViTMAEConfig
from crate_ray.models import build_model
from crate_ray.models.flops import count_step, gpu_peak_flops, reference_training_flops, training_flops
from crate_ray.models.kernels.attention import attention, self_attention
from crate_ray.models.kernels.linear import gram, linear
from crate_ray.models.reference import ReferenceCrateMAE

SIZES: dict[str, Any] = {"image_size": (12, 16), "patch_size": 4, "channels": 2, "dim": 16, "depth": 3}
CRATE = CrateMAEConfig(**SIZES, decoder_depth=2, num_subspaces=4, subspace_dim=3)
CONFIGS: list[ModelConfig] = [
    CRATE,
    CRATE.model_copy(update={"attention": "linear"}),
    CRATE.model_copy(update={"output_map": "tied"}),
    CRATE.model_copy(update={"decoder_maps": "tied", "decoder_depth": 3}),
    CRATE.model_copy(update={"encoder_tokens": "visible"}),
    ViTMAEConfig(**SIZES, num_heads=4, decoder_dim=8, decoder_depth=2, decoder_num_heads=2, mlp_ratio=2.5),
]


class OneOperation(nn.Module):
    """A model of one operation on a parameter, to count alone."""

    def __init__(self, shape: tuple[int, ...], operation: Any) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.empty(shape, device="meta"))
        self.weight = nn.Parameter(torch.empty(7, shape[-1], device="meta"))
        self.operation = operation

    def forward(self, images: Tensor, noise: Tensor) -> Any:
        return SimpleNamespace(sample_loss=self.operation(self.x, self.weight))


B, K, T, P = 2, 3, 5, 4


@pytest.mark.parametrize(
    ("shape", "operation", "products"),
    [
        # One product of B·T tokens in the forward pass; gradients of input and weight in the backward pass.
        ((B, T, P), lambda x, w: linear(x, w), 3 * (B * T * 7 * P)),
        # One product in each pass.
        ((B, T, P), lambda x, w: gram(w), 2 * (P * P * 7)),
        # q kᵀ and its product with v, and for each of these two products the gradients of both its factors.
        ((B, K, T, P), lambda x, w: attention(x, x, x), 6 * (B * K * T * T * P)),
        ((B, K, T, P), lambda x, w: self_attention(x), 6 * (B * K * T * T * P)),
    ],
    ids=["linear", "gram", "attention", "self-attention"],
)
def test_hand_counts(shape: tuple[int, ...], operation: Any, products: int) -> None:
    assert count_step(OneOperation(shape, operation), CRATE, 1) == 2 * products  # a multiplication and an addition


@pytest.mark.parametrize("batch", [1, 3])  # fewer tokens than dimensions, and more: two forms of ISTA
def test_extrapolated_depths_equal_a_count_of_the_whole_model(batch: int) -> None:
    generator = torch.get_rng_state()
    for config in CONFIGS:
        with torch.device("meta"):
            model = build_model(config)
        assert training_flops(config, batch) == count_step(model.to("meta"), config, batch), config
    with torch.device("meta"):
        reference = ReferenceCrateMAE(CRATE)
    assert reference_training_flops(CRATE, batch) == count_step(reference.to("meta"), CRATE, batch)
    assert torch.equal(torch.get_rng_state(), generator)  # training counts between seeding and its first step


# Of one step of 256 images by the formulas that the counter replaced; MFUs were reported by them.
EARLIER = {"tiny": 4462004404224, "small": 9107529007104, "base": 15365453119488, "large": 52047504211968}


@pytest.mark.parametrize("preset", EARLIER)
def test_presets_have_their_earlier_figures(preset: Any) -> None:
    assert training_flops(CrateMAEConfig(preset=preset), 256) == pytest.approx(EARLIER[preset], rel=0.02)


def test_other_models_have_their_earlier_figures() -> None:
    base = CrateMAEConfig(preset="base")
    figures = {
        training_flops(base, 1): 68302430208,
        reference_training_flops(base, 256): 19627134418944,
        training_flops(CrateMAEConfig(preset="base", encoder_tokens="visible"), 256): 9543097516032,
        training_flops(CrateMAEConfig(preset="base", attention="linear"), 256): 13881871171584,
        training_flops(ViTMAEConfig(preset="base"), 256): 24801202667520,
    }
    assert all(math.isclose(found, earlier, rel_tol=0.02) for found, earlier in figures.items()), figures


def test_peaks_of_gpus() -> None:
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3") == gpu_peak_flops("NVIDIA H200") == 989e12
    assert gpu_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert gpu_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_peak_flops("Tesla T4") == 65e12
    assert gpu_peak_flops("NVIDIA L40S") == 362e12
    assert gpu_peak_flops("NVIDIA H200 NVL") == 835e12 and gpu_peak_flops("AMD Instinct MI300X") == 1307e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a part of one
    assert gpu_peak_flops("Some other card") is None
