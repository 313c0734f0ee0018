"""How well a classifier does on held-out samples: cross entropy, top-1 and top-5 accuracy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from crate_ray.config import DataConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import evaluation_loader
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import Normalizer
from crate_ray.training.parallel import is_sharded

_TOP = 5


class Accuracy(NamedTuple):
    """Means over samples."""

    validation_loss: float
    """Cross entropy with the plain labels."""
    top1: float
    """Share of samples whose class has the highest score."""
    top5: float
    """Share of samples whose class is among the five highest scores."""


@torch.no_grad()
def measure_accuracy(
    model: Classifier,
    shards: ShardSet,
    data: DataConfig,
    normalizer: Normalizer,
    *,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    bad: dict[str, str] | None = None,
) -> Accuracy:
    """Accuracy over every usable sample of a labelled dataset exactly once, centre-cropped. A collective call.

    batch_size is each worker's; `bad` takes up the samples that cannot be used: cause by key.
    """
    device, config = normalizer.mean.device, model.encoder_config
    total = torch.zeros(4, device=device, dtype=torch.float64)  # loss, top-1, top-5, number of samples
    nothing = torch.zeros(1, config.channels, *config.image_hw, device=device)
    was_training = model.training
    model.eval()
    with evaluation_loader(
        shards,
        config,
        data,
        batch_size=batch_size * world_size,
        rank=rank,
        world_size=world_size,
        device=device,
        causes=bad,
    ) as loader:
        for batch in loader:
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                if not len(batch.samples):
                    if is_sharded(model):
                        model(nothing)  # the other workers wait for it
                    continue
                scores_BC = model(normalizer(batch.images)).scores
            assert batch.labels is not None
            labels_B = torch.from_numpy(batch.labels).to(device)
            ranked_B5 = scores_BC.topk(min(_TOP, scores_BC.shape[1])).indices == labels_B[:, None]
            total[0] += F.cross_entropy(scores_BC, labels_B, reduction="sum").double()
            total[1] += ranked_B5[:, 0].sum()
            total[2] += ranked_B5.sum()
            total[3] += len(labels_B)
    model.train(was_training)
    if world_size > 1:
        dist.all_reduce(total)
    loss, top1, top5 = (total[:3] / total[3]).tolist()
    return Accuracy(loss, top1, top5)
