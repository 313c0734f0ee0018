"""Checkpoints of CRATE and CRATE-α: the encoder computes what their equations give, and every command takes them.

The networks are stated in NumPy, from the equations and the layout of the authors' code, one image at a time with
tokens as rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import crate_ray
from crate_ray.config import (
    CrateMAEConfig,
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    OptimConfig,
    PrepareConfig,
    PretrainConfig,
    S3Config,
    TrackingConfig,
    ViTMAEConfig,
)
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.evaluation.job import run_evaluation
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.jobs import embed as embed_job
from crate_ray.models import CrateMAE, build_model, export_published, load_published
from crate_ray.models.exported import Normalizer
from crate_ray.models.published_crate import LAYOUTS as LAYOUTS_READ
from crate_ray.runs.references import load_encoder, load_weights
from crate_ray.storage.interface import open_storage
from crate_ray.tracking.registry import register
from crate_ray.training.bare_loop import train
from crate_ray.training.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

Array = np.ndarray[Any, np.dtype[np.float64]]
State = dict[str, Tensor]
STEP = 0.1  # η and λ of all of them


class Sizes(NamedTuple):
    """Sizes of a checkpoint."""

    dim: int = 192
    heads: int = 3
    depth: int = 2
    patch: tuple[int, int] = (8, 8)
    grid: tuple[int, int] = (4, 4)
    channels: int = 3

    @property
    def config(self) -> CrateMAEConfig:
        (rows, columns), (height, width) = self.grid, self.patch
        return CrateMAEConfig(
            image_size=(rows * height, columns * width), patch_size=self.patch, channels=self.channels, dim=self.dim,
            depth=self.depth, num_subspaces=self.heads,
        )  # fmt: skip


INFERRED = Sizes()
ODD = Sizes(dim=20, heads=5, depth=3, patch=(2, 3), grid=(3, 2), channels=2)


# --- The layouts ----------------------------------------------------------------------------------------------------


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    """Random tensors, on a scale on which layers keep tokens apart. Norms are away from one and zero."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) >= 2:
            value *= math.prod(shape[1:]) ** -0.5
        state[name] = 1 + 0.3 * value if "norm" in name and name.endswith("weight") else value
    return state


def norm_shapes(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def crate(sizes: Sizes = INFERRED) -> State:
    """A checkpoint with the names and shapes of the supervised CRATE."""
    d, numbers = sizes.dim, math.prod(sizes.patch) * sizes.channels
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embedding": (1, 1 + math.prod(sizes.grid), d),
        "cls_token": (1, 1, d),
        "to_patch_embedding.2.weight": (d, numbers),
        "to_patch_embedding.2.bias": (d,),
        **norm_shapes("to_patch_embedding.1", numbers),
        **norm_shapes("to_patch_embedding.3", d),
        **norm_shapes("mlp_head.0", d),
        "mlp_head.1.weight": (7, d),
        "mlp_head.1.bias": (7,),
    }
    for index in range(sizes.depth):
        layer = f"transformer.layers.{index}"
        shapes |= norm_shapes(f"{layer}.0.norm", d) | norm_shapes(f"{layer}.1.norm", d)
        shapes |= {
            f"{layer}.0.fn.qkv.weight": (d, d),
            f"{layer}.0.fn.to_out.0.weight": (d, d),
            f"{layer}.0.fn.to_out.0.bias": (d,),
            f"{layer}.1.fn.weight": (d, d),
        }
    return drawn(shapes)


def alpha(sizes: Sizes = INFERRED) -> State:
    """A checkpoint with the names and shapes of CRATE-α."""
    d = sizes.dim
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embedding": (1, 1 + math.prod(sizes.grid), d),
        "cls_token": (1, 1, d),
        "conv1.weight": (d, sizes.channels, *sizes.patch),
        "conv1.bias": (d,),
        **norm_shapes("mlp_head.0", d),
        "mlp_head.1.weight": (7, d),
        "mlp_head.1.bias": (7,),
    }
    for index in range(sizes.depth):
        layer = f"transformer.layers.{index}"
        shapes |= norm_shapes(f"{layer}.0.norm", d) | norm_shapes(f"{layer}.1.norm", d)
        shapes |= {
            f"{layer}.0.fn.qkv.weight": (d, d),
            f"{layer}.0.fn.to_out.0.weight": (d, d),
            f"{layer}.1.fn.D": (d, 4 * d),
            f"{layer}.1.fn.D1": (d, 4 * d),
        }
    return drawn(shapes)


def clipa(sizes: Sizes = INFERRED) -> State:
    """A checkpoint with the names and shapes of CRATE-α that was trained with text."""
    d = sizes.dim
    shapes: dict[str, tuple[int, ...]] = {
        "visual.positional_embedding": (1 + math.prod(sizes.grid), d),
        "visual.class_embedding": (d,),
        "visual.conv1.weight": (d, sizes.channels, *sizes.patch),
        **norm_shapes("visual.ln_post", d),
        "visual.proj": (d, 8),
        "positional_embedding": (5, 8),
        "text_projection": (8, 8),
        "logit_scale": (),
        "token_embedding.weight": (9, 8),
        **norm_shapes("ln_final", 8),
        **norm_shapes("transformer.resblocks.0.ln_1", 8),
        "transformer.resblocks.0.attn.in_proj_weight": (24, 8),
        "transformer.resblocks.0.mlp.c_fc.weight": (32, 8),
    }
    for index in range(sizes.depth):
        layer = f"visual.transformer.resblocks.{index}"
        shapes |= norm_shapes(f"{layer}.ln_1", d) | norm_shapes(f"{layer}.ln_2", d)
        shapes |= {
            f"{layer}.attn.in_proj_weight": (d, d),
            f"{layer}.attn.out_proj.weight": (d, d),
            f"{layer}.mlp.c_fc": (d, 4 * d),
            f"{layer}.mlp.c_proj": (d, 4 * d),
        }
    state = drawn(shapes)
    return {name: t.repeat(3, 1) if "visual" in name and "in_proj" in name else t for name, t in state.items()}


LAYOUTS: dict[str, Callable[[Sizes], State]] = {"CRATE": crate, "CRATE-α": alpha, "CRATE-α-CLIPA": clipa}


# --- The networks ---------------------------------------------------------------------------------------------------


def norm(state: dict[str, Array], name: str, z: Array, eps: float) -> Array:
    z = z - z.mean(1, keepdims=True)
    return z / np.sqrt((z**2).mean(1, keepdims=True) + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def subspace_attention(codebook: Array, z: Array, heads: int) -> Array:
    """[SSA(Z | U_1); …; SSA(Z | U_K)], with the rows U_1ᵀ … U_Kᵀ of the codebook."""
    found = []
    for rows in np.split(codebook, heads):
        w = z @ rows.T
        scores = w @ w.T / math.sqrt(len(rows))
        weights = np.exp(scores - scores.max(1, keepdims=True))
        found.append(weights / weights.sum(1, keepdims=True) @ w)
    return np.concatenate(found, 1)


def overcomplete(D: Array, back: Array, z: Array) -> Array:
    codes = np.zeros((len(z), D.shape[1]))
    for _ in range(2):  # two steps of ISTA from zero
        codes = np.maximum(codes - STEP * (codes @ D.T - z) @ D - STEP * STEP, 0)
    return codes @ back.T


def crate_network(state: dict[str, Array], sizes: Sizes, patches: Array) -> Array:
    """Tokens after the last norm; patches (N, height, width, channel)."""
    x = norm(state, "to_patch_embedding.1", patches.reshape(len(patches), -1), 1e-5)
    x = x @ state["to_patch_embedding.2.weight"].T + state["to_patch_embedding.2.bias"]
    x = norm(state, "to_patch_embedding.3", x, 1e-5)
    z = np.concatenate([state["cls_token"][0], x]) + state["pos_embedding"][0]
    for index in range(sizes.depth):
        layer = f"transformer.layers.{index}"
        heads = subspace_attention(
            state[f"{layer}.0.fn.qkv.weight"], norm(state, f"{layer}.0.norm", z, 1e-5), sizes.heads
        )
        z = z + heads @ state[f"{layer}.0.fn.to_out.0.weight"].T + state[f"{layer}.0.fn.to_out.0.bias"]
        x, D = norm(state, f"{layer}.1.norm", z, 1e-5), state[f"{layer}.1.fn.weight"]
        z = np.maximum(x + STEP * (x - x @ D.T) @ D - STEP * STEP, 0)
    return norm(state, "mlp_head.0", z, 1e-5)


def alpha_network(state: dict[str, Array], sizes: Sizes, patches: Array) -> Array:
    x = np.einsum("nhwc,dchw->nd", patches, state["conv1.weight"]) + state["conv1.bias"]
    z = np.concatenate([state["cls_token"][0], x]) + state["pos_embedding"][0]
    for index in range(sizes.depth):
        layer = f"transformer.layers.{index}"
        heads = subspace_attention(
            state[f"{layer}.0.fn.qkv.weight"], norm(state, f"{layer}.0.norm", z, 1e-6), sizes.heads
        )
        z = z + heads @ state[f"{layer}.0.fn.to_out.0.weight"].T
        x = norm(state, f"{layer}.1.norm", z, 1e-6)
        z = z + overcomplete(state[f"{layer}.1.fn.D"], state[f"{layer}.1.fn.D1"], x)
    return norm(state, "mlp_head.0", z, 1e-5)


def clipa_network(state: dict[str, Array], sizes: Sizes, patches: Array) -> Array:
    x = np.einsum("nhwc,dchw->nd", patches, state["visual.conv1.weight"])
    z = np.concatenate([state["visual.class_embedding"][None], x]) + state["visual.positional_embedding"]
    for index in range(sizes.depth):
        layer = f"visual.transformer.resblocks.{index}"
        queries = state[f"{layer}.attn.in_proj_weight"][: sizes.dim]
        heads = subspace_attention(queries, norm(state, f"{layer}.ln_1", z, 1e-6), sizes.heads)
        z = z + heads @ state[f"{layer}.attn.out_proj.weight"].T
        z = z + overcomplete(
            state[f"{layer}.mlp.c_fc"], state[f"{layer}.mlp.c_proj"], norm(state, f"{layer}.ln_2", z, 1e-6)
        )
    return norm(state, "visual.ln_post", z, 1e-6)


NETWORKS = {"CRATE": crate_network, "CRATE-α": alpha_network, "CRATE-α-CLIPA": clipa_network}


def network(name: str, state: State, sizes: Sizes, images: Tensor) -> Array:
    """Tokens of images (B, C, H, W) by the equations."""
    values = {key: tensor.double().numpy() for key, tensor in state.items()}
    (rows, columns), (height, width) = sizes.grid, sizes.patch
    return np.stack([
        NETWORKS[name](values, sizes, np.stack([
            image[:, r * height : (r + 1) * height, c * width : (c + 1) * width].transpose(1, 2, 0)
            for r in range(rows)
            for c in range(columns)
        ]))
        for image in images.double().numpy()
    ])  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sizes", [INFERRED, ODD], ids=["inferred", "with a config"])
@torch.no_grad()
def test_an_encoder_computes_what_its_equations_give(name: str, sizes: Sizes) -> None:
    state = LAYOUTS[name](sizes)
    model = load_published(state, None if sizes is INFERRED else sizes.config)
    assert isinstance(model, CrateMAE) and not model.has_decoder and model.config.decoder_depth == 0
    assert (model.config.num_subspaces, model.config.image_hw) == (sizes.heads, sizes.config.image_hw)
    images = torch.randn(2, sizes.channels, *sizes.config.image_hw, dtype=torch.float64)
    tokens, expected = model.encode(images).tokens.numpy(), network(name, state, sizes, images)
    assert np.abs(tokens - expected).max() < 1e-10
    assert expected.std(1).mean() > 0.01, "tokens that coincide would show little"
    # Weights and config alone give the same model.
    again = build_model(CrateMAEConfig.model_validate_json(model.config.model_dump_json())).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.encode(images).tokens, model.encode(images).tokens)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 6.09), ("small", 13.12), ("base", 22.80), ("large", 77.64)])
def test_crate_has_as_many_parameters_as_its_paper_states(preset: str, millions: float) -> None:
    form = next(layout.form for layout in LAYOUTS_READ if layout.title == "CRATE")
    config = CrateMAEConfig.model_validate({"preset": preset, "decoder_depth": 0, **form})
    with torch.device("meta"):
        ours = sum(parameter.numel() for parameter in build_model(config).parameters())
    # The published model also has a position of the CLS token, and 1000 classes.
    assert round((ours + config.dim + 1000 * (config.dim + 1)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "dim", "patch", "heads"),
    [
        ("CRATE", 384, 16, 6), ("CRATE", 576, 16, 12), ("CRATE-α", 768, 16, 12), ("CRATE-α", 1024, 14, 16),
        ("CRATE-α-CLIPA", 1280, 14, 16),
    ],
)  # fmt: skip
def test_sizes_of_the_published_models_are_inferred(name: str, dim: int, patch: int, heads: int) -> None:
    state = LAYOUTS[name](Sizes(dim, heads, 1, (patch, patch), (2, 2)))
    config = load_published({key: tensor.half() for key, tensor in state.items()}).config
    assert isinstance(config, CrateMAEConfig)
    assert (config.dim, config.depth, config.num_subspaces, config.patch_hw) == (dim, 1, heads, (patch, patch))
    assert (config.image_hw, config.channels) == ((2 * patch, 2 * patch), 3)
    assert (config.step_size, config.sparsity_lambda) == (0.1, 0.1)


def test_eta_and_lambda_are_the_published_ones_unless_they_are_set() -> None:
    state = crate(ODD)
    for changes, expected in (({}, 0.1), ({"sparsity_lambda": 0.5}, 0.5)):
        config = CrateMAEConfig.model_validate(
            ODD.config.model_dump(exclude={"sparsity_lambda", "step_size"}) | changes
        )
        found = load_published(state, config).config
        assert (found.sparsity_lambda, found.step_size) == (expected, 0.1)


# --- Files ----------------------------------------------------------------------------------------------------------


def float32(state: State) -> State:
    return {name: tensor.float() for name, tensor in state.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_load_wherever_a_model_is_named(name: str, tmp_path: Path) -> None:
    state = float32(LAYOUTS[name](INFERRED))
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    others = {"epoch": 3, "arch": "CRATE_tiny", "best_acc1": torch.tensor(71.2)}
    others |= {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    torch.save({"state_dict": parallel, **others}, tmp_path / "model_best.pth.tar")  # as CRATE's script saves
    torch.save({"model": parallel, "scaler": {}, "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.t7")
    torch.save(state, tmp_path / "model.pth")
    torch.save({f"backbone.{key}": tensor for key, tensor in state.items()}, tmp_path / "wrapped.pt")
    expected = load_published(state).state_dict()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    for path in files:
        model = crate_ray.load_model(f"published:{path}")
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items()), path
    assert model.preprocess.mean == (0.485, 0.456, 0.406)


# --- What is refused ------------------------------------------------------------------------------------------------


def refusal(state: State, config: Any = None) -> str:
    with pytest.raises(UserError) as error:
        load_published(state, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_quite_a_checkpoint_is_refused_in_one_sentence() -> None:
    state, zero = crate(), torch.zeros(1)
    kept = {name: tensor for name, tensor in state.items() if name != "mlp_head.0.bias"}
    assert refusal(kept) == "the checkpoint's names are not those of a published CRATE: missing mlp_head.0.bias"
    assert "a published CRATE: unexpected transformer.layers.0.ls.gamma" in refusal(
        state | {"transformer.layers.0.ls.gamma": zero}
    )
    assert "a published CRATE-α: missing pos_embedding" in refusal(
        {name: tensor for name, tensor in alpha().items() if name != "pos_embedding"}
    )
    name = "transformer.layers.1.1.fn.weight"
    assert f"{name} (5, 192) instead of (192, 192)" in refusal(state | {name: torch.zeros(5, 192).double()})
    assert "dtypes torch.float32, torch.float64; convert all" in refusal(state | {name: state[name].float()})
    assert "pos_embedding and cls_token of the checkpoint are not tokens of 192 numbers" in refusal(
        state | {"cls_token": zero}
    )
    assert "pos_embedding of the checkpoint has 1 dimensions instead of 2" in refusal(state | {"pos_embedding": zero})
    assert "17 patches are not a square grid; pass a config with its image_size" in refusal(
        state | {"pos_embedding": torch.zeros(1, 18, 192)}
    )
    assert "patches of 36 numbers are not squares with 3 channels; pass a config with its patch_size" in refusal(
        crate(Sizes(patch=(3, 4)))
    )
    assert "no published CRATE-α has the width 20, and the number of subspaces cannot be inferred" in refusal(
        alpha(Sizes(20, 5))
    )
    assert "dictionary has 700 atoms, which is no multiple of its width 192" in refusal(
        alpha() | {"transformer.layers.0.1.fn.D": torch.zeros(192, 700)}
    )
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    assert f"{name} of the checkpoint has different maps for queries, keys and values" in refusal(
        clipa() | {name: torch.randn(576, 192)}
    )
    assert f"{name} (192, 192) instead of (576, 192)" in refusal(clipa() | {name: torch.randn(192, 192).double()})


def test_a_config_of_other_sizes_is_refused() -> None:
    changes = {"depth": 3, "image_size": 64}
    config = CrateMAEConfig.model_validate(INFERRED.config.model_dump() | changes)
    for make in LAYOUTS.values():
        assert refusal(make(INFERRED), config) == (
            "the config does not match the checkpoint: depth is 2 in the checkpoint and 3 in the config; "
            "number of patches is 16 in the checkpoint and 64 in the config"
        )


def test_pretraining_says_that_there_is_no_decoder(tmp_path: Path) -> None:
    torch.save(float32(alpha()), tmp_path / "alpha.pth")
    path = str(tmp_path / "alpha.pth")
    with pytest.raises(UserError, match=r"alpha\.pth holds an encoder without a decoder, which pretraining needs; .*"):
        load_weights(path, INFERRED.config, TrackingConfig(), S3Config())
    with pytest.raises(UserError, match=r"alpha\.pth is a checkpoint of CRATE-α; set model\.architecture crate_mae"):
        load_weights(path, ViTMAEConfig(), TrackingConfig(), S3Config())
    model = load_published(path)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    for call in (lambda: model(images, noise), lambda: model.encode(images, noise), lambda: model.decode(images)):
        with pytest.raises(UserError, match="this model is an encoder without a decoder, so it predicts no patches"):
            call()
    assert isinstance(model, CrateMAE)
    with pytest.raises(UserError, match="published checkpoints exist only with the default of output_bias, residual"):
        export_published(model)
    with pytest.raises(UserError, match="a published CRATE-MAE has a decoder, and this model is an encoder alone"):
        export_published(CrateMAE(CrateMAEConfig(image_size=32, dim=8, num_subspaces=2, depth=1, decoder_depth=0)))
    with pytest.raises(ValueError, match=r"decoder_depth 0 is an encoder alone, which cannot be pretrained"):
        PretrainConfig.model_validate(
            {"data": {"train": "x"}, "model": model.config.model_dump(), "training": {"steps": 1}}
        )


# --- The commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    storage = open_storage(str(tmp_path_factory.mktemp("shapes")), S3Config())
    pack(shapes_source("all", 48, 40, 0), storage, PrepareConfig(output=storage.uri))
    return load_dataset(storage)


def written(name: str, folder: Path) -> str:
    torch.save(float32(LAYOUTS[name](INFERRED)), folder / "model.pth")
    return str(folder / "model.pth")


@pytest.mark.parametrize("name", LAYOUTS)
def test_embed(name: str, shapes: ShardSet, tmp_path: Path) -> None:
    path, output = written(name, tmp_path), str(tmp_path / "out")
    embed_job.main(EmbedConfig(model=path, data=shapes.storage.uri, output=output, feature="cls"))
    found = np.stack(pq.read_table(output)["embedding"].to_numpy(zero_copy_only=False))
    about = load_encoder(path, TrackingConfig(), S3Config())[1]
    batches = [batch.images for batch in iterate_dataset(shapes, about.model)]
    images = Normalizer.of(about.mean, about.std)(torch.cat(batches))
    assert np.abs(found - network(name, float32(LAYOUTS[name](INFERRED)), INFERRED, images)[:, 0]).max() < 1e-4


@pytest.mark.daily
def test_register_and_evaluate(shapes: ShardSet, tmp_path: Path) -> None:
    path, tracking = written("CRATE-α", tmp_path), TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    version = register(path, "alpha", tracking, S3Config())
    config = EvaluateConfig.model_validate({
        "model": f"models:/alpha/{version.version}", "data": shapes.storage.uri, "masks": shapes.storage.uri,
        "max_images": 8, "probe": {"train": shapes.storage.uri, "test": shapes.storage.uri}, "all_layers": False,
        "features_dir": str(tmp_path / "features"), "output": str(tmp_path / "report"), "gpu": False,
        "tracking": tracking.model_dump(),
    })  # fmt: skip
    report = run_evaluation(config, lambda line: None).report
    assert report.classification is not None and report.structure is not None and report.segmentation is not None
    assert report.reconstruction is None and report.learning is None
    assert report.left_out["reconstruction"] == "the trained CRATE has no decoder"
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000
    model, description = load_encoder(config.model, tracking, S3Config())
    again = load_encoder(path, tracking, S3Config())[0]
    assert description.model == again.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_finetune(shapes: ShardSet, tmp_path: Path) -> None:
    path = written("CRATE", tmp_path)
    config = FinetuneConfig.model_validate({
        "name": "tuned", "storage": str(tmp_path), "model": path, "data": {"train": shapes.storage.uri},
        "training": {"steps": 1, "batch_size": 8, "precision": "fp32"}, "scaling": {"gpu": False},
    })  # fmt: skip
    run = open_finetuning(config)
    model = load_encoder(path, TrackingConfig(), S3Config())[0]
    weights = load_file(tmp_path / "tuned" / "initial" / "model.safetensors")
    encoder = {f"autoencoder.{name}": value for name, value in model.state_dict().items() if "encoder_norm" not in name}
    assert all(torch.equal(weights[name], value) for name, value in encoder.items())
    tuned = train(FinetuneTask, run.config, run.record, run.total_steps, weights=weights).weights
    assert [name for name in encoder if torch.equal(tuned[name], encoder[name])] == []


def test_learned_positions_have_no_weight_decay() -> None:
    model = CrateMAE(CrateMAEConfig(image_size=8, patch_size=4, dim=8, depth=1, num_subspaces=2, positions="learned"))
    for group in build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups:
        for parameter in group["params"]:
            free = parameter.ndim == 1 or any(
                parameter is p for p in (model.positions, model.cls_token, model.mask_token)
            )
            assert group["weight_decay"] == (0.0 if free else 0.1)
