"""The models that an evaluation compares: a trained one, the same architecture with random weights, and a baseline."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch

from crate_ray.data.format.manifest import Manifest
from crate_ray.errors import UserError
from crate_ray.models import CrateMAE, MaskedAutoencoder, build_model
from crate_ray.models.exported import ModelDescription, Normalizer


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is evaluated, in evaluation mode."""

    name: str
    """'trained', 'untrained' or 'baseline'."""
    model: MaskedAutoencoder
    """The model."""
    description: ModelDescription
    """Its architecture and normalisation."""

    @property
    def title(self) -> str:
        """Title in reports."""
        crate = "CRATE-MAE" if self.model.has_decoder else "CRATE"
        kind = crate if isinstance(self.model, CrateMAE) else "ViT-MAE"
        words = {"trained": f"trained {kind}", "untrained": f"untrained {kind}", "baseline": f"baseline {kind}"}
        return words[self.name]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of encoder and decoder."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def weights(self) -> bytes:
        """The weights as a safetensors file."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        return safetensors.torch.save(state)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that its features depend on: weights, architecture and normalisation."""
        fields = {"model", "mean", "std", "kind"}
        sha256 = hashlib.sha256(self.description.model_dump_json(include=fields).encode())
        sha256.update(self.weights)
        return sha256.hexdigest()

    def normalizer(self, device: torch.device) -> Normalizer:
        """Normalisation of its input."""
        return Normalizer.of(self.description.mean, self.description.std, device)

    def untrained(self, seed: int) -> EvaluatedModel:
        """The control: the same architecture and preprocessing with random weights from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = build_model(self.description.model).eval()
        return EvaluatedModel("untrained", fresh, self.description)


def check_input(description: ModelDescription, manifest: Manifest, uri: str) -> None:
    """Raise UserError if a dataset's samples are not of the kind, or not of the channels, that a model takes."""
    if manifest.kind != description.kind:
        raise UserError(f"the model takes {description.kind}s, but {uri} holds {manifest.kind}s; give other data")
    if manifest.kind == "grid" and manifest.channels != description.model.channels:
        raise UserError(
            f"the model takes grids of {description.model.channels} channels, but those of {uri} have "
            f"{manifest.channels}; give other data"
        )
