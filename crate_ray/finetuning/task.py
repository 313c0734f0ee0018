"""The fine-tuning task: trains a classifier on augmented and mixed images, and measures its held-out accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_ray.config import FinetuneConfig
from crate_ray.data.batch import Batch
from crate_ray.data.order.sequence import worker_slots
from crate_ray.finetuning.batches import PAIR, TrainingBatches
from crate_ray.finetuning.measure import measure_accuracy
from crate_ray.finetuning.optim import build_layerwise_optimizer
from crate_ray.models.classifier import Classifier, Targets
from crate_ray.runs.metrics import TOP1, TOP5, VALIDATION_LOSS
from crate_ray.runs.record import RunRecord
from crate_ray.training.task import Task, WorkerContext

_MOST_AT_ONCE = 256  # most samples in a validation batch


class FinetuneTask(Task):
    """Trains a classifier on augmented images and mixed targets."""

    config_class = FinetuneConfig
    model: Classifier

    def __init__(self, config: FinetuneConfig, context: WorkerContext) -> None:
        assert context.record.finetune is not None
        self._config, self._context = config, context
        self.model = new_classifier(context.record, config.seed).to(context.device)
        self.model.autoencoder.checkpoint_layers = config.training.activation_checkpointing
        self.model.autoencoder.bf16_tokens = config.training.bf16_tokens
        self.layers = list(self.model.encoder)
        self.image_model = context.record.finetune.encoder
        self.together = PAIR if config.mixes else 1
        self._num_classes = context.record.finetune.classifier.num_classes
        slots = worker_slots(config.training.batch_size, context.rank, context.world_size, self.together)
        self._make_inputs = TrainingBatches(config, self._num_classes, self.model.branches, context.normalizer, slots)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The settings' optimizer with layer-wise decay: layers closer to the input get smaller learning rates."""
        return build_layerwise_optimizer(self.model, self._config.optim, self._config.layer_decay)

    def inputs(self, batch: Batch) -> tuple[Tensor, Targets]:
        """Augment, mix and normalise a batch. Returns the images and their targets."""
        return self._make_inputs(batch)

    def blank(self, count: int) -> tuple[Tensor, Targets]:
        """Images and targets of zeros, for `count` samples; with drop path if training has it."""
        encoder, device = self.image_model, self._context.device
        images = torch.zeros(count, encoder.channels, *encoder.image_hw, device=device)
        # Layers with drop path are other programs for the compiler.
        scales = torch.ones(count, sum(self.model.branches), device=device) if self._config.drop_path else None
        return images, Targets(torch.zeros(count, self._num_classes, device=device), scales)

    def validate(self, bad: dict[str, str] | None = None) -> dict[str, float]:
        """Cross entropy, top-1 and top-5 accuracy on the held-out samples."""
        context = self._context
        assert context.validation is not None
        accuracy = measure_accuracy(
            self.model,
            context.validation,
            self._config.data,
            context.normalizer,
            batch_size=min(self._config.training.micro_batch_size or _MOST_AT_ONCE, _MOST_AT_ONCE),
            autocast=context.autocast,
            rank=context.rank,
            world_size=context.world_size,
            bad=bad,
        )
        return {VALIDATION_LOSS: accuracy.validation_loss, TOP1: accuracy.top1, TOP5: accuracy.top5}


def new_classifier(record: RunRecord, seed: int) -> Classifier:
    """Build the classifier of a fine-tuning run with random weights from a seed."""
    assert record.finetune is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(record.finetune.encoder, record.finetune.classifier)
