"""Models that a training run starts from: another run's, a registered one, or the published code's."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path, PurePosixPath

from torch import Tensor

from crate_ray.config import CrateMAEConfig, PretrainConfig, S3Config, TrackingConfig
from crate_ray.errors import UserError
from crate_ray.evaluation.subject import PUBLISHED_SUFFIXES, find_checkpoint, load_checkpoint, load_file
from crate_ray.models import MaskedAutoencoder, load_published
from crate_ray.models.exported import ModelDescription, load_exported
from crate_ray.runs.export import export_run
from crate_ray.storage.interface import open_storage
from crate_ray.tracking.registry import fetch_model, load_described

_PUBLISHED_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def initial_weights(reference: str, config: PretrainConfig) -> dict[str, Tensor]:
    """Weights by their name behind `init_from` (see PretrainConfig), on the CPU.

    Raises UserError when there are none, or a published checkpoint is not of the run's model.
    """
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        folder = Path(temporary)
        if PurePosixPath(reference).suffix in _PUBLISHED_SUFFIXES:
            return _published(reference, folder, config)
        if at_step := re.fullmatch(r"(?!models:/|runs:/)(.+)@(\d+)", reference):
            export_run(open_storage(at_step[1], config.s3), folder, int(at_step[2]))
        else:
            fetch_model(reference, folder, config.tracking, config.s3)
        return load_exported(folder)[0].state_dict()


def pretrained_model(
    reference: str, tracking: TrackingConfig, s3: S3Config
) -> tuple[MaskedAutoencoder, ModelDescription]:
    """The model behind `FinetuneConfig.model`, in evaluation mode, and its description.

    Raises UserError when there is none, or it is a classifier.
    """
    path = reference.removeprefix("published:")
    if path != reference or (PurePosixPath(path).suffix in PUBLISHED_SUFFIXES and not Path(path).is_dir()):
        return load_file(path, s3)
    if found := find_checkpoint(reference, s3):
        return load_checkpoint(*found)
    return load_described(reference, tracking, s3)


def _published(reference: str, folder: Path, config: PretrainConfig) -> dict[str, Tensor]:
    if not isinstance(config.model, CrateMAEConfig):
        raise UserError(f"{reference} is a checkpoint of CRATE-MAE; set model.architecture crate_mae to start from it")
    parent, _, name = reference.rpartition("/")
    local = folder / PurePosixPath(name).name
    open_storage(parent or ".", config.s3).download(name, local)
    return load_published(local, config.model).state_dict()
