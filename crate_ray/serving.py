"""Images to features: a trained encoder with its preprocessing.

Served models import this file. It needs no storage, no data loader and no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from crate_ray.bounded import MAX_MEMBER_BYTES, read_small
from crate_ray.config import Feature
from crate_ray.config.export import ExportFeature
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.pillow import to_eight_bits
from crate_ray.data.decode.received import received_image
from crate_ray.data.decode.samples import decode_batch
from crate_ray.data.decode.transforms import Crops, Int64, centre_crops
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription, Normalizer, load_exported


class FeaturePoint(NamedTuple):
    """A feature of the encoder: which tokens, of which layer."""

    feature: ExportFeature = "mean"
    """Mean of the patch tokens, the CLS token, or all patch tokens."""
    layer: int | None = None
    """Encoder layer, 1 to L; None: after the encoder's last norm, as embeddings are."""

    def __str__(self) -> str:
        names = {"mean": "mean of patch tokens", "cls": "CLS token", "patch": "patch tokens"}
        return f"{names[self.feature]}, {'after the last norm' if self.layer is None else f'layer {self.layer}'}"


class FeatureExtractor:
    """The encoder of a trained model with its preprocessing.

    Args:
        model: the model.
        description: how its input is normalised.
        feature: which feature to return.
        device: where to compute.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        description: ModelDescription,
        feature: ExportFeature = "mean",
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.description, self.feature = model.to(device).eval(), description, feature
        self._device = torch.device(device)
        self._normalizer = Normalizer.of(description.mean, description.std, device)

    @classmethod
    def from_folder(
        cls, folder: Path, feature: Feature = "mean", device: torch.device | str = "cpu"
    ) -> FeatureExtractor:
        """Load an exported model from a local folder."""
        return cls(*load_exported(folder), feature, device)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Embed loaded images (uint8, or float32 grids) of the model's size.

        Returns (B, dim), or (B, patches, dim) for the feature 'patch', float32 on the CPU.
        """
        return self.pooled(images_BCHW, [FeaturePoint(self.feature)])[0]

    @torch.no_grad()
    def pooled(self, images_BCHW: Tensor, points: Sequence[FeaturePoint]) -> list[Tensor]:
        """Several features of the same images, each as __call__ returns it."""
        images = self._normalizer(images_BCHW.to(self._device))
        return [feature.cpu() for feature in pooled_features(self.model, images, points)]

    def load(self, items: Sequence[bytes | NDArray[Any]]) -> Tensor:
        """Decode images for the model; see `load_all`."""
        return load_all(items, self.description)


class Preprocessor:
    """Turns pictures into the normalised batch that a model takes, with the crop and the resizing of evaluation.

    `crate_ray.load_model` gives it to each model as `model.preprocess`.

    Args:
        description: the model's description.
    """

    def __init__(self, description: ModelDescription) -> None:
        self.description = description
        self._normalizer = Normalizer.of(description.mean, description.std)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that is subtracted (images are on the scale 0 to 1)."""
        return self.description.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, by which the input is divided."""
        return self.description.std

    def __call__(self, images: Any) -> Tensor:
        """Preprocess one picture or a list of them, of any size.

        Args:
            images: PIL images, encoded images (bytes), paths of files, or uint8 arrays (H, W) or (H, W, channels); for
                grids, arrays (channels, H, W) or the bytes or path of a .npy file. A 4-D array is a batch.

        Returns:
            (B, channels, H, W), float32 on the CPU.

        Raises:
            UserError: a picture cannot be used.
        """
        several = isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4)
        items = list(images) if several else [images]
        out, errors = load_received([self._plain(item) for item in items], self.description)
        for number, error in enumerate(errors, 1):
            if error is not None:
                raise UserError(f"image {number} of {len(items)} cannot be used: {error}")
        return self._normalizer(out)

    def _plain(self, item: Any) -> Any:
        """Bytes or an array of a picture."""
        if isinstance(item, str | Path):
            try:
                return read_small(Path(item), MAX_MEMBER_BYTES)
            except OSError as error:
                raise UserError(f"{item} cannot be read: {error.strerror or error}") from None
        channels = self.description.model.channels
        if isinstance(item, Image.Image):
            upright = ImageOps.exif_transpose(item)
            return np.asarray(to_eight_bits(upright).convert("L" if channels == 1 else "RGB")).reshape(
                upright.height, upright.width, -1
            )
        if isinstance(item, np.ndarray) and item.ndim == 2 and self.description.kind == "image":
            return np.repeat(item[:, :, None], channels, axis=2)
        return item


@torch.no_grad()
def pooled_features(model: MaskedAutoencoder, images_BCHW: Tensor, points: Sequence[FeaturePoint]) -> list[Tensor]:
    """Compute features of normalised images in one pass, holding the tokens of one layer at a time.

    They are (B, dim), or (B, patches, dim) for the feature 'patch'.

    Raises:
        UserError: the encoder does not have a layer.
    """
    depth = len(model.encoder)
    if beyond := [point.layer for point in points if point.layer is not None and not 1 <= point.layer <= depth]:
        raise UserError(f"there is no encoder layer {beyond[0]}; the model's layers are 1 to {depth}")

    def pool(z_BTD: Tensor, feature: ExportFeature) -> Tensor:
        if feature == "cls":
            return z_BTD[:, 0]
        return z_BTD[:, 1:].mean(1) if feature == "mean" else z_BTD[:, 1:]

    found: dict[FeaturePoint, Tensor] = {}
    z_BTD, _ = model.embed(images_BCHW)
    for number, layer in enumerate(model.encoder, 1):
        z_BTD = layer(z_BTD)
        found |= {point: pool(z_BTD, point.feature) for point in points if point.layer == number}
    if any(point.layer is None for point in points):
        z_BTD = model.encoder_norm(z_BTD)
        found |= {point: pool(z_BTD, point.feature) for point in points if point.layer is None}
    return [found[point].float() for point in points]


def load_all(items: Sequence[bytes | NDArray[Any]], description: ModelDescription) -> Tensor:
    """Decode images into a batch (n, channels, H, W) for a model.

    Each image is cut to the largest centre crop with the model's aspect ratio and resized, as in evaluation.

    Args:
        items: encoded images (for grids, .npy files), or arrays: (H, W, channels) uint8 images or (channels, H, W)
            grids.
        description: the model's description.

    Raises:
        DecodeError: an item cannot be decoded.
    """
    out, errors = load_images(items, description)
    for error in errors:
        if error is not None:
            raise error
    return out


def load_received(values: Sequence[Any], description: ModelDescription) -> tuple[Tensor, list[DecodeError | None]]:
    """As `load_images`, for images as clients send them; see `received_image`."""
    items: list[bytes | memoryview | NDArray[Any]] = []
    refused: list[DecodeError | None] = []
    for value in values:
        try:
            items.append(received_image(value, description.kind))
            refused.append(None)
        except DecodeError as error:
            items.append(b"")
            refused.append(error)
    images, errors = load_images(items, description)
    return images, [error or other for error, other in zip(refused, errors, strict=True)]


def load_images(
    items: Sequence[bytes | memoryview | NDArray[Any]], description: ModelDescription, threads: int = 1
) -> tuple[Tensor, list[DecodeError | None]]:
    """As `load_all`, but returns the error of each item that cannot be decoded; its slot in the batch is undefined."""
    config, kind = description.model, description.kind
    out = torch.empty(
        len(items), config.channels, *config.image_hw, dtype=torch.float32 if kind == "grid" else torch.uint8
    )

    def centre(heights: Int64, widths: Int64) -> Crops:
        return centre_crops(heights, widths, config.image_hw)

    def decode(rows: slice) -> list[DecodeError | None]:
        return decode_batch(items[rows], kind, centre, out[rows])

    if threads == 1:
        return out, decode(slice(None))
    size = max(1, -(-len(items) // threads))
    with ThreadPoolExecutor(threads, "decode") as pool:
        parts = pool.map(decode, [slice(start, start + size) for start in range(0, len(items), size)])
        return out, [error for part in parts for error in part]
