"""A model as one function from pixels to features, the form in which it becomes a graph (ONNX, torch.export)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crate_ray.config import Kind
from crate_ray.config.export import ExportFeature, PixelType
from crate_ray.models.backbone import Backbone
from crate_ray.models.exported import ModelDescription, Normalizer

INPUT = "images"
LOGITS = "logits"


class PixelModel(nn.Module):
    """Normalises pixels, encodes them, and returns features by name; for a classifier also its logits.

    Args:
        backbone: the model.
        description: how its input is normalised.
        features: what to return.
    """

    def __init__(self, backbone: Backbone, description: ModelDescription, features: Sequence[ExportFeature]) -> None:
        super().__init__()
        self.backbone, self.features = backbone, tuple(features)
        self._normalizer = Normalizer.of(description.mean, description.std)
        self._scale = 255.0 if description.kind == "image" else 1.0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of pixels (B, C, H, W): 0 to 255 as uint8 or float32, or the numbers of grids."""
        z_BTD = self.backbone.forward_features(self._normalizer(images.float() / self._scale))
        found: dict[str, Tensor] = {}
        for feature in self.features:
            found[feature] = z_BTD[:, 0] if feature == "cls" else z_BTD[:, 1:]
            if feature == "mean":
                found[feature] = found[feature].mean(1)
        if self.backbone.num_classes:
            found[LOGITS] = self.backbone.forward_head(z_BTD)
        return found

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        return [*self.features, *([LOGITS] if self.backbone.num_classes else [])]


def example_pixels(description: ModelDescription, size: int, pixels: PixelType) -> Tensor:
    """A batch of random input, the same for each call: pixels, or numbers of a grid on the scale of its statistics."""
    config, generator = description.model, torch.Generator().manual_seed(size)
    shape = (size, config.channels, *config.image_hw)
    if description.kind == "grid":
        mean, std = (torch.tensor(values)[:, None, None] for values in (description.mean, description.std))
        return mean + std * torch.randn(shape, generator=generator)
    random = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return random if pixels == "uint8" else random.float()


def input_type(kind: Kind, pixels: PixelType) -> PixelType:
    """Type of the numbers that go in. Grids are float32 always."""
    return "float32" if kind == "grid" else pixels
