"""Checks that weights fit a model before memory is taken for it.

Whoever can write a model's files can state any size in them. So the model is first built on torch's meta device, which
takes no memory, and compared with the tensors that a file really holds.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from crate_ray.bounded import MAX_JSON_BYTES, open_regular
from crate_ray.config import CrateMAEConfig, ViTMAEConfig

Shapes = Mapping[str, tuple[int, ...]]

_MAX_LAYERS = 1000
_MAX_POSITION_BYTES = 2**28
"""Largest table of positions."""
_SLACK_BYTES = 2**30
"""Memory that a model may take in addition to four times that of its weights: position tables, a classifier's unused
decoder while it is built."""


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header.

    Raises:
        OSError: it is not a regular file, or cannot be read.
        ValueError, safetensors.SafetensorError: it is damaged.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_JSON_BYTES:
        raise ValueError(f"its header has {size} bytes")
    with safe_open(path, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping


def check_not_empty(shapes: Shapes) -> Shapes:
    """Return the shapes. Raise ValueError for a tensor without elements, whose other sides could have any length."""
    for name, shape in shapes.items():
        if 0 in shape:
            raise ValueError(f"tensor {name!r} of shape {shape} is empty")
    return shapes


def check_stored(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless all elements of a tensor are stored. An expanded one takes memory when it is used."""
    if tensor.layout != torch.strided or not tensor.numel() or tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise ValueError(f"tensor {name!r} of shape {tuple(tensor.shape)} is empty, sparse or expanded")


def check_plain_zip(path: Path) -> None:
    """Raise ValueError if a file of `torch.save` holds compressed content, which torch never writes."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
            raise ValueError(f"its entry {entry.filename!r} is compressed")
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_JSON_BYTES:
            raise ValueError(f"its entry {entry.filename!r} has {entry.file_size} bytes")


def check_fits(shapes: Shapes, config: CrateMAEConfig | ViTMAEConfig, build: Callable[[], nn.Module]) -> None:
    """Check that weights of these shapes are those of a model.

    Args:
        shapes: shapes of the weights by name.
        config: config of the model, or of its encoder.
        build: builds the model, and is called on the meta device.

    Raises:
        ValueError: names or shapes differ, or the model would take much more memory than its weights.
        RuntimeError: torch cannot describe tensors of this size.
    """
    layers = config.depth + (config.decoder_depth or 0)
    if layers > _MAX_LAYERS:
        raise ValueError(f"the model has {layers} layers, more than the limit of {_MAX_LAYERS}")
    if 4 * config.num_patches * config.dim > _MAX_POSITION_BYTES:  # NumPy computes the table, on any device
        raise ValueError(f"the model has {config.num_patches} patches of {config.dim} numbers, more than the limit")
    with torch.device("meta"):
        model = build()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(expected.keys() - shapes.keys()):
        raise ValueError(f"the weights lack {missing[0]!r}")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise ValueError(f"the weights hold {unknown[0][:200]!r}, which the model does not have")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} is {shapes[name]} instead of {shape}")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_memory(model, weights)


def check_memory(model: nn.Module, weights: int) -> None:
    """Raise ValueError if a model on the meta device takes much more memory than its weights, in bytes."""
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if needed > 4 * weights + _SLACK_BYTES:
        raise ValueError(f"the model would take {needed / 2**30:.0f} GiB, its weights have {weights / 2**30:.1f} GiB")
