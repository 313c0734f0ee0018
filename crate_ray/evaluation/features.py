"""Images to embeddings: the frozen encoder with its preprocessing, for probes, the registry and embedding jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import DataConfig, Feature, ModelConfig
from crate_ray.data.decode import decode_batch
from crate_ray.data.loader import Batch, evaluation_loader
from crate_ray.data.shards import ShardSet
from crate_ray.data.transforms import Crops, Int64, centre_crops
from crate_ray.models import MaskedAutoencoder
from crate_ray.training.export import ModelDescription, load_exported
from crate_ray.training.step import Normalizer

_BATCH = 256


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
        tokens = self.model.encode(self._normalizer(images_BCHW.to(self._device))).tokens
        return (tokens[:, 1:].mean(1) if self.feature == "mean" else tokens[:, 0]).float().cpu()

    def load(self, items: Sequence[bytes | NDArray[Any]]) -> Tensor:
        """Encoded images (or .npy grids), or arrays (H, W, channels) uint8 / (channels, H, W) float, as a batch.

        Each is cut to its largest centre crop with the model's aspect ratio and resized, as in evaluation. Raises
        DecodeError for what is not an image.
        """
        config, kind = self.description.model, self.description.kind
        dtype = torch.float32 if kind == "grid" else torch.uint8
        out = torch.empty(len(items), config.channels, *config.image_hw, dtype=dtype)

        def centre(heights: Int64, widths: Int64) -> Crops:
            return centre_crops(heights, widths, config.image_hw)

        for error in decode_batch(items, kind, centre, out):
            if error is not None:
                raise error
        return out


def iterate_dataset(shards: ShardSet, config: ModelConfig, max_samples: int | None = None) -> Iterator[Batch]:
    """Batches of a dataset in its order, centre-cropped, of at most max_samples samples spread evenly over it."""
    total = shards.manifest.num_samples
    stride = 1 if max_samples is None else -(-total // max_samples)
    with evaluation_loader(shards, config, DataConfig(train=shards.storage.uri), batch_size=_BATCH) as loader:
        for batch in loader:
            keep = batch.samples % stride == 0
            if keep.any():
                yield batch.select(keep)
