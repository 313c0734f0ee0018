"""The models against the published numbers, the reference, and the equations in NumPy; and their behaviour."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crate_ray.config import CRATE_PRESETS, VIT_PRESETS, ClassifierConfig, ImageModelConfig
from crate_ray.errors import UserError
from crate_ray.models import (
    CrateMAE,
    CrateMAEConfig,
    MaskedOutput,
    ViTMAE,
    ViTMAEConfig,
    build_model,
    export_published,
    load_published,
    reference,
)
from crate_ray.models.classifier import Classifier, Targets
from crate_ray.models.kernels import cpu_attention
from crate_ray.models.kernels.attention import attention, attention_maps, self_attention
from crate_ray.models.kernels.ista import gradient_step, relu
from crate_ray.models.kernels.linear import gram, linear
from crate_ray.models.patches import patchify, random_masking, sample_losses, sincos_positions, unpatchify
from crate_ray.models.reference import ReferenceCrateMAE
from tests.unit import numpy_crate

REFERENCE = Path(__file__).parents[3] / "shared" / "parity" / "crate_mae_reference.npz"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=f"published numbers not found at {REFERENCE}")

SMALL: dict[str, Any] = {"image_size": 12, "patch_size": 4, "dim": 16, "depth": 2, "num_subspaces": 4}
VIT: dict[str, Any] = {"image_size": 12, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 4, "decoder_dim": 8}
SWITCHES: dict[str, dict[str, Any]] = {
    "published": {},
    "tied output": {"output_map": "tied", "subspace_dim": 3},
    "linear attention": {"attention": "linear"},
    "tied decoder": {"decoder_maps": "tied"},
    "visible encoder": {"encoder_tokens": "visible"},
    "all switches": {
        "output_map": "tied", "attention": "linear", "decoder_maps": "tied", "encoder_tokens": "visible",
    },
    "nothing masked": {"mask_ratio": 0.0},
    "visible keys": {"attend_to": "visible", "threshold": "learned", "initialization": "small"},
    "visible keys of the decoder": {"encoder_tokens": "visible", "decoder_attend_to": "visible", "residual": "all"},
    "all residuals": {"residual": "all", "layer_scale": 0.1, "decoder_activation": "relu"},
    "overcomplete": {"residual": "all", "dictionary": "overcomplete", "dictionary_expansion": 2},
    "tokens of CRATE": {
        "positions": "learned", "patch_norm": True, "output_bias": False, "norm_eps": 0.1, "last_norm_eps": 0.2,
    },
}  # fmt: skip
MODELS: list[Any] = [pytest.param(CrateMAEConfig(**SMALL, **switch), id=name) for name, switch in SWITCHES.items()]
MODELS.append(pytest.param(ViTMAEConfig(**VIT), id="vit"))


def images_for(config: ImageModelConfig, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.channels, *config.image_hw, generator=generator, dtype=dtype)


def noise_for(config: ImageModelConfig, batch: int = 2) -> Tensor:
    return torch.rand(batch, config.num_patches, generator=torch.Generator().manual_seed(2))


# --- The published numbers ------------------------------------------------------------------------------------------


@needs_reference
@pytest.mark.parametrize("model_class", [CrateMAE, ReferenceCrateMAE])
def test_parity_with_published(model_class: type[CrateMAE] | type[ReferenceCrateMAE]) -> None:
    with np.load(REFERENCE) as file:
        published = {name: file[name] for name in file.files}
    meta = ast.literal_eval(str(published["meta"]))
    state = {name.removeprefix("state."): value for name, value in published.items() if name.startswith("state.")}
    config = CrateMAEConfig(
        num_subspaces=meta["heads"],
        **{name: value for name, value in meta.items() if name not in ("heads", "loss")},
    )
    imported = load_published(state, config)
    model = model_class(config).double()
    model.load_state_dict(imported.state_dict())
    # The last bits of the float32 table depend on NumPy's code for the processor, so take the published table.
    torch.testing.assert_close(model.positions, torch.from_numpy(state["pos_embed"][:, 1:]), rtol=0, atol=1e-6)
    model.positions.copy_(torch.from_numpy(state["pos_embed"][:, 1:]))

    images = torch.from_numpy(published["images"])
    out = model(images, torch.from_numpy(published["noise"]), return_layers=True)
    out.loss.backward()
    assert out.encoder_layers is not None
    assert out.decoder_layers is not None
    computed = {
        "loss": out.loss,
        "pred": out.prediction,
        "mask": out.mask,
        **{f"encoder_layer_{i}": z for i, z in enumerate(out.encoder_layers)},
        **{f"decoder_layer_{i}": y for i, y in enumerate(out.decoder_layers)},
    }
    if isinstance(model, CrateMAE):
        unmasked = model.encode(images, return_attention=True, return_keys=True)
        assert unmasked.attention is not None
        assert unmasked.keys is not None
        computed["attention_unmasked_last"] = unmasked.attention[-1]
        computed["key_unmasked_last"] = unmasked.keys[-1]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert None not in gradients.values()
    imported.load_state_dict(gradients)  # the export's names then hold the gradients
    computed |= {f"grad.{name}": gradient for name, gradient in export_published(imported).items()}

    compared = [name for name in published if not name.startswith("state.") and name not in ("meta", "images", "noise")]
    assert sum(name.startswith("grad.") for name in compared) == len(gradients)
    if model_class is ReferenceCrateMAE:  # it has no pass over whole images
        compared = [name for name in compared if "unmasked" not in name]
    for name in compared:
        error = np.abs(computed[name].detach().numpy() - published[name]).max()
        assert error < 1e-10, f"{name}: {error}"


# --- The reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])  # fewer tokens than dimensions, and more: two forms of ISTA
@pytest.mark.parametrize("change", [{}, {"norm_pix_loss": True}, {"mask_ratio": 0.0}])
def test_model_equals_reference(batch: int, change: dict[str, Any]) -> None:
    config = CrateMAEConfig(
        image_size=(12, 16), patch_size=4, channels=2, dim=16, depth=3, decoder_depth=2, num_subspaces=4,
        subspace_dim=3, **change,
    )  # fmt: skip
    models = []
    for model_class in (CrateMAE, ReferenceCrateMAE):
        torch.manual_seed(0)
        models.append(model_class(config).double())
    ours, plain = models
    assert isinstance(ours, CrateMAE)
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms away from 0 and 1
            parameter += 0.2 * torch.randn_like(parameter)
    plain.load_state_dict(ours.state_dict())  # strict: the names are the same
    ours.load_state_dict(plain.state_dict())
    images, noise = images_for(config, batch, torch.float64), noise_for(config, batch)
    expected, found = plain(images, noise, return_layers=True), ours(images, noise, return_layers=True)
    for name in MaskedOutput._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-10)
    expected.loss.backward()
    found.loss.backward()
    for (name, left), right in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-10, msg=name)


def test_reference_has_the_published_form_only() -> None:
    for name, switch in SWITCHES.items():
        config = CrateMAEConfig(**SMALL, **switch)
        changed = {key for key in switch if key in CrateMAEConfig.form}
        assert set(config.unpublished) == changed, name
        if changed:
            with pytest.raises(UserError, match="published form only"):
                ReferenceCrateMAE(config)


# --- The equations --------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> CrateMAEConfig | ViTMAEConfig:
    patch = draw(st.tuples(st.integers(1, 3), st.integers(2, 3)))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(2, 4)))
    shared: dict[str, Any] = {
        "patch_size": patch,
        "image_size": (patch[0] * grid[0], patch[1] * grid[1]),
        "channels": draw(st.integers(1, 3)),
        "mask_ratio": draw(st.sampled_from([0.0, 0.3, 0.5])),
        "norm_pix_loss": draw(st.booleans()),
        "depth": draw(st.integers(1, 3)),
        "dim": draw(st.sampled_from([8, 12])),
    }
    if draw(st.integers(0, 4)) == 0:
        return ViTMAEConfig(
            **shared, num_heads=4, decoder_dim=8, decoder_depth=1, decoder_num_heads=2, mlp_ratio=1.5,
            qkv_bias=draw(st.booleans()),
        )  # fmt: skip
    decoder_maps = draw(st.sampled_from(["free", "tied"]))
    attention, encoder_tokens = draw(st.sampled_from(["softmax", "linear"])), draw(st.sampled_from(["all", "visible"]))
    sparsity_lambda, residual = draw(st.sampled_from([0.0, 0.5])), draw(st.sampled_from(["attention", "all"]))
    overcomplete = residual == "all" and decoder_maps == "free" and draw(st.booleans())
    return CrateMAEConfig(
        **shared,
        attend_to=draw(st.sampled_from(["all", "visible"]))
        if (attention, encoder_tokens) == ("softmax", "all")
        else "all",
        decoder_attend_to=draw(st.sampled_from(["all", "visible"])) if attention == "softmax" else "all",
        initialization=draw(st.sampled_from(["published", "small"])),
        residual=residual,
        layer_scale=draw(st.sampled_from([None, 0.3])),
        dictionary="overcomplete" if overcomplete else "square",
        dictionary_expansion=draw(st.integers(1, 3)),
        threshold=draw(st.sampled_from(["fixed", "learned"])) if sparsity_lambda else "fixed",
        decoder_activation="none" if overcomplete else draw(st.sampled_from(["none", "relu"])),
        num_subspaces=draw(st.integers(1, 3)),
        subspace_dim=draw(st.integers(1, 5)),
        decoder_maps=decoder_maps,
        decoder_depth=shared["depth"] if decoder_maps == "tied" else draw(st.integers(1, 2)),
        output_map=draw(st.sampled_from(["learned", "tied"])),
        output_bias=draw(st.booleans()),
        positions=draw(st.sampled_from(["sincos", "learned"])),
        patch_norm=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 0.1])),
        last_norm_eps=draw(st.sampled_from([1e-6, 0.2])),
        attention=attention,
        encoder_tokens=encoder_tokens,
        sparsity_lambda=sparsity_lambda,
        step_size=draw(st.sampled_from([0.1, 0.7])),
    )


@pytest.mark.parametrize("share", [0.01, 0.34, 0.5, 1.0])
@pytest.mark.parametrize("decoder_maps", ["free", "tied"])
def test_a_part_of_the_removed_patches_is_predicted_as_if_all_were(share: float, decoder_maps: str) -> None:
    """Predictions do not depend on other removed patches, so the loss is the mean over those that are decoded."""
    switch = {**SWITCHES["visible keys of the decoder"], "decoder_maps": decoder_maps}
    whole = CrateMAE(CrateMAEConfig(**SMALL, **switch)).double()
    part = CrateMAE(CrateMAEConfig(**SMALL, **switch, predicted_share=share)).double()
    part.load_state_dict(whole.state_dict())
    config = part.config
    images, noise = images_for(config, 5, torch.float64), noise_for(config, 5)
    expected, out = whole(images, noise), part(images, noise)
    predicted = min(
        config.num_patches - config.num_visible, max(1, round(share * (config.num_patches - config.num_visible)))
    )
    assert part.num_predicted == predicted
    errors = (expected.prediction - whole.target(images)).square().mean(-1)
    for sample in range(5):
        order = noise[sample].argsort()
        decoded, dropped = order[: config.num_visible + predicted], order[config.num_visible + predicted :]
        torch.testing.assert_close(out.prediction[sample, decoded], expected.prediction[sample, decoded])
        torch.testing.assert_close(out.sample_loss[sample], errors[sample, decoded[config.num_visible :]].mean())
        assert not out.prediction[sample, dropped].any()
    torch.testing.assert_close(out.mask, expected.mask)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in part.parameters())
    part.eval()
    torch.testing.assert_close(part(images, noise).loss, expected.loss)


def test_a_part_of_the_prediction_needs_a_decoder_without_keys_of_mask_tokens() -> None:
    for switch in ({}, {"encoder_tokens": "visible"}, {"decoder_attend_to": "visible"}):
        with pytest.raises(ValueError, match="predicted_share below 1 needs decoder_attend_to 'visible'"):
            CrateMAEConfig(**SMALL, **switch, predicted_share=0.5)


def as_numpy(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(config=configs(), seed=st.integers(0, 2**16))
@example(config=CrateMAEConfig(**SMALL, **SWITCHES["visible keys"]), seed=1)
@example(config=CrateMAEConfig(**SMALL, **SWITCHES["visible keys of the decoder"]), seed=5)
@example(config=CrateMAEConfig(**SMALL, **SWITCHES["all residuals"]), seed=2)
@example(config=CrateMAEConfig(**SMALL, **SWITCHES["overcomplete"]), seed=3)
@example(config=CrateMAEConfig(**SMALL, **SWITCHES["tokens of CRATE"]), seed=4)
def test_equals_equations(config: CrateMAEConfig | ViTMAEConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = build_model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(2, config.channels, *config.image_hw, generator=generator, dtype=torch.float64)
    noise = torch.rand(2, config.num_patches, generator=generator)
    state = {name: as_numpy(parameter) for name, parameter in model.named_parameters()}
    tables = [as_numpy(model.positions[0]), None]
    if model.decoder_positions is not None:
        tables[1] = as_numpy(model.decoder_positions[0])

    def equations(values: dict[str, Any], sample: int, masked: bool = True) -> numpy_crate.Result:
        chosen = noise[sample].numpy() if masked else None
        return numpy_crate.forward(values, config, as_numpy(images[sample]), chosen, tables[0], tables[1])

    out = model(images, noise, return_layers=True)
    unmasked = model.encode(images, return_layers=True, return_attention=True, return_keys=True)
    place = noise.argsort(dim=1, stable=True)[:, : config.num_visible]
    for b in range(2):
        expected = equations(state, b)

        def close(ours: Tensor, theirs: Any, sample: int = b) -> None:
            np.testing.assert_allclose(as_numpy(ours[sample]), theirs, rtol=1e-10, atol=1e-10)

        close(out.sample_loss, expected.loss)
        close(out.mask, expected.mask)
        close(out.prediction, expected.prediction)
        visible_only = model.visible_only
        # Visible tokens are in the order of their noise here, and in the order of the grid in the equations.
        order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + place[b].argsort()]) if visible_only else slice(None)
        for ours, theirs in zip(out.encoder_layers, expected.encoder_layers, strict=True):
            close(ours[:, order], theirs)
        for ours, theirs in zip(out.decoder_layers, expected.decoder_layers, strict=True):
            close(ours, theirs)
        whole = equations(state, b, masked=False)
        close(unmasked.tokens, whole.tokens)
        for name in ("attention", "keys"):
            for ours, theirs in zip(getattr(unmasked, name), getattr(whole, name), strict=True):
                close(ours, theirs)
        for ours, theirs in zip(unmasked.layers, whole.encoder_layers, strict=True):
            close(ours, theirs)
    torch.testing.assert_close(out.loss, out.sample_loss.mean())

    # The gradient along a random direction, against central differences of the equations.
    out.loss.backward()
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).numpy()
        for name, value in state.items()
    }
    slope = sum(
        float((as_numpy(parameter.grad) * direction[name]).sum()) for name, parameter in model.named_parameters()
    )
    h = 1e-6
    ends = []
    for sign in (1, -1):
        moved = {name: value + sign * h * direction[name] for name, value in state.items()}
        ends.append(np.mean([equations(moved, b).loss for b in range(2)]))
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_positions() -> None:
    rows, columns, dim = 2, 3, 8
    expected = np.zeros((rows * columns, dim))
    for row in range(rows):
        for column in range(columns):
            for i in range(dim // 4):
                omega = 10000 ** (-i / (dim // 4))
                waves = np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)
                expected[row * columns + column, i :: dim // 4] = waves
    table = sincos_positions(dim, (rows, columns))
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table[0].numpy(), expected, atol=1e-6)


# --- Parameter counts -----------------------------------------------------------------------------------------------


def count(config: CrateMAEConfig | ViTMAEConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


MILLIONS = {"tiny": 11.56, "small": 25.41, "base": 44.64, "large": 154.27}


@pytest.mark.parametrize("preset", CRATE_PRESETS)
def test_parameter_counts(preset: Any) -> None:
    config = CrateMAEConfig(preset=preset)
    d = config.dim
    ours = count(config)
    published = ours + 2 * (config.num_patches + 1) * d + d * d + d  # two frozen tables and the unused decoder_embed
    assert round(published / 1e6, 2) == MILLIONS[preset]
    if preset == "base":
        vit = ViTMAEConfig(preset="base")
        vit_published = count(vit) + 2 * (vit.num_patches + 1) * vit.dim
        assert round(vit_published / 1e6, 2) == 143.79
        assert round(100 * published / vit_published, 1) == 31.0
    assert count(ViTMAEConfig.model_validate({"preset": f"{preset}-matched"})) == pytest.approx(ours, rel=0.02)


def test_presets_and_overrides() -> None:
    assert set(VIT_PRESETS) == {*CRATE_PRESETS, *(f"{name}-matched" for name in CRATE_PRESETS)}
    model = CrateMAE.from_preset("tiny", depth=1, num_subspaces=12, image_size=32)
    assert (model.config.decoder_depth, model.config.subspace_dim, len(model.decoder)) == (1, 32, 1)
    assert ViTMAE.from_preset("tiny-matched", depth=1, decoder_depth=2, image_size=32).config.decoder_num_heads == 3
    for wrong in ({"num_heads": 5}, {"decoder_dim": 18}, {"decoder_num_heads": 5}):
        with pytest.raises(ValueError, match="divisible"):
            ViTMAEConfig(**wrong)


def test_initialization() -> None:
    torch.manual_seed(0)
    model = CrateMAE.from_preset("tiny", depth=1, image_size=64, subspace_dim=32)
    layer = model.encoder[0]

    def spread(tensor: Tensor, bound: float) -> None:
        assert bound * 0.98 < tensor.abs().max() <= bound
        assert abs(tensor.mean()) < bound / 50

    d, rows, patch = 384, 192, 768
    spread(layer.mssa.subspaces, (6 / (d + rows)) ** 0.5)
    spread(layer.mssa.output.weight, (6 / (d + rows)) ** 0.5)
    spread(model.patch_embed.weight, (6 / (d + patch)) ** 0.5)
    spread(layer.ista.dictionary, (6 / d) ** 0.5)
    spread(model.decoder[0].expansion, (6 / d) ** 0.5)
    assert layer.mssa.output.bias.count_nonzero() == model.prediction.bias.count_nonzero() == 0
    assert 0.015 < model.cls_token.std() < 0.025
    assert 0.015 < model.mask_token.std() < 0.025


# --- Behaviour ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=3), st.integers(1, 7))
def test_masking_keeps_smallest_noise(noise: list[list[int]], num_visible: int) -> None:
    masking = random_masking(torch.tensor(noise, dtype=torch.float32), num_visible)
    assert masking.decoded is None
    for row, removed, visible, rank in zip(noise, *(field.tolist() for field in masking[:3]), strict=True):
        order = sorted(range(7), key=row.__getitem__)  # stable: of equal noise the first patch
        assert visible == order[:num_visible]
        assert [rank[n] for n in order] == list(range(7))
        assert removed == [n not in visible for n in range(7)]


@given(st.tuples(*[st.integers(1, 3)] * 5))
def test_patchify(sizes: tuple[int, ...]) -> None:
    channels, grid_h, grid_w, h, w = sizes
    images = torch.arange(2 * channels * grid_h * h * grid_w * w).reshape(2, channels, grid_h * h, grid_w * w)
    patches = patchify(images, (h, w))
    assert patches.shape == (2, grid_h * grid_w, h * w * channels)
    assert torch.equal(unpatchify(patches, (grid_h, grid_w), (h, w)), images)
    last = images[1, :, -h:, -w:].permute(1, 2, 0).flatten()  # (patch height, patch width, channel), as in MAE
    assert torch.equal(patches[1, -1], last)


@pytest.mark.parametrize("config", MODELS)
def test_every_parameter_gets_a_gradient_and_is_stored_once(config: CrateMAEConfig | ViTMAEConfig) -> None:
    model = build_model(config)
    out = model(images_for(config))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    state = model.state_dict()
    assert {tensor.data_ptr() for tensor in state.values()} == {p.data_ptr() for p in model.parameters()}
    assert len(state) == len(list(model.parameters()))
    assert out.mask.sum(1).eq(config.num_patches - config.num_visible).all()


@pytest.mark.parametrize("config", MODELS)
def test_encoder_never_sees_masked_pixels(config: CrateMAEConfig | ViTMAEConfig) -> None:
    model, images, noise = build_model(config), images_for(config), noise_for(config)
    encoded = model.encode(images, noise)
    hidden = model.patchify(images).masked_fill(encoded.masking.removed.unsqueeze(-1), float("nan"))
    spoiled = model.encode(model.unpatchify(hidden), noise)
    assert torch.equal(spoiled.tokens, encoded.tokens)
    tokens = 1 + (config.num_visible if model.visible_only else config.num_patches)
    assert encoded.tokens.shape == (2, tokens, config.dim)


def test_only_masked_patches_carry_loss() -> None:
    config = CrateMAEConfig(**SMALL)
    prediction = torch.randn(2, config.num_patches, 48, requires_grad=True)
    removed = random_masking(noise_for(config), config.num_visible).removed
    losses = sample_losses(prediction, torch.zeros(2, config.num_patches, 48), removed, int(removed[0].sum()))
    losses.sum().backward()
    assert torch.equal(prediction.grad.abs().sum(-1) > 0, removed)
    torch.testing.assert_close(losses[0], prediction[0][removed[0]].square().mean())


@pytest.mark.parametrize("config", [model for model in MODELS if model.id in ("published", "all switches", "vit")])
def test_bf16_compile_and_export(config: CrateMAEConfig | ViTMAEConfig) -> None:
    model, images, noise = build_model(config), images_for(config), noise_for(config)
    plain = model(images, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images, noise)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, plain.loss, rtol=0.05, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(images, noise)
    torch.testing.assert_close(compiled.loss, plain.loss)
    batch = torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (images, noise), dynamic_shapes=({0: batch}, {0: batch}))
    torch.testing.assert_close(exported.module()(images[:1], noise[:1]).loss, plain.sample_loss[0])


def test_decoding_whole_images() -> None:
    for config in (CrateMAEConfig(**SMALL, norm_pix_loss=True), ViTMAEConfig(**VIT)):
        model, images = build_model(config), images_for(config)
        prediction = model.decode(model.encode(images).tokens).prediction
        assert model.reconstruct(prediction, images).shape == images.shape
        torch.testing.assert_close(model.reconstruct(model.target(images), images), images)


def test_every_form_of_attention_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = reference.ssa(w)
    on_cpu = cpu_attention.self_attention
    for found in (attention_maps(w, w) @ w, attention(w, w, w), self_attention(w), on_cpu(w.flatten(0, 1))):
        torch.testing.assert_close(found.reshape(expected.shape), expected)
    monkeypatch.setattr(cpu_attention, "_CACHE_BYTES", 2 * 5 * 5 * 8)  # compute the maps in several parts
    torch.testing.assert_close(on_cpu(w.flatten(0, 1)), expected.flatten(0, 1))
    assert torch.autograd.gradcheck(on_cpu, w.detach().flatten(0, 1).requires_grad_())
    torch.library.opcheck(on_cpu, (w.detach().flatten(0, 1).requires_grad_(),))
    low = w.detach().bfloat16().requires_grad_()  # the explicit form on the CPU
    torch.testing.assert_close(self_attention(low).double(), expected, rtol=0.05, atol=0.02)
    direction = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((expected * direction).sum(), w)
    (low_gradient,) = torch.autograd.grad((self_attention(low) * direction).sum(), low)
    torch.testing.assert_close(low_gradient.double(), gradient, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("tokens", [7, 8, 9])  # two products up to d tokens, one for more
def test_both_forms_of_ista_equal_the_reference(tokens: int) -> None:
    z, dictionary = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (tokens, 8))
    expected = reference.ista(z, dictionary, 0.3, 0.5)
    assert 0 < expected.count_nonzero() < expected.numel()

    def fast() -> Tensor:
        return relu(gradient_step(z, dictionary, 0.3) - 0.3 * 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)  # takes another form of ReLU
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * direction).sum(), (z, dictionary))
    for function in (fast, compiled):
        found = function()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad((found * direction).sum(), (z, dictionary)), gradients)


def test_products_save_no_cast_copies_of_weights() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 4), (3, 4), (3,)))
    square = torch.randn(4, 4, requires_grad=True)
    leaves = (x, weight, bias, square)

    def ours() -> list[Tensor]:
        y = linear(x, weight, bias)
        return [y, linear(y, weight.t()), gram(square)]

    def autocast() -> list[Tensor]:
        y = F.linear(x, weight, bias)
        return [y, F.linear(y, weight.t()), square.t() @ square]

    def run(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = function()
        gradients = torch.autograd.grad(sum(y.float().square().sum() for y in outputs), leaves)
        return outputs, list(gradients)

    expected, found = run(autocast), run(ours)
    torch._dynamo.reset()
    compiled = run(torch.compile(ours, backend="aot_eager", fullgraph=True))
    for outputs, gradients in (found, compiled):
        assert all(torch.equal(*pair) for pair in zip(outputs, expected[0], strict=True))
        assert all(torch.equal(*pair) for pair in zip(gradients[:3], expected[1][:3], strict=True))
        torch.testing.assert_close(gradients[3], expected[1][3], rtol=0.02, atol=0.1)
    assert torch.autograd.gradcheck(gram, square.detach().double().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x.double(), weight.double()).dtype == gram(weight.double()).dtype == torch.float64

    # Of all matrices of the size of the layers' weights, only Dᵀ − DᵀD of each layer's ISTA is saved.
    model, kept = CrateMAE(CrateMAEConfig(**SMALL)), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # keep it alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16):
        model(images_for(model.config), noise_for(model.config))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert sum(t.shape == (16, 16) for place, t in kept.items() if place not in own) == model.config.depth


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_activation_checkpointing_gives_the_same_bits(
    config: CrateMAEConfig | ViTMAEConfig, dtype: torch.dtype | None
) -> None:
    model, images, noise = build_model(config), images_for(config), noise_for(config)
    kept: list[int] = []
    results = []
    for checkpointed in (False, True):
        model.checkpoint_layers = checkpointed
        model.zero_grad()
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        ):
            loss = model(images, noise).loss
        loss.backward()
        kept.append(count)
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("config", MODELS)
def test_tokens_in_bf16_stay_in_bf16_between_encoder_layers(config: CrateMAEConfig | ViTMAEConfig) -> None:
    model, images, noise = build_model(config), images_for(config), noise_for(config)
    plain = model(images, noise, return_layers=True)
    model.bf16_tokens = True
    without_autocast = model(images, noise, return_layers=True)
    assert torch.equal(without_autocast.loss, plain.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images, noise, return_layers=True)
    assert found.encoder_layers and {layer.dtype for layer in found.encoder_layers} == {torch.bfloat16}
    torch.testing.assert_close(found.sample_loss.float(), plain.sample_loss, rtol=2e-2, atol=0)

    classifier = Classifier(config, ClassifierConfig(num_classes=3))
    classifier.autoencoder.bf16_tokens = True
    dtypes = []
    for layer in classifier.encoder:
        layer.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    scales = torch.ones(len(images), sum(classifier.branches))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        classifier(images, Targets(torch.ones(len(images), 3) / 3, scales))
    assert dtypes == [torch.bfloat16] * config.depth


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("config", MODELS)
def test_gpu_equals_cpu(config: CrateMAEConfig | ViTMAEConfig) -> None:
    model, images, noise = build_model(config).double(), images_for(config, dtype=torch.float64), noise_for(config)
    loss = model(images, noise).loss
    torch.testing.assert_close(model.cuda()(images.cuda(), noise.cuda()).loss.cpu(), loss, rtol=1e-9, atol=0)


def test_wrong_input() -> None:
    model = CrateMAE(CrateMAEConfig(**SMALL))
    for shape in ((2, 3, 8, 12), (2, 1, 12, 12), (3, 12, 12)):
        with pytest.raises(UserError, match=r"\(3, 12, 12\)"):
            model(torch.zeros(shape))
    with pytest.raises(UserError, match="norm_pix_loss"):
        CrateMAE(CrateMAEConfig(**SMALL | {"patch_size": 1, "channels": 1, "norm_pix_loss": True}))
