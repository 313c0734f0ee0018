"""A trained model as two files: model.safetensors with the weights, and model.json with config and normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import FiniteFloat, ValidationError
from torch import Tensor

from crate_ray.bounded import read_small
from crate_ray.config import ClassifierConfig, Kind, ModelConfig, Settings
from crate_ray.config.identifiers import Count, RunKey, Sha256
from crate_ray.errors import UserError, invalid_value
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.classifier import Classifier
from crate_ray.models.fit import Shapes, check_fits, check_memory, check_not_empty, safetensors_shapes

WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"


class ModelDescription(Settings):
    """Everything except the weights that is needed to build a model and to prepare its input."""

    model: ModelConfig
    """Config of the model; for a classifier, of its encoder."""
    classifier: ClassifierConfig | None = None
    """Config of the head, for a fine-tuned classifier."""
    mean: tuple[FiniteFloat, ...]
    """Mean of each channel, subtracted from the input (images are on the scale 0 to 1)."""
    std: tuple[FiniteFloat, ...]
    """Standard deviation of each channel; the input is divided by it. The input of a channel with 0 is 0."""
    kind: Kind
    """'image': the input is encoded or uint8 images; 'grid': float arrays."""
    dataset: Sha256 | None = None
    """Digest of the manifest of the training data."""
    run_key: RunKey | None = None
    """Key of the run that trained the model."""
    step: Count = 0
    """Number of optimiser steps that the weights were trained for."""


@dataclass(frozen=True)
class Normalizer:
    """Turns loaded images into model input: (x − mean) / std of each channel. uint8 is first scaled to 0 to 1.

    A channel whose std is 0 has the same value everywhere. It becomes 0.
    """

    mean: Tensor
    """(channels, 1, 1)"""
    std: Tensor
    """(channels, 1, 1)"""
    divisor: Tensor
    """(channels, 1, 1): std, or infinity where it is 0."""

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str = "cpu") -> Normalizer:
        """Build from one number per channel."""
        divisor = tuple(value or math.inf for value in std)
        return cls(*(torch.tensor(v, device=device)[:, None, None] for v in (mean, std, divisor)))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised float32 images of uint8 or float images, (B, channels, H, W)."""
        images_BCHW = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (images_BCHW - self.mean) / self.divisor

    def undo(self, images: Tensor) -> Tensor:
        """Images on their original scale (uint8: 0 to 1) of normalised images."""
        return images * self.std + self.mean


def export_model(folder: Path, weights: dict[str, Tensor], description: ModelDescription) -> None:
    """Write a model's weights and description into a local folder."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2))


def read_description(folder: Path) -> ModelDescription:
    """Read a model's description from a local folder. Raises UserError if it is missing or damaged."""
    try:
        return ModelDescription.model_validate_json(read_small(folder / DESCRIPTION_FILE))
    except OSError as error:
        cause = str(error)
    except ValidationError as error:
        cause = invalid_value(error)
    raise UserError(f"{folder} does not hold a model that this version can read: {cause}")


def load_exported(folder: Path) -> tuple[MaskedAutoencoder, ModelDescription]:
    """Load a masked autoencoder, in evaluation mode, and its description from a local folder.

    Raises UserError if the files are missing, do not match, or hold a classifier.
    """
    model, description = load_any(folder)
    if isinstance(model, Classifier):
        raise UserError(
            f"{folder} holds a fine-tuned classifier, but a pretrained model is needed; pass the pretrained model"
        )
    return model, description


def load_any(folder: Path) -> tuple[MaskedAutoencoder | Classifier, ModelDescription]:
    """Load a masked autoencoder or classifier, in evaluation mode, and its description from a local folder.

    Raises UserError if the files are missing or do not match.
    """
    description = read_description(folder)
    try:
        model = _build_for(description, check_not_empty(safetensors_shapes(folder / WEIGHTS_FILE)))
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError, ValueError, OverflowError, safetensors.SafetensorError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"{folder} does not hold a model that this version can read: {cause}") from None
    return model.eval(), description


def _build_for(description: ModelDescription, shapes: Shapes) -> MaskedAutoencoder | Classifier:
    """Build the model that weights of these shapes are for. Raises ValueError or RuntimeError if there is none."""
    config, head = description.model, description.classifier
    if head is None:
        check_fits(shapes, config, lambda: build_model(config))
        return build_model(config)
    check_fits(shapes, config, lambda: Classifier(config, head))
    with torch.device("meta"):  # a classifier is built with a decoder, which is then dropped
        whole = build_model(config)
    check_memory(whole, sum(4 * math.prod(shape) for shape in shapes.values()))
    return Classifier(config, head)
