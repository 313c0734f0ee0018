"""Checkpoints of other code, as people have them on disk: each layout loads the right model, and what is no checkpoint
is named."""

from __future__ import annotations

import argparse
import gzip
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import crate_ray
from crate_ray.config import ClassifierConfig, CrateMAEConfig, ModelConfig, S3Config, TrackingConfig, ViTMAEConfig
from crate_ray.errors import UserError
from crate_ray.models import CrateMAE, ViTMAE, build_model, export_published, load_published
from crate_ray.models.checkpoint_file import plain_tensors
from crate_ray.models.classifier import Classifier
from crate_ray.models.patches import sincos_positions
from crate_ray.runs.references import load_encoder, load_weights
from crate_ray.tracking.registry import register

pytestmark = pytest.mark.usefixtures("one_thread")

CRATE = CrateMAEConfig(image_size=32, patch_size=8, dim=16, depth=2, decoder_depth=1, num_subspaces=4)
VIT = ViTMAEConfig(
    image_size=32, patch_size=8, dim=24, depth=2, num_heads=3, decoder_dim=16, decoder_depth=1, decoder_num_heads=2,
    norm_pix_loss=True,
)  # fmt: skip
S3 = S3Config()

State = dict[str, Tensor]


def block(state: State, name: str, dim: int, hidden: int, generator: torch.Generator) -> None:
    shapes = {
        "norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
        "mlp.fc1.weight": (hidden, dim), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (dim, hidden),
        "mlp.fc2.bias": (dim,),
    }  # fmt: skip
    state |= {f"{name}.{part}": 0.3 * torch.randn(shape, generator=generator) for part, shape in shapes.items()}


def mae(
    *, dim: int = 24, depth: int = 2, decoder_dim: int = 16, decoder: bool = True, grid: int = 4, patch: int = 8
) -> State:
    """A checkpoint with the names and shapes of MAE's code."""
    generator = torch.Generator().manual_seed(0)
    state: State = {
        "cls_token": torch.randn(1, 1, dim, generator=generator),
        "pos_embed": F.pad(sincos_positions(dim, (grid, grid)), (0, 0, 1, 0)),
        "patch_embed.proj.weight": 0.1 * torch.randn(dim, 3, patch, patch, generator=generator),
        "patch_embed.proj.bias": torch.randn(dim, generator=generator),
        "norm.weight": torch.randn(dim, generator=generator),
        "norm.bias": torch.randn(dim, generator=generator),
    }
    for index in range(depth):
        block(state, f"blocks.{index}", dim, 4 * dim, generator)
    if decoder:
        out = patch * patch * 3
        state |= {
            "mask_token": torch.randn(1, 1, decoder_dim, generator=generator),
            "decoder_pos_embed": F.pad(sincos_positions(decoder_dim, (grid, grid)), (0, 0, 1, 0)),
            "decoder_embed.weight": torch.randn(decoder_dim, dim, generator=generator),
            "decoder_embed.bias": torch.randn(decoder_dim, generator=generator),
            "decoder_norm.weight": torch.randn(decoder_dim, generator=generator),
            "decoder_norm.bias": torch.randn(decoder_dim, generator=generator),
            "decoder_pred.weight": torch.randn(out, decoder_dim, generator=generator),
            "decoder_pred.bias": torch.randn(out, generator=generator),
        }
        block(state, "decoder_blocks.0", decoder_dim, 4 * decoder_dim, generator)
    return state


def transformer(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    """A layer of timm's vision transformer, written from its definition."""

    def linear(part: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.{part}.weight"].T + state[f"{name}.{part}.bias"]

    def norm(part: str, value: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"], 1e-6)

    batch, tokens, dim = x.shape
    qkv = linear("attn.qkv", norm("norm1", x)).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    maps = (qkv[0] @ qkv[1].transpose(-2, -1) * (dim // heads) ** -0.5).softmax(-1)
    x = x + linear("attn.proj", (maps @ qkv[2]).transpose(1, 2).reshape(batch, tokens, dim))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


def embedded(state: State, images: Tensor) -> Tensor:
    """Tokens of whole images after the last norm, as MAE's code computes them."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1)
    for index in range(2):
        x = transformer(state, f"blocks.{index}", x, 3)
    return F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)


def decoded(state: State, tokens: Tensor) -> Tensor:
    """Predicted patches of whole images, as MAE's code computes them."""
    x = tokens @ state["decoder_embed.weight"].T + state["decoder_embed.bias"] + state["decoder_pos_embed"]
    x = transformer(state, "decoder_blocks.0", x, 2)
    x = F.layer_norm(x, x.shape[-1:], state["decoder_norm.weight"], state["decoder_norm.bias"], 1e-6)
    return (x @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])[:, 1:]


# --- ViT-MAE --------------------------------------------------------------------------------------------------------


def test_a_vit_mae_computes_what_the_code_of_mae_computes() -> None:
    state = {name: tensor.double() for name, tensor in mae().items()}
    model = load_published(state, VIT)
    assert isinstance(model, ViTMAE) and model.has_decoder
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = model.encode(images).tokens
    torch.testing.assert_close(tokens, embedded(state, images))
    torch.testing.assert_close(model.decode(tokens).prediction, decoded(state, tokens))


def test_an_encoder_alone_embeds_and_is_fine_tuned_and_says_what_it_cannot() -> None:
    state = mae(decoder=False)
    for config in (VIT, VIT.model_copy(update={"decoder_depth": 0})):
        model = load_published(state, config)
        assert not model.has_decoder and model.config.decoder_depth == 0 and len(model.decoder) == 0
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model.encode(images).tokens, embedded(state, images))
        with pytest.raises(UserError, match="an encoder without a decoder, so it predicts no patches; probe it, fine-"):
            model(images)
    classifier = Classifier(model.config, ClassifierConfig(num_classes=3))
    classifier.load_encoder(model)
    assert classifier(images).scores.shape == (2, 3)


@pytest.mark.parametrize(("dim", "patch", "heads"), [(768, 16, 12), (1024, 16, 16), (1280, 14, 16), (384, 16, 6)])
@pytest.mark.parametrize("decoder", [False, True])
def test_sizes_of_the_published_models_are_inferred(dim: int, patch: int, heads: int, decoder: bool) -> None:
    state = mae(dim=dim, depth=1, decoder_dim=512, decoder=decoder, grid=2, patch=patch)
    model = load_published({"model": state, "args": argparse.Namespace(norm_pix_loss=True)})
    assert isinstance(model, ViTMAE)
    found = model.config
    assert (found.dim, found.depth, found.num_heads, found.mlp_ratio, found.qkv_bias) == (dim, 1, heads, 4.0, True)
    assert (found.image_hw, found.patch_hw, found.norm_pix_loss) == ((2 * patch, 2 * patch), (patch, patch), True)
    assert found.decoder_depth == (1 if decoder else 0)
    if decoder:
        assert (found.decoder_dim, found.decoder_num_heads) == (512, 16)


def vit_refusal(config: ViTMAEConfig | None = VIT, **changes: Tensor | None) -> str:
    state = {name: tensor for name, tensor in (mae() | changes).items() if tensor is not None}
    with pytest.raises(UserError) as error:
        load_published(state, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_quite_a_vit_mae_is_refused_in_one_sentence() -> None:
    learned = vit_refusal(pos_embed=torch.randn(1, 17, 24))
    assert "pos_embed of the checkpoint differs by up to" in learned and "learned positions cannot be loaded" in learned
    tuned = {"head.weight": torch.zeros(5, 24), "fc_norm.weight": torch.ones(24)}
    assert "unexpected fc_norm.weight, head.weight; it is a trained classifier" in vit_refusal(**tuned)
    assert "missing norm.bias" in vit_refusal(**{"norm.bias": None})
    assert "unexpected blocks.0.ls1.gamma" in vit_refusal(**{"blocks.0.ls1.gamma": torch.zeros(24)})
    assert "missing blocks.2.attn.proj.bias" in vit_refusal(
        VIT.model_copy(update={"depth": 3}), **{"blocks.77777777.x": torch.zeros(1)}
    )
    assert "the MLP's hidden width is 96 in the checkpoint and 48 in the config" in vit_refusal(
        VIT.model_copy(update={"mlp_ratio": 2.0})
    )
    assert "widths 24 and 16, and the number of heads cannot be inferred" in vit_refusal(None)
    assert "pos_embed of the checkpoint has shape (2, 17, 24)" in vit_refusal(pos_embed=torch.zeros(2, 17, 24))


# --- Positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 48, (24, 40)])
def test_other_image_sizes_have_the_positions_of_their_own_grid(size: Any) -> None:
    crate = export_published(CrateMAE(CRATE))
    for state, config in ((crate, CRATE), (mae(), VIT)):
        config = type(config).model_validate(config.model_dump() | {"image_size": size})
        model, same = load_published(state, config), build_model(config)
        same.load_state_dict(model.state_dict())
        images = torch.randn(1, 3, *config.image_hw)
        assert torch.equal(model.encode(images).tokens, same.encode(images).tokens)
        if isinstance(model, CrateMAE):  # what is exported again is a checkpoint of this size
            table = export_published(model)["pos_embed"][0, 1:]
            torch.testing.assert_close(table, sincos_positions(16, config.grid_hw)[0])


# --- Wrappers and names ---------------------------------------------------------------------------------------------

PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "model.", "module.encoder.")
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "teacher", "ema", "net", "module")


@given(
    prefix=st.sampled_from(("", *PREFIXES)),
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=3),
    inner=st.sampled_from(("", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._orig_mod.")),
)
def test_wrappers_and_prefixes_do_not_matter(prefix: str, wrappers: list[str], inner: str) -> None:
    state = mae(decoder=False)
    content: dict[str, Any] = {prefix + name.replace("blocks.1.", f"blocks.1.{inner}"): t for name, t in state.items()}
    for wrapper in wrappers:
        content = {"epoch": 3, "optimizer": {"lr": 0.1}, wrapper: content}
    found = plain_tensors(content)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_name_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"holds cls_token twice, under different prefixes"):
        plain_tensors({"cls_token": torch.zeros(1), "module.cls_token": torch.zeros(1)})


def weights(path: Path, model: ModelConfig) -> State:
    return load_weights(str(path), model, TrackingConfig(), S3)


@pytest.mark.slow
def test_every_file_that_holds_the_weights_loads_wherever_a_model_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CrateMAE(CrateMAEConfig(preset="tiny", image_size=32))
    state = export_published(model)
    lightning = {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 4}
    extras = {"best_acc": np.float64(71.25), "args": argparse.Namespace(lr=0.1), "epoch": np.int64(3)}
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, **extras}, tmp_path / "checkpoint.pth.tar")
    torch.save(lightning, tmp_path / "last.ckpt")
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, tmp_path / "compiled.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "really.safetensors")
    save_file(state, tmp_path / "pytorch_model.bin")
    save_file(state, tmp_path / "model.safetensors")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for path in files:
        found = weights(path, model.config)
        loaded, description = load_encoder(str(path), TrackingConfig(), S3)
        again = crate_ray.load_model(f"published:{path}")
        for name, value in model.state_dict().items():
            assert torch.equal(found[name], value) and torch.equal(loaded.state_dict()[name], value), path
            assert torch.equal(again.state_dict()[name], value), path
        assert description.kind == "image"


def test_architectures_are_told_apart(tmp_path: Path) -> None:
    torch.save({"model": mae()}, tmp_path / "vit.pth")
    torch.save({"model": mae(decoder=False)}, tmp_path / "mae_pretrain_vit.pth")
    torch.save(export_published(CrateMAE(CRATE)), tmp_path / "crate.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    assert weights(tmp_path / "vit.pth", VIT).keys() == ViTMAE(VIT).state_dict().keys()
    for name, config, message in (
        ("vit.pth", CRATE, r"vit\.pth is a checkpoint of ViT-MAE; set model\.architecture vit_mae"),
        ("crate.pth", VIT, r"crate\.pth is a checkpoint of CRATE-MAE; set model\.architecture crate_mae"),
        ("other.pth", CRATE, r"no checkpoint of CRATE-MAE, CRATE, CRATE-α or ViT-MAE: missing .*; its names are fc\."),
        ("other.pth", VIT, r"not a checkpoint of ViT-MAE"),
        (
            "mae_pretrain_vit.pth",
            VIT,
            r"holds an encoder without a decoder, which pretraining needs; .* finetune, eval",
        ),
    ):
        with pytest.raises(UserError, match=message):
            weights(tmp_path / name, config)


def test_a_published_encoder_is_registered_without_a_run(tmp_path: Path) -> None:
    torch.save({"model": mae(dim=192, depth=1, decoder=False)}, tmp_path / "mae_pretrain_vit_tiny.pth")
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    version = register(str(tmp_path / "mae_pretrain_vit_tiny.pth"), "mae", tracking, S3)
    model, description = load_encoder(f"models:/mae/{version.version}", tracking, S3)
    assert not model.has_decoder and description.model.dim == 192
    images = torch.randn(1, 3, 32, 32)
    expected = load_encoder(str(tmp_path / "mae_pretrain_vit_tiny.pth"), tracking, S3)[0].encode(images).tokens
    torch.testing.assert_close(model.encode(images).tokens, expected)


# --- What is no checkpoint ------------------------------------------------------------------------------------------


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("readme.txt", "x")
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as packed_tar:
            packed_tar.addfile(tarfile.TarInfo("weights.pth"))
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    else:
        torch.save({"a": torch.zeros(300)}, file)
    return file.getvalue()


OTHERS = {
    "web page": (b"<!DOCTYPE html>\n<html><head>", "it is a web page; the download may need a login"),
    "page with blanks": (b"\xef\xbb\xbf\n  <HTML>", "it is a web page"),
    "error of S3": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "it is an XML document"),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a pointer of Git LFS.*git lfs pull",
    ),
    "annex": (b"/annex/objects/SHA256E-s12--ab.pth\n", "a pointer of git-annex.*git annex get"),
    "gzip": (gzip.compress(b"weights"), "compressed with gzip; decompress it first"),
    "zip": (archive("zip"), r"a zip archive of readme\.txt; extract"),
    "tar": (archive("tar"), "a tar archive; extract"),
    "script": (archive("script"), "a TorchScript program; save its weights"),
    "cut off": (archive("weights")[:1500], "it is cut off: .* download it again"),
    "JSON": (b'{"message": "Not Found"}', r"""text that begins with '\{"message":'; download"""),
    "empty": (b"", "it is empty; download it again"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "noise": (np.random.default_rng(0).bytes(999), "it is damaged, or holds more than tensors"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("suffix", ["pth", "pth.tar", "safetensors"])
def test_what_a_file_is_instead_is_said_with_the_path_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    content, message = OTHERS[name]
    (tmp_path / f"mae.{suffix}").write_bytes(content)
    if suffix == "safetensors" and name == "noise":
        message = "SafetensorError|ValueError"
    monkeypatch.chdir(tmp_path)
    for given_path in (f"mae.{suffix}", str(tmp_path / f"mae.{suffix}")):
        for load in (lambda path: crate_ray.load_model(path), lambda path: weights(path, CRATE)):
            with pytest.raises(UserError, match=message) as error:
                load(given_path)
            assert str(error.value).startswith(f"{given_path} is not a readable checkpoint of tensors")
            assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_a_link_of_git_annex_without_its_content(tmp_path: Path) -> None:
    (tmp_path / "mae.pth").symlink_to(".git/annex/objects/aa/bb/SHA256E-s9--ab.pth/SHA256E-s9--ab.pth")
    with pytest.raises(UserError, match=r"mae\.pth is a link of git-annex whose content is not here; get it with"):
        crate_ray.load_model(str(tmp_path / "mae.pth"))
    with pytest.raises(UserError, match=r"there is no checkpoint file \S+absent\.pth$"):
        crate_ray.load_model(str(tmp_path / "absent.pth"))


class Trained:
    """A class of the code that wrote a checkpoint."""


def test_a_checkpoint_with_objects_names_their_class(tmp_path: Path) -> None:
    torch.save({"model": mae(), "config": Trained()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"it holds a Python object, \S+\.Trained; save the model's state_dict alone"):
        crate_ray.load_model(str(tmp_path / "x.pth"))
