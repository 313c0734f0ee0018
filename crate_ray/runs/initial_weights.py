"""The weights that a run starts from, if it was given any: <run>/initial/model.safetensors."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from crate_ray.runs.commits import DamagedCheckpoint
from crate_ray.runs.record import RUN_FILE
from crate_ray.storage.interface import Storage
from crate_ray.storage.node_folders import file_digest

INITIAL_WEIGHTS = "initial/model.safetensors"


def write_initial_weights(run: Storage, weights: Mapping[str, Tensor]) -> str:
    """Store the weights that a run starts from, and return their digest for the run's record, which is written next.

    An earlier record is deleted first. So if this process is killed, there is no record of weights that were replaced.
    """
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        path = Path(temporary) / "model.safetensors"
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        run.delete(RUN_FILE)
        run.write(INITIAL_WEIGHTS, path)
        return file_digest(path)


def fetch_initial_weights(run: Storage, digest: str, folder: Path) -> None:
    """Copy the weights that a run starts from into a local folder.

    Raises:
        DamagedCheckpoint: their digest has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    run.download(INITIAL_WEIGHTS, path)
    if file_digest(path) != digest:
        raise DamagedCheckpoint(
            f"{run.uri}/{INITIAL_WEIGHTS}, the weights that the run starts from, differs from its digest; delete it, "
            "and the next start writes it again"
        )
