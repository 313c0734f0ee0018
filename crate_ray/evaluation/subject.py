"""Who is measured: a trained encoder, the same with fresh weights, and a baseline beside them."""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch

from crate_ray.config import S3Config
from crate_ray.data.format.manifest import Manifest
from crate_ray.errors import UserError
from crate_ray.models import CrateMAE, MaskedAutoencoder, build_model, load_published
from crate_ray.models.exported import ModelDescription, Normalizer, load_exported
from crate_ray.runs.checkpoint import RUN_FILE
from crate_ray.runs.export import export_run
from crate_ray.storage.interface import Storage, open_storage

PUBLISHED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AT_STEP = re.compile(r"(?!models:/|runs:/)(.+)@(\d+)")
_CHECKPOINT = re.compile(r"step-(\d+)-[^/]+")


@dataclass(frozen=True)
class Subject:
    """An encoder that is measured, in evaluation mode."""

    name: str
    """'trained', 'untrained' or 'baseline'."""
    model: MaskedAutoencoder
    """The model."""
    description: ModelDescription
    """How it is built and fed."""

    @property
    def title(self) -> str:
        """For people: what it is and whether it was trained."""
        kind = "CRATE-MAE" if isinstance(self.model, CrateMAE) else "ViT-MAE"
        words = {"trained": f"trained {kind}", "untrained": f"untrained {kind}", "baseline": f"baseline {kind}"}
        return words[self.name]

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of encoder and decoder."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def weights(self) -> bytes:
        """The weights in safetensors."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        return safetensors.torch.save(state)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that its features depend on: weights, sizes and normalisation."""
        fields = {"model", "mean", "std", "kind"}
        sha256 = hashlib.sha256(self.description.model_dump_json(include=fields).encode())
        sha256.update(self.weights)
        return sha256.hexdigest()

    def normalizer(self, device: torch.device) -> Normalizer:
        """What loaded images go through."""
        return Normalizer.of(self.description.mean, self.description.std, device)

    def untrained(self, seed: int) -> Subject:
        """The control: the same architecture and preprocessing with fresh weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = build_model(self.description.model).eval()
        return Subject("untrained", fresh, self.description)


def load_file(reference: str, s3: S3Config) -> tuple[MaskedAutoencoder, ModelDescription]:
    """Model and description of a published checkpoint's file; images are normalised as ImageNet's, as in MAE.

    Raises UserError when the file is not one, or not of a published size.
    """
    parent, _, name = reference.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        local = Path(temporary) / name
        open_storage(parent or ".", s3).download(name, local)
        model = load_published(local).float().eval()
    if model.config.channels != len(_IMAGENET_MEAN):
        raise UserError(f"{reference} is of a model of {model.config.channels} channels, not of a published one")
    return model, ModelDescription(model=model.config, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, kind="image")


def load_checkpoint(run: Storage, step: int) -> tuple[MaskedAutoencoder, ModelDescription]:
    """Model and description of a run's checkpoint after so many steps. Raises UserError when there is none."""
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        export_run(run, Path(temporary), step)
        return load_exported(Path(temporary))


def find_checkpoint(reference: str, s3: S3Config) -> tuple[Storage, int] | None:
    """Run and step behind a reference to a checkpoint: <run>@<step>, or its folder, <run>/<attempt>/step-<step>-<id>.

    None for other references. Raises UserError when a checkpoint's folder is not in a run's.
    """
    if at_step := _AT_STEP.fullmatch(reference):
        return open_storage(at_step[1], s3), int(at_step[2])
    *parents, name = reference.rstrip("/").split("/")
    if not (match := _CHECKPOINT.fullmatch(name)):
        return None
    for cut in range(len(parents), max(len(parents) - 3, 0), -1):
        run = open_storage("/".join(parents[:cut]), s3)
        if run.exists(RUN_FILE):
            return run, int(match[1])
    raise UserError(f"{reference} looks like a checkpoint, but no folder above it holds a run ({RUN_FILE})")


def check_input(description: ModelDescription, manifest: Manifest, uri: str) -> None:
    """Raise UserError when a dataset's samples are not of the kind that a model takes."""
    if manifest.kind != description.kind:
        raise UserError(f"the model takes {description.kind}s, but {uri} holds {manifest.kind}s; give other data")
