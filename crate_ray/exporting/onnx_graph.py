"""ONNX: a file that ONNX Runtime and many other programs run, without Python."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crate_ray.errors import UserError
from crate_ray.exporting.graph import INPUT, PixelModel

ONNX_FILE = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE = 2**31 - 2**26
"""Up to this size of the weights, in bytes, they fit into the file itself. Its format allows less than 2 GiB."""


def check_installed() -> None:
    """Raise UserError if a package is missing that the export needs."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"the export to ONNX needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed; run: pip install 'crate-ray[onnx]'"
        )


def write(model: PixelModel, example: Tensor, folder: Path, metadata: dict[str, str]) -> None:
    """Write a model with a dynamic batch into a folder.

    Args:
        model: the model.
        example: an input of at least two images.
        folder: where `ONNX_FILE` goes.
        metadata: texts that are stored in the file.
    """
    import onnx

    batch = torch.export.Dim("batch", min=1)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=model.outputs,
            dynamic_shapes=({0: batch},),
            external_data=weights > _ONE_FILE,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(folder / ONNX_FILE, external_data=weights > _ONE_FILE)
    onnx.checker.check_model(folder / ONNX_FILE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's warnings, which are about its own modules and about torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def read(folder: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """A written model as a function, run by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        found = session.run(names, {INPUT: images.numpy()})
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, found, strict=True)}

    return run
