"""Training steps on the device: the CPU's numbers, and the host never waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crate_ray.config import CrateMAEConfig, ModelConfig, OptimConfig, ViTMAEConfig
from crate_ray.models import build_model
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.step import autocast_dtype, mask_noise, train_step
from tests.gpu_emulated.device import recorded, syncs

BATCH = 6
SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2}
CRATE = CrateMAEConfig(**SIZES, num_subspaces=4)
MODELS: dict[str, ModelConfig] = {
    "crate_mae": CRATE,
    "linear attention": CRATE.model_copy(update={"attention": "linear"}),
    "tied output map": CRATE.model_copy(update={"output_map": "tied"}),
    "tied decoder": CRATE.model_copy(update={"decoder_maps": "tied"}),
    "visible tokens": CRATE.model_copy(update={"encoder_tokens": "visible"}),
    "normalised targets": CRATE.model_copy(update={"norm_pix_loss": True}),
    "vit_mae": ViTMAEConfig(**SIZES, num_heads=4, decoder_dim=16, decoder_depth=1, decoder_num_heads=2),
}


def train(
    config: ModelConfig,
    device: str,
    precision: str = "fp32",
    micro_batch: int = BATCH,
    checkpointed: bool = False,
    bf16_tokens: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Three steps. Losses and gradient norms, weights, and where the host waited."""
    torch.manual_seed(0)
    model = build_model(config)
    images = torch.randn(BATCH, 3, 16, 16)
    noise = mask_noise(0, np.zeros(BATCH, np.int64), np.arange(BATCH), config.num_patches)
    model, images, noise = model.to(device), images.to(device), noise.to(device)
    model.checkpoint_layers, model.bf16_tokens = checkpointed, bf16_tokens
    optimizer = build_optimizer(model, OptimConfig(eps=1e-2))  # else it enlarges the rounding of tiny gradients
    measured: list[Tensor] = []
    with recorded() as events:
        for _ in range(3):
            measured += train_step(
                model,
                optimizer,
                images,
                noise,
                batch_size=BATCH,
                micro_steps=-(-BATCH // micro_batch),
                lr=1e-3,
                clip_norm=1.0,
                autocast=torch.bfloat16 if precision == "bf16" else None,
            )
    return measured, list(model.state_dict().values()), syncs(events)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("micro_batch", [BATCH, 4])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_steps_give_the_numbers_of_the_cpu_without_waiting(
    config: ModelConfig, micro_batch: int, checkpointed: bool
) -> None:
    expected, expected_weights, _ = train(config, "cpu", micro_batch=micro_batch)
    measured, weights, waits = train(config, "cuda", micro_batch=micro_batch, checkpointed=checkpointed)
    assert waits == []
    torch.testing.assert_close([value.cpu() for value in measured], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close([value.cpu() for value in weights], expected_weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bf16_tokens", [False, True], ids=["fp32 tokens", "bf16 tokens"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_steps_in_bf16_stay_near_those_in_fp32_without_waiting(config: ModelConfig, bf16_tokens: bool) -> None:
    assert autocast_dtype("auto", torch.device("cuda")) == torch.bfloat16
    expected, _, _ = train(config, "cpu")
    measured, weights, waits = train(config, "cuda", "bf16", bf16_tokens=bf16_tokens)
    assert waits == [] and all(weight.dtype == torch.float32 for weight in weights)
    torch.testing.assert_close([value.float().cpu() for value in measured], expected, rtol=6e-2, atol=3e-2)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_tokens_in_bf16_are_in_bf16_after_each_encoder_layer(config: ModelConfig) -> None:
    """CUDA's LayerNorm gives fp32 under autocast, the CPU's does not."""
    model = build_model(config).cuda()
    images, noise = torch.randn(BATCH, 3, 16, 16).cuda(), torch.rand(BATCH, config.num_patches).cuda()
    for bf16_tokens, expected in ((True, torch.bfloat16), (False, torch.float32)):
        model.bf16_tokens = bf16_tokens
        with torch.autocast("cuda", dtype=torch.bfloat16):
            layers = model(images, noise, return_layers=True).encoder_layers
        assert layers and {layer.dtype for layer in layers} == {expected}


def test_a_step_that_is_not_finite_is_skipped_without_waiting() -> None:
    model = build_model(CRATE).cuda()
    optimizer = build_optimizer(model, OptimConfig())
    images = torch.full((BATCH, 3, 16, 16), float("nan")).cuda()
    noise = torch.rand(BATCH, CRATE.num_patches).cuda()
    before = [weight.clone() for weight in model.parameters()]
    with recorded() as events:
        loss, norm = train_step(model, optimizer, images, noise, batch_size=BATCH, lr=1.0)
    assert syncs(events) == []
    assert not loss.isfinite() and not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_tensors_of_two_devices_are_not_mixed() -> None:
    """That the device raises where a GPU would: else the other tests prove nothing."""
    model = build_model(CRATE).cuda()
    with pytest.raises(RuntimeError, match="same device"):
        model(torch.randn(BATCH, 3, 16, 16).cuda(), torch.rand(BATCH, CRATE.num_patches))
    with recorded() as events:
        torch.rand(3, device="cuda").sum().item()
        torch.ones(3).to("cuda", non_blocking=True)
        torch.rand(3, device="cuda").nonzero()
    assert [event.detail.split(" ")[0] for event in syncs(events)] == ["value", "copy", "aten::nonzero"]
