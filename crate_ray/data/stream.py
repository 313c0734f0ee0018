"""Batches for your own training loop. This needs neither Ray nor MLflow, and works with any launcher.

with stream("s3://bucket/train", batch_size=256, image_size=224, rank=rank, world_size=world_size) as batches:
    for batch in batches:
        train(batch.images)              # (n, 3, 224, 224) uint8
        checkpoint["data"] = batches.state_dict()
"""

from __future__ import annotations

from typing import Any

import torch

from crate_ray.config import DataConfig, ImageModelConfig, S3Config
from crate_ray.data.loader import Loader, training_loader
from crate_ray.data.order.plan import plan_order
from crate_ray.data.read.mixture import open_mixture

_FOREVER = 2**62


def stream(
    train: str | dict[str, float],
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    channels: int = 3,
    steps: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    planned_workers: int | None = None,
    s3: S3Config | None = None,
    **data: Any,
) -> Loader:
    """Augmented training batches for one worker. The global batches do not depend on the number of workers.

    Args:
        train: local folder or s3://bucket/prefix, prepared by crate-ray prepare; or several with their shares of every
            batch, {"s3://data/photos": 3, "s3://data/drawings": 1}.
        batch_size: samples per step over all workers; worker w gets slots [w·B/W, (w+1)·B/W).
        image_size: pixels of the side, or (height, width).
        channels: 3 for RGB, 1 for grayscale, any number for grids.
        steps: number of steps; by default, epochs follow each other without end.
        seed: seed of order and augmentation.
        rank: this worker, from 0.
        world_size: number of workers.
        device: where to put batches; they are copied ahead of use.
        planned_workers: number of workers for which window sizes are planned, by default 1. If the data is larger than
            memory_bytes, the order depends on this number, so do not change it if you resume with other workers.
        s3: object storage.
        data: any other field of config.DataConfig, such as crop_scale=(0.2, 1) or cache_dir="/scratch/cache".

    Raises:
        UserError: there is no such dataset, or it has fewer samples than a batch.
        pydantic.ValidationError: a setting is unknown or invalid.
    """
    config = DataConfig(train=train, **data)
    mixture = open_mixture(config.train, s3 or S3Config())
    order = plan_order(mixture, config, batch_size=batch_size, seed=seed, workers=planned_workers or 1)
    image = ImageModelConfig(image_size=image_size, patch_size=1, channels=channels, mask_ratio=0)
    end = _FOREVER if steps is None else steps
    return training_loader(
        mixture,
        order,
        image,
        config,
        steps=range(end),
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
    )
