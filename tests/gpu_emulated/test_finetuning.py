"""Fine-tuning steps on the device with all augmentation: the CPU's numbers, and the host never waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crate_ray.config import ClassifierConfig, CrateMAEConfig, FinetuneConfig
from crate_ray.data.batch import Batch
from crate_ray.finetuning.batches import TrainingBatches
from crate_ray.finetuning.optim import build_layerwise_optimizer
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import Normalizer
from crate_ray.training.step import train_step
from tests.gpu_emulated.device import recorded, syncs

BATCH, CLASSES = 8, 5
ENCODER = CrateMAEConfig(image_size=32, patch_size=8, dim=32, depth=2, num_subspaces=4)


def train(device: str) -> tuple[list[Tensor], list[Any]]:
    """Three steps: inputs, losses and gradient norms, and where the host waited."""
    config = FinetuneConfig.model_validate(
        {
            "model": "x",
            "data": {"train": "x"},
            "recipe": "mae",
            "drop_path": 0.2,
            "label_smoothing": 0.1,
            "augment": {"randaugment": 3, "mixup": 0.8, "cutmix": 1.0},
        }
    )
    torch.manual_seed(0)
    model = Classifier(ENCODER, ClassifierConfig(num_classes=CLASSES, pooling="mean"))
    model = model.to(device)
    optimizer = build_layerwise_optimizer(model, config.optim.model_copy(update={"eps": 1e-2}), 0.75)
    make_inputs = TrainingBatches(
        config, CLASSES, model.branches, Normalizer.of((0.5,) * 3, (0.2,) * 3, device), (0, BATCH)
    )
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=random)
    numbers = np.arange(BATCH)
    values, waits = [], []
    for step in range(3):
        on_device = images.to(device)
        with recorded() as events:
            batch = Batch(step, numbers * 0 + step, on_device, numbers, ["k"] * BATCH, numbers % CLASSES)
            inputs, targets = make_inputs(batch)
            values += [inputs, *train_step(model, optimizer, inputs, targets, batch_size=BATCH, lr=1e-3)]
        waits += syncs(events)
    return values, waits


def test_fine_tuning_gives_the_numbers_of_the_cpu_without_waiting() -> None:
    expected, _ = train("cpu")
    found, waits = train("cuda")
    assert waits == []
    torch.testing.assert_close([value.cpu() for value in found], expected, rtol=1e-5, atol=1e-5)
