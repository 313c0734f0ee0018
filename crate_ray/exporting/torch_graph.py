"""torch.export: a graph with its weights that torch runs, compiles and moves to devices, without the model's code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from crate_ray.exporting.graph import PixelModel

PT2_FILE = "model.pt2"


def write(model: PixelModel, example: Tensor, folder: Path, metadata: dict[str, str]) -> None:
    """Write a model with a dynamic batch into a folder.

    Args:
        model: the model.
        example: an input of at least two images; torch would take a batch of one for a constant.
        folder: where `PT2_FILE` goes.
        metadata: texts that are stored in the file.
    """
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, folder / PT2_FILE, extra_files=metadata)


def read(folder: Path) -> nn.Module:
    """The module of a file that this process has written."""
    return torch.export.load(folder / PT2_FILE).module()
