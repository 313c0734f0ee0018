"""Images to probabilities of classes: a fine-tuned classifier with its preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.errors import UserError
from crate_ray.evaluation.features import load_all
from crate_ray.models.classifier import Classifier, class_probabilities
from crate_ray.models.exported import ModelDescription, Normalizer, load_any


class Predictor:
    """A classifier with everything that comes before it.

    Parameters: the model, its description (which has the normalisation), and where to compute.
    """

    def __init__(self, model: Classifier, description: ModelDescription, device: torch.device | str = "cpu") -> None:
        self.model, self.description = model.to(device).eval(), description
        self._device = torch.device(device)
        self._normalizer = Normalizer.of(description.mean, description.std, device)

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device | str = "cpu") -> Predictor:
        """From an exported model. Raises UserError where that is not a classifier."""
        model, description = load_any(folder)
        if not isinstance(model, Classifier):
            raise UserError(f"{folder} holds an encoder without classes; fine-tune it with jobs/finetune.py first")
        return cls(model, description, device)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Probabilities (B, num_classes), float32 on the CPU, of loaded images: uint8, or float32 grids, of the model's
        size."""
        return class_probabilities(self.model, self._normalizer(images_BCHW.to(self._device))).cpu()

    def load(self, items: Sequence[bytes | NDArray[Any]]) -> Tensor:
        """Encoded images (or .npy grids), or arrays (H, W, channels) uint8 / (channels, H, W) float, as a batch.

        Each is cut to its largest centre crop with the model's aspect ratio and resized, as in evaluation. Raises
        DecodeError for what is not an image.
        """
        return load_all(items, self.description)
