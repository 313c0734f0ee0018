"""Reads checkpoints of other code: tensors by name, whatever wraps them, and says what a file is instead.

Files are read as tensors only (`weights_only=True` or safetensors), so that no code in them is ever executed.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from crate_ray.errors import UserError
from crate_ray.models.fit import check_not_empty, check_plain_zip, check_stored, safetensors_shapes

_HEAD = 512
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_ANNEX = ".git/annex/objects"

_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; get it with `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex, not the file itself; get it with `git annex get`",
    b"\x1f\x8b": "compressed with gzip; decompress it first",
    b"BZh": "compressed with bzip2; decompress it first",
    b"\xfd7zXZ": "compressed with xz; decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it first",
    b"7z\xbc\xaf": "a 7-Zip archive; extract the checkpoint first",
    b"\x89HDF": "an HDF5 file of another framework; convert it to PyTorch or safetensors",
    b"\x93NUMPY": "a single NumPy array; save the tensors by name in PyTorch or safetensors",
}
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<head|<body)", re.IGNORECASE)

_WRAPPERS = (
    "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "weights",
    "teacher", "ema", "model_ema", "ema_state_dict", "state_dict_ema", "student",
)  # fmt: skip
"""Names under which training code stores the weights, the preferred ones first."""

_MOST_WRAPPERS = 5
_TRANSPARENT = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Parts of names that DDP, torch.compile, FSDP, activation checkpointing and Lightning add, at any depth."""

_ANCHORS = ("patch_embed.proj.weight", "transformer.layers.0.0.fn.qkv.weight", "visual.conv1.weight")
"""Names of which each layout has one, once. What comes before it comes before all names."""


def read_checkpoint(path: Path, name: str | None = None) -> Mapping[str, Any]:
    """The content of a checkpoint: a safetensors file or one of `torch.save`, whatever its suffix.

    Args:
        path: the file.
        name: name of the file in messages, if it is another one.

    Raises:
        UserError: it is something else, damaged, or holds more than tensors and plain values.
    """
    name = name or str(path)
    if path.is_symlink() and not path.exists() and _ANNEX in str(path.readlink()):
        raise UserError(f"{name} is a link of git-annex whose content is not here; get it with `git annex get`")
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {name}")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if (other := _other_kind(path, head)) is not None:
        raise UserError(f"{name} is not a readable checkpoint of tensors: it is {other}")
    try:
        if not head.startswith((_ZIP, _PICKLE)) and (path.suffix == ".safetensors" or head[8:9] == b"{"):
            check_not_empty(safetensors_shapes(path))
            content: Any = safetensors.torch.load_file(path)
        else:
            check_plain_zip(path)
            # By its suffix, torch would take a file for safetensors.
            with torch.serialization.safe_globals(_PLAIN_VALUES), path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise any exception
        raise UserError(
            f"{name} is not a readable checkpoint of tensors, and nothing in it was executed ({_reason(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{name} holds a {type(content).__name__}, not tensors by name")
    return content


def plain_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the model, without wrappers and prefixes.

    Raises:
        UserError: an entry is not a tensor, is not stored whole, or two have the same name.
    """
    state: dict[str, Tensor] = {}
    for name, value in _unwrapped(content).items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor):
            raise UserError(f"entry {name!r} of the checkpoint is a {type(value).__name__}, not a tensor")
        try:
            check_stored(str(name), value)
        except ValueError as error:
            raise UserError(f"the checkpoint is damaged: {error}") from None
        plain = ".".join(part for part in str(name).split(".") if part not in _TRANSPARENT)
        if plain in state:
            raise UserError(f"the checkpoint holds {plain} twice, under different prefixes; keep one of them")
        state[plain] = value.detach().cpu()
    prefixes = [name.removesuffix(anchor) for name in state for anchor in _ANCHORS if name.endswith(f".{anchor}")]
    if len(prefixes) == 1 and all(name.startswith(prefixes[0]) for name in state):
        return {name.removeprefix(prefixes[0]): tensor for name, tensor in state.items()}
    return state


def saved_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the training script, which MAE's code stores with the weights."""
    found = content.get("args")
    return (
        dict(vars(found))
        if isinstance(found, argparse.Namespace)
        else dict(found)
        if isinstance(found, Mapping)
        else {}
    )


def check_tensors(state: Mapping[str, Tensor], names: Mapping[str, str], own: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a checkpoint's tensors. Raises UserError unless it is one float dtype, and the shapes are a model's.

    Args:
        state: the checkpoint's tensors.
        names: the model's name of each parameter, by its name in the checkpoint.
        own: the model's tensors by its names; only their shapes are used.
    """
    dtypes = {state[name].dtype for name in names}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = ", ".join(sorted(map(str, dtypes)))
        raise UserError(f"the checkpoint's parameters have the dtypes {found}; convert all to one float dtype")
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[ours].shape)}"
        for name, ours in names.items()
        if state[name].shape != own[ours].shape
    ]
    if wrong:
        raise UserError(f"shapes in the checkpoint differ from those of the config: {listing(wrong)}")
    return dtypes.pop()


def check_names(
    found: Iterable[str], expected: Set[str], model: str, *, only_missing: bool = False, hint: str = ""
) -> None:
    """Raise UserError unless the names of a checkpoint are those of a model.

    Args:
        found: the checkpoint's names.
        expected: the model's.
        model: what it is, for the message.
        only_missing: whether there may be more names.
        hint: end of the message.
    """
    found = set(found)
    missing, unexpected = sorted(expected - found), [] if only_missing else sorted(found - expected)
    parts = [f"missing {listing(missing)}"] if missing else []
    parts += [f"unexpected {listing(unexpected)}"] if unexpected else []
    if parts:
        raise UserError(f"the checkpoint's names are not those of {model}: {'; '.join(parts)}{hint}")


def check_sizes(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise UserError unless sizes of a checkpoint, by their names for messages, are those of a config."""
    wrong = [
        f"{name} is {found[name]} in the checkpoint and {value} in the config"
        for name, value in expected.items()
        if found[name] != value
    ]
    if wrong:
        raise UserError(f"the config does not match the checkpoint: {'; '.join(wrong)}")


def depth_of(state: Iterable[str], layers: str) -> int:
    """Number of layers whose tensors a checkpoint has, by their names `<layers>.<number>.…`."""
    found = (re.match(rf"{re.escape(layers)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})


def listing(names: list[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _plain_values() -> list[Any]:
    """What training scripts store with the weights: parsed arguments, and numbers of NumPy. They are no code."""
    # Files that were written with NumPy 1 have the older name.
    scalar = np.float64(0).__reduce__()[0]
    named = [(scalar, f"{module}.multiarray.scalar") for module in ("numpy._core", "numpy.core")]
    return [argparse.Namespace, np.dtype, *named, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]


_PLAIN_VALUES = _plain_values()


def _unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for _ in range(_MOST_WRAPPERS):
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None
        )
        if inner is None:
            break
        content = inner
    return content


def _other_kind(path: Path, head: bytes) -> str | None:
    """What a file is if it is no checkpoint, and what to do."""
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf")
    if _PAGE.match(text):
        return "a web page; the download may need a login or another address"
    if text.lstrip().startswith(b"<?xml"):
        return "an XML document, perhaps the server's error message; download it again"
    if head[257:262] == b"ustar":
        return "a tar archive; extract the checkpoint from it"
    if head.startswith(_ZIP):
        return _other_zip(path)
    if not head:
        return "empty; download it again"
    if head.isascii() and b"\x00" not in head:
        word = next(iter(head.split()), b"")[:40].decode()
        return f"text that begins with {word!r}; download it again"
    return None


def _other_zip(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        return "cut off: the end of the file is missing; download it again"
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    if any("/code/" in name for name in names):
        return "a TorchScript program; save its weights with torch.save(model.state_dict(), FILE)"
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return f"a zip archive of {listing(names, 3) or 'nothing'}; extract the checkpoint from it"
    return None


def _reason(error: Exception) -> str:
    """Why a file cannot be read. torch's own message says how to switch off its protection."""
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds a Python object, {found[1]}; save the model's state_dict alone"
    if "weights_only" in text or "Weights only" in text:
        return "it is damaged, or holds more than tensors; download it again, or save the state_dict alone"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
