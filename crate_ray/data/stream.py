"""Batches for a training loop of one's own: no Ray, no MLflow, under any launcher.

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
    """Augmented training batches of one worker; together the workers see the same batches whatever their number.

    Args:
        train: local folder or s3://bucket/prefix, prepared by crate-ray prepare; or several with their shares of every
            batch, {"s3://data/photos": 3, "s3://data/drawings": 1}.
        batch_size: samples per step over all workers; worker w gets slots [w·B/W, (w+1)·B/W).
        image_size: pixels of the side, or (height, width).
        channels: 3 for RGB, 1 for grayscale, any number for grids.
        steps: where to end; by default never: epoch follows epoch.
        seed: of order and augmentation.
        rank: this worker, from 0.
        world_size: number of workers.
        device: where batches are to be; they arrive there ahead of use.
        planned_workers: number of workers that the sizes of windows are planned for; the order depends on it where data
            is larger than memory_bytes, so keep it when a run goes on with another number of workers. Default: 1.
        s3: object storage.
        data: any other field of config.DataConfig, such as crop_scale=(0.2, 1) or cache_dir="/scratch/cache".

    Raises:
        UserError: no such dataset, or it holds fewer samples than a batch.
        pydantic.ValidationError: an unknown or wrong setting.
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
