"""Pretraining as a task: masked images in, masked loss out, with a look at a few fixed samples now and then."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray.config import PretrainConfig
from crate_ray.data.device import to_device
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import Batch, evaluation_loader
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import Normalizer
from crate_ray.models.flops import training_flops
from crate_ray.training.parallel import is_sharded
from crate_ray.training.probe_batch import Look, ProbeBatch
from crate_ray.training.step import build_optimizer, largest_micro_batch, mask_noise, probe_noise
from crate_ray.training.task import Place, Task


class PretrainTask(Task):
    """A masked autoencoder on images and mask noise."""

    config_class = PretrainConfig
    model: MaskedAutoencoder

    def __init__(self, config: PretrainConfig, place: Place) -> None:
        self._config, self._place = config, place
        torch.manual_seed(config.seed)
        self.model = build_model(config.model).to(place.device)
        self.model.checkpoint_layers = config.training.activation_checkpointing
        self.layers = [*self.model.encoder, *self.model.decoder]
        self.image_model = config.model
        images = largest_micro_batch(config.training, place.world_size)
        self.flops_per_image = training_flops(config.model, images) / images
        self.look_every = config.tracking.picture_every

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return build_optimizer(self.model, self._config.optim)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised images and mask noise."""
        order, num_patches = self._place.record.order, self._config.model.num_patches
        noise = mask_noise(order.seed, batch.epochs, batch.samples, num_patches)
        return self._place.normalizer(batch.images), to_device(noise, self._place.device)

    def blank(self, count: int) -> tuple[Tensor, Tensor]:
        """Black images, and noise that hides the last patches."""
        model, device = self._config.model, self._place.device
        images = torch.zeros(count, model.channels, *model.image_hw, device=device)
        return images, torch.zeros(count, model.num_patches, device=device)

    def validate(self, bad: dict[str, str] | None = None) -> dict[str, float]:
        """The masked loss."""
        place = self._place
        assert place.validation is not None
        loss = validation_loss(
            self.model,
            place.validation,
            self._config,
            place.normalizer,
            place.autocast,
            place.rank,
            place.world_size,
            bad,
        )
        return {"validation_loss": loss}

    def look(self, step: int) -> Look:
        """Measures by layer and pictures."""
        return self._probe.look(self.model, step)

    @cached_property
    def _probe(self) -> ProbeBatch:
        place = self._place
        shards = place.validation or place.mixture.datasets[0]
        return ProbeBatch(shards, self._config.model, self._config.data, place.normalizer)


@torch.no_grad()
def validation_loss(
    model: MaskedAutoencoder,
    validation: ShardSet,
    config: PretrainConfig,
    normalizer: Normalizer,
    autocast: torch.dtype | None,
    rank: int = 0,
    world_size: int = 1,
    bad: dict[str, str] | None = None,
) -> float:
    """Mean masked loss over every usable held-out sample exactly once, each with one fixed mask. A collective call.

    `bad` takes up the samples that cannot be used: cause by key.
    """
    device = normalizer.mean.device
    batch_size = min(config.training.micro_batch_size or config.training.batch_size, 256) * world_size
    total = torch.zeros(2, device=device, dtype=torch.float64)  # sum of losses, number of samples
    nothing = torch.zeros(1, config.model.channels, *config.model.image_hw, device=device)
    model.eval()
    with evaluation_loader(
        validation,
        config.model,
        config.data,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        device=device,
        causes=bad,
    ) as loader:
        for batch in loader:
            if not len(batch.samples) and not is_sharded(model):
                continue
            noise = probe_noise(batch.samples, config.model.num_patches).to(device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                if not len(batch.samples):
                    model(nothing, noise.new_zeros(1, config.model.num_patches))  # the other workers wait for it
                    continue
                output = model(normalizer(batch.images), noise)
            total[0] += output.sample_loss.double().sum()
            total[1] += len(batch.samples)
    model.train()
    if world_size > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()
