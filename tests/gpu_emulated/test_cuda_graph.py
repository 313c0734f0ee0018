"""Steps in a CUDA graph: the numbers of plain steps, also with new inputs and learning rates, and no waiting."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from crate_ray.config import ClassifierConfig, CrateMAEConfig, ModelConfig, OptimConfig
from crate_ray.finetuning.optim import build_layerwise_optimizer
from crate_ray.models import build_model
from crate_ray.models.classifier import Classifier, Targets
from crate_ray.training.cuda_graph import GraphedStep, Step
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.step import train_step
from tests.gpu_emulated.device import recorded, syncs
from tests.gpu_emulated.test_step import BATCH, CRATE, MODELS

LEARNING_RATES = (1e-3, 2e-3, 5e-4, 1e-4)
CLASSES = 3
OPTIM = OptimConfig(eps=1e-2)


def inputs(config: ModelConfig, step: int) -> tuple[Tensor, Tensor]:
    """Images and noise of a step; those of the second step are not finite."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=random)
    return images * (math.nan if step == 1 else 1), torch.rand(BATCH, config.num_patches, generator=random)


def train(
    config: ModelConfig, graphed: bool, autocast: torch.dtype | None = None, optim: OptimConfig = OPTIM
) -> tuple[list[Any], list[Any]]:
    """Results and weights of steps on the device, and where the host waited."""
    torch.manual_seed(0)
    model = build_model(config).to("cuda")
    optimizer = build_optimizer(model, optim)
    step: Step = partial(
        train_step, model, optimizer, batch_size=BATCH, micro_steps=2, clip_norm=1.0, autocast=autocast
    )
    step = GraphedStep(step, optimizer) if graphed else step
    values: list[Any] = []
    waits: list[Any] = []
    for number, lr in enumerate(LEARNING_RATES):
        given = [tensor.to("cuda") for tensor in inputs(config, number)]
        with recorded() as events:
            values += step(*given, lr=lr)
        waits += syncs(events)
    assert all(group.get("capturable", False) == graphed for group in optimizer.param_groups)
    return [*values, *model.state_dict().values(), *(s["step"] for s in optimizer.state.values() if "step" in s)], waits


CASES = [pytest.param(config, None, OPTIM, id=name) for name, config in MODELS.items()]
CASES.append(pytest.param(CRATE, torch.bfloat16, OPTIM, id="crate_mae in bf16"))
CASES.append(pytest.param(CRATE, None, OptimConfig(optimizer="lion"), id="crate_mae with Lion"))


@pytest.mark.parametrize(("config", "autocast", "optim"), CASES)
def test_graphed_steps_give_the_numbers_of_plain_ones(
    config: ModelConfig, autocast: torch.dtype | None, optim: OptimConfig
) -> None:
    expected, _ = train(config, graphed=False, autocast=autocast, optim=optim)
    found, waits = train(config, graphed=True, autocast=autocast, optim=optim)
    assert waits == []
    # The graph's learning rate is an fp32 tensor.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_classifiers_targets_and_layerwise_rates_are_those_of_each_step() -> None:
    config = CrateMAEConfig(image_size=16, patch_size=4, dim=32, depth=2, num_subspaces=4)
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = Classifier(config, ClassifierConfig(num_classes=CLASSES)).to("cuda")
        optimizer = build_layerwise_optimizer(model, OPTIM, 0.5)
        step: Step = partial(train_step, model, optimizer, batch_size=BATCH)
        step = GraphedStep(step, optimizer) if graphed else step
        values: list[Any] = []
        for number, lr in enumerate(LEARNING_RATES):
            random = torch.Generator().manual_seed(number)
            classes = torch.rand(BATCH, CLASSES, generator=random).softmax(1).cuda()
            scales = torch.randint(0, 2, (BATCH, sum(model.branches)), generator=random).float().cuda()
            images = torch.randn(BATCH, 3, 16, 16, generator=random).cuda()
            values += step(images, Targets(classes, scales), lr=lr)
        results.append([*values, *model.state_dict().values()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_a_step_that_cannot_be_captured_runs_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(CRATE).to("cuda")
    optimizer = build_optimizer(model, OPTIM)

    def waiting(images: Tensor, given: Any, *, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        loss, norm = train_step(model, optimizer, images, given, batch_size=BATCH, lr=lr)
        loss.item()
        return loss, norm

    step = GraphedStep(waiting, optimizer)
    before = [weight.clone() for weight in model.parameters()]
    with caplog.at_level(logging.WARNING):
        for number in (0, 2):
            loss, _ = step(*(tensor.cuda() for tensor in inputs(CRATE, number)), lr=1e-3)
    assert loss.isfinite() and not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [record.message.partition("(")[0] for record in caplog.records] == [
        "the step cannot be captured in a CUDA graph, training continues without "
    ]
