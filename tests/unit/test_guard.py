"""Steps that are not finite change nothing and are counted; jumps of the loss are found; time shares are right."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.config import CrateMAEConfig, OptimConfig, OptimizerName
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.runs import metrics
from crate_ray.training.guard import Guard
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.step import mask_noise, train_step
from crate_ray.training.telemetry import StepLog, Stopwatch

CONFIG = CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=1)


@pytest.mark.parametrize("poison", ["nan image", "infinite image", "loss alone"])
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
@pytest.mark.parametrize("hit_at", [0, 2])  # before and after the optimizer has moments
def test_a_step_that_is_not_finite_changes_nothing(
    poison: str, micro_steps: int, optimizer: OptimizerName, hit_at: int
) -> None:
    def train(poisoned: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
        torch.manual_seed(0)
        model = build_model(CONFIG)
        built = build_optimizer(model, OptimConfig(optimizer=optimizer))
        norms = []
        for step in range(4):
            if step == hit_at and not poisoned:
                continue
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            noise = mask_noise(0, np.full(4, step), np.arange(4), CONFIG.num_patches)
            trained: torch.nn.Module = model
            if step == hit_at:
                if poison == "loss alone":
                    trained = InfiniteLoss(model)
                else:
                    images[-1, 0, 0, 0] = math.nan if poison == "nan image" else math.inf
            _, norm = train_step(
                trained, built, images, noise, batch_size=4, micro_steps=micro_steps, lr=0.1, clip_norm=1.0
            )
            norms.append(norm.item())
        state = {f"{i}/{name}": value for i, s in built.state_dict()["state"].items() for name, value in s.items()}
        return model.state_dict() | state, norms

    calm, calm_norms = train(poisoned=False)
    hit, hit_norms = train(poisoned=True)
    assert [math.isfinite(norm) for norm in hit_norms] == [step != hit_at for step in range(4)]
    assert all(map(math.isfinite, calm_norms))
    assert all(torch.equal(calm[name], hit[name]) for name in calm) and calm.keys() == hit.keys()


class InfiniteLoss(torch.nn.Module):
    """A model whose loss overflows while its gradient does not."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> object:
        output = self.model(images, noise)
        return output._replace(sample_loss=output.sample_loss + math.inf)


@given(
    finite=st.lists(st.booleans(), min_size=1, max_size=60),
    most=st.integers(0, 5),
    cuts=st.lists(st.integers(1, 7), min_size=60, max_size=60),
)
def test_skipped_steps_are_counted_and_too_many_in_a_row_stop_the_run(
    finite: list[bool], most: int, cuts: list[int]
) -> None:
    """However the steps are cut into log intervals."""
    bad_runs = "".join(" " if f else "x" for f in finite).split()
    longest = max(map(len, bad_runs), default=0)
    guard, skipped, done = Guard(most), [], 0
    expected = (
        pytest.raises(UserError, match=f"^the last {most + 1} steps up to step") if longest > most else nullcontext()
    )
    with expected:
        for cut in cuts:
            part = finite[done : done + cut]
            losses = [1.0 if good else math.nan for good in part]
            norms = [1.0 if good or i % 2 else math.inf for i, good in enumerate(part)]
            report = guard.check(done + 1, losses, norms)
            assert report.loss == (1.0 if any(part) else None)
            skipped += report.skipped
            done += len(part)
        assert skipped == [step for step, good in enumerate(finite, 1) if not good]


def test_a_jump_of_the_loss_is_a_spike_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    falling = 0.5 + np.exp(-np.arange(400) / 50) + 0.02 * random.standard_normal(400)
    norms = [1.0] * 400
    assert Guard(0).check(1, falling.tolist(), norms).spikes == {}
    hit = falling.copy()
    hit[[150, 300]] += 0.5
    spikes = Guard(0).check(1, hit.tolist(), norms).spikes
    assert spikes.keys() == {151, 301}
    assert spikes[301] == pytest.approx(float(np.median(hit[250:300])))
    # A new level is not reported for ever.
    hit[200:] += 0.5
    reported = Guard(0).check(1, hit.tolist(), norms).spikes
    assert 201 in reported and max(reported) < 302 and len(reported) < 40


def test_the_step_log_returns_the_values_of_each_step() -> None:
    log = StepLog(3, torch.device("cpu"))
    for count in (3, 1, 2):
        sums, norms = [8.0 * i for i in range(count)], [float(i) for i in range(count)]
        for loss_sum, norm in zip(sums, norms, strict=True):
            log.add(torch.tensor(loss_sum), torch.tensor(norm))
        assert log.take(batch_size=8, world_size=1) == ([s / 8 for s in sums], norms)


def rates(images_per_second: float, step_seconds: float, data_wait: float, logging: float) -> dict[str, float]:
    return {
        metrics.IMAGES_PER_SECOND: images_per_second,
        metrics.STEP_SECONDS: step_seconds,
        metrics.DATA_WAIT_SHARE: data_wait,
        metrics.LOGGING_SHARE: logging,
    }


def test_shares_of_a_lap_are_of_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a lap taken while the worker logs, as in training."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("crate_ray.training.telemetry.time.perf_counter", lambda: clock.now)
    watch, laps = Stopwatch(torch.device("cpu")), []
    for waits, steps, before, after in ((3.0, 4.0, 3.0, 30.0), (1.0, 1.0, 8.0, 0.0)):
        with watch.waiting():
            clock.now += waits
        clock.now += steps
        with watch.logging():
            clock.now += before
            laps.append(watch.lap(steps=5, batch_size=8))
            clock.now += after
    assert laps == [
        rates(4.0, 2.0, 0.3, 0.3),
        rates(1.0, 8.0, 0.025, 0.95),
    ]
