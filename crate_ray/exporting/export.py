"""The job: load a model, write it in a format, compare what was written with the model, and store it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from crate_ray.config.export import ExportConfig
from crate_ray.errors import UserError
from crate_ray.exporting import huggingface, onnx_graph, torch_graph
from crate_ray.exporting.checking import largest_difference
from crate_ray.exporting.graph import PixelModel, example_pixels, input_type
from crate_ray.models.backbone import Backbone
from crate_ray.models.exported import DESCRIPTION_FILE, ModelDescription, load_any
from crate_ray.runs.references import fetch
from crate_ray.storage.interface import open_storage

GRAPH_TOLERANCE, CODE_TOLERANCE = 1e-4, 1e-6
"""Largest difference from the model: of a graph, which has kernels of its own, and of the same operations in torch."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    files: dict[str, int]
    """Bytes by name."""
    input: str = ""
    """What goes in."""
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what comes out, without the batch."""
    difference: float | None = None
    """Largest difference from the model; None for the weights themselves."""


def export(config: ExportConfig) -> Exported:
    """Export a model.

    Raises:
        UserError: there is no such model, the output is not empty, a package is missing, or what was written computes
            something else than the model.
    """
    if config.format == "onnx":
        onnx_graph.check_installed()
    storage = open_storage(config.output, config.s3)
    if (local := storage.local_path("model")) is not None and local.parent.is_file():
        raise UserError(f"{storage.uri} is a file; name a folder that is new or empty")
    if (first := next(iter(storage.list()), None)) is not None:
        raise UserError(f"{storage.uri} is not empty, it holds {first.key}; name another output or empty it")
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        fetched, folder = Path(temporary) / "fetched", Path(temporary) / "export"
        folder.mkdir()
        fetch(config.model, fetched, config.tracking, config.s3)
        model, description = load_any(fetched)
        if config.format == "safetensors":
            folder, exported = fetched, Exported({})
        elif config.format == "huggingface":
            exported = _write_huggingface(Backbone(model).eval(), description, folder)
        else:
            exported = _write_graph(config, Backbone(model).eval(), description, folder)
        for path in sorted(folder.iterdir()):
            storage.write(path.name, path)
            exported.files[path.name] = path.stat().st_size
    return exported


def _write_graph(config: ExportConfig, backbone: Backbone, description: ModelDescription, folder: Path) -> Exported:
    if not config.feature and not backbone.num_classes:
        raise UserError(
            "no output is named, and the model has no classes; give --feature cls,mean,patch or a part of it"
        )
    pixels = input_type(description.kind, config.pixels)
    model = PixelModel(backbone, description, config.feature).eval()

    def images(size: int) -> Tensor:
        return example_pixels(description, size, pixels)

    metadata = {DESCRIPTION_FILE: description.model_dump_json()}
    found: Callable[[Tensor], Mapping[str, Tensor]]
    if config.format == "onnx":
        onnx_graph.write(model, images(2), folder, metadata)
        what, found = "ONNX model", onnx_graph.read(folder)
    else:
        torch_graph.write(model, images(2), folder, metadata)
        what, found = "torch.export program", torch_graph.read(folder)
    difference = largest_difference(what, model, found, images, GRAPH_TOLERANCE)
    numbers = f"{pixels}, 0 to 255," if description.kind == "image" else f"{pixels}, not normalised,"
    return Exported({}, f"images {numbers} {_shape(images(1))}", _shapes(model, images(1)), difference)


def _write_huggingface(backbone: Backbone, description: ModelDescription, folder: Path) -> Exported:
    def expected(images: Tensor) -> dict[str, Tensor]:
        tokens = backbone.forward_features(images)
        pooled = backbone.forward_head(tokens)
        return {"logits": pooled} if backbone.num_classes else {"last_hidden_state": tokens, "pooler_output": pooled}

    def images(size: int) -> Tensor:
        shape = (size, description.model.channels, *description.model.image_hw)
        return torch.randn(shape, generator=torch.Generator().manual_seed(size))

    huggingface.write(backbone, description, folder)
    found = huggingface.read(folder)
    difference = largest_difference("Hugging Face model", expected, found, images, CODE_TOLERANCE)
    return Exported(
        {}, f"pixel_values float32, normalised, {_shape(images(1))}", _shapes(expected, images(1)), difference
    )


def _shapes(model: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor) -> dict[str, tuple[int, ...]]:
    with torch.no_grad():
        return {name: tuple(value.shape[1:]) for name, value in model(images).items()}


def _shape(images: Tensor) -> str:
    return f"(batch, {', '.join(map(str, images.shape[1:]))})"
