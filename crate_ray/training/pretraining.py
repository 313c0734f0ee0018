"""The pretraining task: trains a masked autoencoder on masked images, and regularly probes it on fixed samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray.config import PretrainConfig
from crate_ray.data.batch import Batch
from crate_ray.data.device import to_device
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import evaluation_loader
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import Normalizer
from crate_ray.models.flops import training_flops
from crate_ray.runs.metrics import VALIDATION_LOSS
from crate_ray.training.compilation import eager_layers
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.parallel import is_sharded, whole_weights
from crate_ray.training.probe_batch import ProbeBatch, ProbeResult
from crate_ray.training.step import largest_micro_batch, mask_noise, probe_noise
from crate_ray.training.task import Task, WorkerContext


class PretrainTask(Task):
    """Trains a masked autoencoder on images and mask noise."""

    config_class = PretrainConfig
    model: MaskedAutoencoder

    def __init__(self, config: PretrainConfig, context: WorkerContext) -> None:
        self._config, self._context = config, context
        torch.manual_seed(config.seed)
        self.model = build_model(config.model).to(context.device)
        self.model.checkpoint_layers = config.training.activation_checkpointing
        self.model.bf16_tokens = config.training.bf16_tokens
        self.layers = [*self.model.encoder, *self.model.decoder]
        self.image_model = config.model
        images = largest_micro_batch(config.training, context.world_size)
        self.flops_per_image = training_flops(config.model, images) / images
        self.probe_every = config.tracking.picture_every
        self.measure_every = config.probe.every if config.probe else None

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the settings."""
        return build_optimizer(self.model, self._config.optim)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised images and mask noise."""
        order, num_patches = self._context.record.order, self._config.model.num_patches
        noise = mask_noise(order.seed, batch.epochs, batch.samples, num_patches)
        return self._context.normalizer(batch.images), to_device(noise, self._context.device)

    def blank(self, count: int) -> tuple[Tensor, Tensor]:
        """Images of zeros, and noise that masks the last patches."""
        model, device = self._config.model, self._context.device
        images = torch.zeros(count, model.channels, *model.image_hw, device=device)
        return images, torch.zeros(count, model.num_patches, device=device)

    def validate(self, bad: dict[str, str] | None = None) -> dict[str, float]:
        """The masked loss."""
        context = self._context
        assert context.validation is not None
        loss = validation_loss(
            self.model,
            context.validation,
            self._config,
            context.normalizer,
            context.autocast,
            context.rank,
            context.world_size,
            bad,
        )
        return {VALIDATION_LOSS: loss}

    def probe(self, step: int) -> Callable[[], ProbeResult] | None:
        """Measures by layer and pictures."""
        model = self.model
        if is_sharded(model):
            weights = whole_weights(model)
            if self._context.rank != 0:
                return None
            model = self._replica
            model.load_state_dict(weights)
        with eager_layers(self.layers):
            seen = self._probe_batch.observe(model, step)
        return partial(self._probe_batch.draw, seen)

    @cached_property
    def _replica(self) -> MaskedAutoencoder:
        """A model on this device alone, for the weights of a sharded one."""
        with torch.random.fork_rng(devices=[]):
            return build_model(self._config.model).to(self._context.device)

    @cached_property
    def _probe_batch(self) -> ProbeBatch:
        context = self._context
        shards = context.validation or context.mixture.datasets[0]
        run = context.run if context.rank == 0 else None
        return ProbeBatch(shards, self._config.model, self._config.data, context.normalizer, run)


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
    """Mean masked loss over all usable held-out samples, each with one fixed mask. A collective call.

    Adds unusable samples to `bad`: cause by key.
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
