"""From the loader's batches to the inputs of a training step: augmented, mixed images and their targets."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_ray.config import FinetuneConfig
from crate_ray.data.batch import Batch
from crate_ray.data.device import to_device
from crate_ray.finetuning.augment import RandAugmentation
from crate_ray.finetuning.mixing import branch_scales, class_targets, draw_mix, mix_pairs
from crate_ray.models.classifier import Targets
from crate_ray.models.exported import Normalizer

PAIR = 2  # samples that are mixed with each other; they must be on one worker


class TrainingBatches:
    """Builds a worker's inputs of a step.

    All random numbers are functions of (seed, step, slot) or (seed, epoch, sample). So a global batch does not depend
    on the number of workers, and is the same after a resume.

    Args:
        config: settings of the run.
        num_classes: C.
        branches: number of residual branches of each layer, for drop path.
        normalizer: of the run; everything is computed on its device.
        slots: the half-open range of the global batch's slots that this worker computes; pairs are whole.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        num_classes: int,
        branches: list[int],
        normalizer: Normalizer,
        slots: tuple[int, int],
    ) -> None:
        self._config, self._num_classes, self._branches = config, num_classes, branches
        self._normalizer, self._slots = normalizer, slots
        augment = config.augment
        self._augment = None
        if augment.randaugment:
            self._augment = RandAugmentation(augment.randaugment, augment.magnitude, config.seed)

    def __call__(self, batch: Batch) -> tuple[Tensor, Targets]:
        """Normalised images (B, channels, H, W) and their targets."""
        assert batch.labels is not None  # checked when the run was opened
        config, device = self._config, self._normalizer.mean.device
        images = batch.images
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self._augment is not None:
            images = self._augment(images, batch.epochs, batch.samples)
        images = self._normalizer(images)
        classes = to_device(class_targets(batch.labels, self._num_classes, config.label_smoothing), device)
        mix = draw_mix(config.seed, batch.step, config.augment, (images.shape[2], images.shape[3]))
        images, classes = mix_pairs(images, classes, mix)
        scales = branch_scales(config.seed, batch.step, self._slots, self._branches, config.drop_path)
        return images, Targets(classes, None if scales is None else to_device(scales, device))
