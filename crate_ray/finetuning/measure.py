"""Cross entropy and accuracy of a classifier on held-out samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from crate_ray.config import DataConfig
from crate_ray.data.format.classes import class_name, new_numbers, renumber
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import evaluation_loader
from crate_ray.errors import UserError
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
    """Share of samples whose class has one of the five highest scores."""


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
    """Accuracy over a labelled dataset: every good sample once, centre-cropped. A collective call.

    The dataset's classes are matched with the classifier's by name (see data/format/classes.py).

    Args:
        model: the classifier.
        shards: the dataset.
        data: budgets and threads.
        normalizer: normalisation of the images, on the device to compute on.
        batch_size: samples per worker and step.
        autocast: precision of the forward pass.
        rank, world_size: this worker, and the number of workers.
        bad: filled with the cause of each bad sample, by key.

    Raises:
        UserError: the dataset has no labels, or samples of classes that the classifier does not know.
    """
    manifest, uri = shards.manifest, shards.storage.uri
    if manifest.num_classes is None:
        raise UserError(f"not every sample of {uri} has a class (a member `cls` with its number); give labelled data")
    numbers = new_numbers(model.config.classes, manifest, uri, "the classifier")
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
                        model(nothing)  # the forward pass of a sharded model is a collective call
                    continue
                scores_BC = model(normalizer(batch.images)).scores
            assert batch.labels is not None
            own_B = renumber(batch.labels, numbers)
            if len(unknown := batch.labels[(own_B < 0) | (own_B >= model.config.num_classes)]):
                raise UserError(
                    f"{uri} has samples of class {class_name(manifest, int(unknown[0]))}, which the classifier does "
                    "not know; give data with the classes that it was trained on"
                )
            labels_B = torch.from_numpy(own_B).to(device)
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
