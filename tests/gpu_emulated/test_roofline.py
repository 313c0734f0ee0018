"""The roofline's record and its forms, against counts by hand and against the model's own FLOPs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crate_ray.benchmarks.roofline import (
    FORMS,
    Device,
    Recorder,
    estimate,
    estimate_steps,
    record_step,
    scaled,
)
from crate_ray.config import CrateMAEConfig
from crate_ray.models.flops import training_flops

CONFIG = CrateMAEConfig(image_size=32, patch_size=4, dim=32, depth=3, decoder_depth=2, num_subspaces=4)
M, D = 48, 16


def test_bytes_and_flops_are_those_counted_by_hand() -> None:
    x = torch.zeros(M, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(D, D, device="cuda", dtype=torch.bfloat16)
    with Recorder() as recorder:
        product = F.linear(x, weight)
        shifted = (product + 1.0).relu()
        _ = F.linear(shifted.view(M, D), weight)
    tokens, weights = 2 * M * D, 2 * D * D
    eager, compiled, fused = (estimate(recorder.operations, form) for form in FORMS)
    assert eager.flops == compiled.flops == fused.flops == 2 * (2 * M * D * D)
    assert [kernel.bytes for kernel in eager.kernels] == [
        2 * tokens + weights,
        2 * tokens,
        2 * tokens,
        2 * tokens + weights,
    ]
    # One kernel reads the product and writes the result.
    assert [kernel.bytes for kernel in compiled.kernels] == [2 * tokens + weights, 2 * tokens, 2 * tokens + weights]
    # In the product's epilogue, only the result is written.
    assert [kernel.bytes for kernel in fused.kernels] == [2 * tokens + weights, 2 * tokens + weights]


def test_self_attention_loads_its_tensor_three_times_unless_it_is_fused() -> None:
    x = torch.zeros(2, 3, 8, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with Recorder() as recorder:
        F.scaled_dot_product_attention(x, x, x).backward(torch.zeros_like(x))
    attention = [operation for operation in recorder.operations if operation.is_attention]
    assert [operation.name for operation in attention] == [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    ]
    size = 2 * x.numel()
    for operation, loaded, saved in zip(attention, (3, 3), (2, 4), strict=True):
        eager, fused = (estimate([operation], form).bytes for form in ("eager", "fused"))
        assert eager >= loaded * size and eager - fused == saved * size


def test_a_record_has_the_models_flops_and_is_linear_in_the_images() -> None:
    records = {batch: record_step(CONFIG, batch) for batch in (2, 3, 6)}
    # The flash kernel computes the scores again in its backward pass.
    tokens, heads, dim = CONFIG.num_patches + 1, CONFIG.num_subspaces, CONFIG.dim // CONFIG.num_subspaces
    again = 2 * 6 * heads * tokens**2 * dim * (CONFIG.depth + 2)
    assert estimate(records[6], "eager").flops == training_flops(CONFIG, 6) + again
    for form in FORMS:
        few, more, many = (estimate(records[batch], form) for batch in (2, 3, 6))
        extrapolated = scaled(few, more, 2, 3, 6)
        assert extrapolated.flops == many.flops
        assert extrapolated.bytes == pytest.approx(many.bytes, rel=1e-3)


def test_layers_are_extrapolated_and_each_form_takes_less_time() -> None:
    device = Device(flops=1e12, bytes_per_second=1e10)
    steps = estimate_steps(CONFIG, 6, device)
    whole = {form: estimate(record_step(CONFIG, 6), form).seconds(device) for form in FORMS}
    optimizer = steps["eager"].parts["optimizer"]
    for form in FORMS:
        assert steps[form].seconds - optimizer == pytest.approx(whole[form], rel=0.02)
    assert steps["fused"].seconds < steps["compiled"].seconds < steps["eager"].seconds
