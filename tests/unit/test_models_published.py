"""Published checkpoints: exact import and export in every form, and one clear error for whatever is not one."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crate_ray.errors import UserError
from crate_ray.models import CrateMAE, CrateMAEConfig, export_published, load_published

CONFIG = CrateMAEConfig(image_size=(8, 12), patch_size=4, channels=2, dim=16, depth=2, decoder_depth=1, num_subspaces=4)

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    """A checkpoint whose unused tensors are not the ones that we would write."""
    generator = torch.Generator().manual_seed(0)
    fresh = export_published(CrateMAE(CONFIG))
    return {
        name: tensor + 1e-7 if "pos_embed" in name else torch.randn(tensor.shape, generator=generator)
        for name, tensor in fresh.items()
    }


def assert_same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_round_trip_in_every_form(state: State, tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=1e-4, output_dir="out")
    torch.save({"model": state, "epoch": 3, "args": arguments}, tmp_path / "mae.pth")  # as MAE's script saves
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.pth")
    save_file(state, tmp_path / "plain.safetensors")
    forms: list[Any] = [
        state,
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        {name: tensor.numpy() for name, tensor in state.items()},
        tmp_path / "mae.pth",
        str(tmp_path / "ddp.pth"),
        tmp_path / "plain.safetensors",
    ]
    for form in forms:
        assert_same(export_published(load_published(form, CONFIG)), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_kept(state: State, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model = load_published(state, CONFIG)
    assert model.cls_token.dtype == dtype
    assert_same(export_published(model), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_export_then_import(dtype: torch.dtype) -> None:
    model = CrateMAE(CONFIG).to(dtype)
    again = load_published(export_published(model), CONFIG)
    assert_same(again.state_dict(), model.state_dict())
    images, noise = torch.randn(1, 2, 8, 12, dtype=dtype), torch.rand(1, 6)
    assert torch.equal(model(images, noise).loss, again(images, noise).loss)


def test_sizes_are_inferred() -> None:
    config = CrateMAEConfig(preset="tiny", image_size=64, channels=1)
    model = load_published(export_published(CrateMAE(config)))
    assert model.config.model_copy(update={"image_size": 64, "patch_size": 16}) == config


def bad(state: State, change: str) -> Any:
    changed: dict[str, Any] = dict(state)
    if change == "missing and unexpected":
        changed["head.weight"] = changed.pop("blocks.1.layers.0.0.fn.qkv.weight")
    elif change == "not one at all":
        changed = {"fc.weight": torch.zeros(2, 2)}
    elif change == "mixed dtypes":
        changed["norm.weight"] = changed["norm.weight"].double()
    elif change == "shape":
        changed["mask_token"] = torch.zeros(1, 1, 12)
    elif change == "positions":
        changed["pos_embed"] = changed["pos_embed"] + 1e-4
    elif change == "not a number":
        changed["decoder_pos_embed"] = changed["decoder_pos_embed"] * float("nan")
    elif change == "not a tensor":
        changed["cls_token"] = [1.0]
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing and unexpected", r"missing blocks\.1\.layers\.0\.0\.fn\.qkv\.weight; unexpected head\.weight"),
        ("not one at all", r"missing patch_embed\.proj\.weight, decoder_pos_embed, blocks\.0"),
        ("mixed dtypes", r"dtypes torch\.float32, torch\.float64"),
        ("shape", r"mask_token \(1, 1, 12\) instead of \(1, 1, 16\)"),
        ("positions", r"pos_embed of the checkpoint differs by up to 0\.0001"),
        ("not a number", "decoder_pos_embed of the checkpoint differs by up to nan"),
        ("not a tensor", "'cls_token' of the checkpoint is a list"),
    ],
)
def test_bad_states(state: State, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_published(bad(state, change), CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "6 patches are not a square grid; pass a config"),
        (
            CONFIG.model_copy(update={"dim": 32, "depth": 3}),
            "dim is 16 in the checkpoint and 32 in the config; depth is 2",
        ),
        (CONFIG.model_copy(update={"attention": "linear"}), "only with the default of attention"),
        (CONFIG.model_copy(update={"num_subspaces": 1, "subspace_dim": 16}), "no output map W"),
    ],
)
def test_bad_configs(state: State, config: CrateMAEConfig | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_published(state, config)


def test_unknown_size_asks_for_config() -> None:
    square = CrateMAEConfig.model_validate(CONFIG.model_dump() | {"image_size": 8})
    with pytest.raises(UserError, match="number of subspaces cannot be inferred from a checkpoint; pass a config"):
        load_published(export_published(CrateMAE(square)))


def test_ablations_are_not_exported() -> None:
    tied = CrateMAEConfig.model_validate(CONFIG.model_dump() | {"output_map": "tied"})
    with pytest.raises(UserError, match="output_map"):
        export_published(CrateMAE(tied))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: argparse.Namespace(lr=bomb)])
def test_nothing_is_executed(state: State, tmp_path: Path, wrap: Any) -> None:
    trace = tmp_path / "executed"
    content = {"model": state, "args": wrap(Bomb(trace))}
    torch.save(content, tmp_path / "torch.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(content))
    for name in ("torch.pth", "pickle.pth"):
        with pytest.raises(UserError, match=rf"{re.escape(name)} is not a readable checkpoint of tensors"):
            load_published(tmp_path / name, CONFIG)
    assert not trace.exists()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint file"):
        load_published(tmp_path / "absent.pth")
    for name in ("empty.pth", "noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else np.random.default_rng(0).bytes(999))
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_published(tmp_path / name)
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor"):
        load_published(tmp_path / "tensor.pth")
