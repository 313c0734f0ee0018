"""A trained model as two files: model.safetensors, and model.json, which says how to build and how to feed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from crate_ray.config import ClassifierConfig, Kind, ModelConfig, Settings
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.classifier import Classifier

WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"


class ModelDescription(Settings):
    """What weights alone do not say."""

    model: ModelConfig
    """Architecture and sizes; of a classifier, those of its encoder."""
    classifier: ClassifierConfig | None = None
    """Of a fine-tuned classifier: what is on top of the encoder."""
    mean: tuple[float, ...]
    """Mean per channel that is subtracted from the input (images on the scale 0 to 1)."""
    std: tuple[float, ...]
    """Standard deviation per channel that the input is divided by."""
    kind: Kind
    """'image': takes encoded or uint8 images; 'grid': float arrays."""
    dataset: str | None = None
    """Digest of the training data's manifest."""
    run_key: str | None = None
    """The run that trained it."""
    step: int = 0
    """Optimiser steps behind the weights."""


@dataclass(frozen=True)
class Normalizer:
    """Loaded values to model input: (x − mean) / std per channel, after uint8 is put on the scale 0 to 1."""

    mean: Tensor
    """(channels, 1, 1)"""
    std: Tensor
    """(channels, 1, 1)"""

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str = "cpu") -> Normalizer:
        """From per-channel numbers."""
        return cls(*(torch.tensor(v, device=device)[:, None, None] for v in (mean, std)))

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """uint8 or float images, (B, channels, H, W), to normalised float32."""
        images = images_BCHW.float() / 255 if images_BCHW.dtype == torch.uint8 else images_BCHW.float()
        return (images - self.mean) / self.std

    def undo(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images back to their own scale."""
        return images_BCHW * self.std + self.mean


def export_model(folder: Path, weights: dict[str, Tensor], description: ModelDescription) -> None:
    """Write a model into a local folder."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2))


def load_exported(folder: Path) -> tuple[MaskedAutoencoder, ModelDescription]:
    """Masked autoencoder in evaluation mode, and its description, from a local folder.

    Raises UserError when the files are missing or do not belong together, or hold a classifier.
    """
    model, description = load_any(folder)
    if isinstance(model, Classifier):
        raise UserError("this model is a fine-tuned classifier, a pretrained one is needed; give that")
    return model, description


def load_any(folder: Path) -> tuple[MaskedAutoencoder | Classifier, ModelDescription]:
    """Masked autoencoder or classifier in evaluation mode, and its description, from a local folder.

    Raises UserError when the files are missing or do not belong together.
    """
    try:
        description = ModelDescription.model_validate_json((folder / DESCRIPTION_FILE).read_bytes())
        model: MaskedAutoencoder | Classifier
        if description.classifier is None:
            model = build_model(description.model)
        else:
            model = Classifier(description.model, description.classifier)
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (OSError, ValidationError, RuntimeError, safetensors.SafetensorError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"{folder} does not hold a model as this version writes them: {cause}") from None
    return model.eval(), description
