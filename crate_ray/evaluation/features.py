"""Feature points that probes use, raw pixels as the control, and iteration over a dataset's samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import DataConfig, Feature, ModelConfig
from crate_ray.data.batch import Batch
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import evaluation_loader
from crate_ray.data.order.sequential import stride_of
from crate_ray.serving import FeaturePoint

PIXELS = "raw pixels"
_BATCH = 256
_PIXEL_SIDE = 16


def all_feature_points(depth: int) -> list[FeaturePoint]:
    """Both kinds of features, of every encoder layer and after the last norm."""
    features: tuple[Feature, ...] = ("mean", "cls")
    return [FeaturePoint(feature, layer) for layer in [*range(1, depth + 1), None] for feature in features]


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """The input itself, averaged to 16 × 16 if it is larger: (B, channels · height · width)."""
    height, width = images_BCHW.shape[2:]
    return F.adaptive_avg_pool2d(images_BCHW.float(), _pixel_hw((height, width))).flatten(1)


def pixels_title(model: ModelConfig) -> str:
    """Title of `pixel_features` in reports."""
    height, width = _pixel_hw(model.image_hw)
    return PIXELS if (height, width) == model.image_hw else f"{PIXELS} averaged to {height} × {width}"


def _pixel_hw(image_hw: tuple[int, int]) -> tuple[int, int]:
    return min(image_hw[0], _PIXEL_SIDE), min(image_hw[1], _PIXEL_SIDE)


def compute_device(gpu: bool | None) -> torch.device:
    """A GPU if this process has one and the setting `gpu` does not forbid it, else the CPU."""
    return torch.device("cuda" if gpu is not False and torch.cuda.is_available() else "cpu")


def spread(num_samples: int, max_samples: int | None) -> NDArray[np.int64]:
    """Numbers of at most max_samples samples, spread evenly over a dataset."""
    return np.arange(0, num_samples, stride_of(num_samples, max_samples), dtype=np.int64)


def iterate_dataset(shards: ShardSet, config: ModelConfig, max_samples: int | None = None) -> Iterator[Batch]:
    """Iterate over a dataset in order, centre-cropped: at most max_samples samples, spread evenly over it."""
    data = DataConfig(train=shards.storage.uri)
    with evaluation_loader(shards, config, data, batch_size=_BATCH, max_samples=max_samples) as loader:
        yield from loader
