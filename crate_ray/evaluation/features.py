"""Images to embeddings: the frozen encoder with its preprocessing, for probes, the registry and embedding jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import DataConfig, Feature, ModelConfig
from crate_ray.data.decode.samples import DecodeError, decode_batch
from crate_ray.data.decode.transforms import Crops, Int64, centre_crops
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import Batch, evaluation_loader, stride_of
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription, Normalizer, load_exported

PIXELS = "raw pixels"
_BATCH = 256
_PIXEL_SIDE = 16


class Tap(NamedTuple):
    """Where a feature is taken from."""

    feature: Feature = "mean"
    """Mean of the patch tokens, or the CLS token."""
    layer: int | None = None
    """Encoder layer 1 … L whose output it is; None: after the encoder's last norm, as embeddings are."""

    def __str__(self) -> str:
        name = "mean of patch tokens" if self.feature == "mean" else "CLS token"
        return f"{name}, {'after the last norm' if self.layer is None else f'layer {self.layer}'}"


def all_taps(depth: int) -> list[Tap]:
    """Both features of every layer of an encoder, and after its last norm."""
    features: tuple[Feature, ...] = ("mean", "cls")
    return [Tap(feature, layer) for layer in [*range(1, depth + 1), None] for feature in features]


@torch.no_grad()
def pooled_features(model: MaskedAutoencoder, images_BCHW: Tensor, taps: Sequence[Tap]) -> list[Tensor]:
    """Features (B, dim) of normalised images at each of the taps, in one pass that keeps no other layer's tokens.

    Raises UserError for a layer that the encoder does not have.
    """
    depth = len(model.encoder)
    if beyond := [tap.layer for tap in taps if tap.layer is not None and not 1 <= tap.layer <= depth]:
        raise UserError(f"there is no encoder layer {beyond[0]}; the model's layers are 1 to {depth}")

    def pool(z_BTD: Tensor, feature: Feature) -> Tensor:
        return z_BTD[:, 1:].mean(1) if feature == "mean" else z_BTD[:, 0]

    found: dict[Tap, Tensor] = {}
    z_BTD, _ = model.embed(images_BCHW)
    for number, layer in enumerate(model.encoder, 1):
        z_BTD = layer(z_BTD)
        found |= {tap: pool(z_BTD, tap.feature) for tap in taps if tap.layer == number}
    if any(tap.layer is None for tap in taps):
        z_BTD = model.encoder_norm(z_BTD)
        found |= {tap: pool(z_BTD, tap.feature) for tap in taps if tap.layer is None}
    return [found[tap].float() for tap in taps]


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """The input itself, averaged down to 16 × 16 where it is larger, (B, channels · height · width)."""
    height, width = images_BCHW.shape[2:]
    return F.adaptive_avg_pool2d(images_BCHW.float(), _pixel_hw((height, width))).flatten(1)


def pixels_title(model: ModelConfig) -> str:
    """For people: what `pixel_features` of a model's input are."""
    height, width = _pixel_hw(model.image_hw)
    return PIXELS if (height, width) == model.image_hw else f"{PIXELS} averaged to {height} × {width}"


def _pixel_hw(image_hw: tuple[int, int]) -> tuple[int, int]:
    return min(image_hw[0], _PIXEL_SIDE), min(image_hw[1], _PIXEL_SIDE)


def compute_device(gpu: bool | None) -> torch.device:
    """A GPU where this process sees one and the setting `gpu` does not rule it out, else the CPU."""
    return torch.device("cuda" if gpu is not False and torch.cuda.is_available() else "cpu")


class FeatureExtractor:
    """The encoder of a trained model with everything that comes before it.

    Parameters: the model, its description (which has the normalisation), which feature, and where to compute.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        description: ModelDescription,
        feature: Feature = "mean",
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.description, self.feature = model.to(device).eval(), description, feature
        self._device = torch.device(device)
        self._normalizer = Normalizer.of(description.mean, description.std, device)

    @classmethod
    def from_folder(
        cls, folder: Path, feature: Feature = "mean", device: torch.device | str = "cpu"
    ) -> FeatureExtractor:
        """From an exported model."""
        return cls(*load_exported(folder), feature, device)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Embeddings (B, dim), float32 on the CPU, of loaded images: uint8, or float32 grids, of the model's size."""
        return self.pooled(images_BCHW, [Tap(self.feature)])[0]

    def pooled(self, images_BCHW: Tensor, taps: Sequence[Tap]) -> list[Tensor]:
        """The same at each of several taps."""
        images = self._normalizer(images_BCHW.to(self._device))
        return [feature.cpu() for feature in pooled_features(self.model, images, taps)]

    def load(self, items: Sequence[bytes | NDArray[Any]]) -> Tensor:
        """Encoded images (or .npy grids), or arrays (H, W, channels) uint8 / (channels, H, W) float, as a batch.

        Each is cut to its largest centre crop with the model's aspect ratio and resized, as in evaluation. Raises
        DecodeError for what is not an image.
        """
        return load_all(items, self.description)


def load_all(items: Sequence[bytes | NDArray[Any]], description: ModelDescription) -> Tensor:
    """Centre-cropped input of a model (n, channels, H, W). Raises DecodeError for what is not an image."""
    out, errors = load_images(items, description)
    for error in errors:
        if error is not None:
            raise error
    return out


def load_images(
    items: Sequence[bytes | memoryview | NDArray[Any]], description: ModelDescription
) -> tuple[Tensor, list[DecodeError | None]]:
    """Centre-cropped input of a model (n, channels, H, W), and the error of each item that cannot be decoded."""
    config, kind = description.model, description.kind
    out = torch.empty(
        len(items), config.channels, *config.image_hw, dtype=torch.float32 if kind == "grid" else torch.uint8
    )

    def centre(heights: Int64, widths: Int64) -> Crops:
        return centre_crops(heights, widths, config.image_hw)

    return out, decode_batch(items, kind, centre, out)


def spread(num_samples: int, max_samples: int | None) -> NDArray[np.int64]:
    """Numbers of at most max_samples samples, evenly spread over a dataset."""
    return np.arange(0, num_samples, stride_of(num_samples, max_samples), dtype=np.int64)


def iterate_dataset(shards: ShardSet, config: ModelConfig, max_samples: int | None = None) -> Iterator[Batch]:
    """Batches of a dataset in its order, centre-cropped, of at most max_samples samples spread evenly over it."""
    data = DataConfig(train=shards.storage.uri)
    with evaluation_loader(shards, config, data, batch_size=_BATCH, max_samples=max_samples) as loader:
        yield from loader
