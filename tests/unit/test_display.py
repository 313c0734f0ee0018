"""The terminal output of a run: its start, first steps, resumption, stop and end, without messages of libraries that
the user cannot act on."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from crate_ray.config import PretrainConfig, TrackingConfig
from crate_ray.jobs.training import next_commands
from crate_ray.quiet import quiet_driver
from crate_ray.runs import metrics
from crate_ray.training.display import ProgressDisplay, duration, loss_curve
from crate_ray.training.signals import Stopped

FACTS: dict[str, Any] = {
    "device": "CPU (x86_64)",
    "workers": 2,
    "threads": 1,
    "parameters": 11_560_000,
    "images": 1600,
    "batch_size": 64,
}


def values(loss: float) -> dict[str, float]:
    return {metrics.LOSS: loss, metrics.IMAGES_PER_SECOND: 128.0, metrics.STEP_SECONDS: 0.5, metrics.LR: 1e-3}


def test_a_run_from_its_start_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(0, 100) as display:
        display.started(0, FACTS)
        display.first_step(1, 1.25, 30.0)
        display.first_step(2, 1.24, 0.5)
        for step in range(10, 101, 10):
            display.metrics(step, values(1 / step), 0)
        display.started(50, FACTS | {"workers": 1})
        display.metrics(100, {metrics.VALIDATION_LOSS: 0.5, metrics.TOP1: 0.75}, 0)
    assert capsys.readouterr().err.splitlines() == [
        "device  CPU (x86_64): 2 workers, 1 CPU thread each",
        "model   11.56 M parameters",
        "data    1,600 images, batch 64, 100 steps (4.0 epochs)",
        "step 1/100  loss 1.2500",  # how long a step takes is not known yet
        "step 2/100  loss 1.2400  49 s left",
        "step 10/100  loss 0.1000  128 images/s  lr 1.00e-03  45 s left",
        "step 100/100  loss 0.0100  128 images/s  lr 1.00e-03",
        "resuming at step 50 with 1 worker",
        "step 100/100  validation loss 0.5000  top-1 75.00%",
        "trained 100 steps in 0 s",
        "loss    0.1000 █▄▃▂▂▂▁▁▁▁ 0.0100",
        "validation loss 0.5000",
    ]


def test_a_run_that_is_stopped_says_where_it_continues(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(first: int, step: int) -> str:
        display = ProgressDisplay(first, 100)
        display.started(first, FACTS)
        stopped = Stopped(15, step)
        display.__exit__(Stopped, stopped, None)
        return capsys.readouterr().err

    err = stop(40, 60)
    assert "resuming at step 40\n" in err and "trained" not in err
    assert err.endswith("stopped at step 60 of 100; the same command continues from there\n")
    assert stop(0, 0).endswith("stopped before its first checkpoint; the same command starts again\n")


def test_the_commands_that_follow_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = PretrainConfig.model_validate(
        {
            "name": "x",
            "data": {"train": "a", "validation": "held out"},
            "training": {"steps": 1},
            "tracking": {"uri": "http://me:secret@host:5000"},
        }
    )
    assert next_commands(config) == [
        "crate-ray evaluate --model runs/x --data 'held out' --tracking.uri http://host:5000",
        "crate-ray register --run runs/x --tracking.uri http://host:5000",
    ]
    local = config.model_copy(update={"tracking": TrackingConfig()})
    assert next_commands(local)[-1].startswith("mlflow ui --backend-store-uri sqlite:///")


def test_curves_and_durations() -> None:
    assert loss_curve([3.0, 2.0, 1.0, 1.0]) == "█▅▁▁"
    assert loss_curve([1.0] * 100) == "▁" * 40 and len(loss_curve([float(i) for i in range(1000)])) == 40
    assert [duration(s) for s in (9.6, 61, 3725, 100 * 3600)] == ["10 s", "1 min 01 s", "1 h 02 min", "4 days 4 h"]


def test_a_line_that_nobody_can_act_on_is_dropped_and_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    quiet_driver()
    quiet_driver()
    restarted = (
        "(TrainController pid=7) E Actor with class name: 'PreemptionWatcher' and ID: '8e' has constructor arguments"
    )
    many = "(raylet) WARNING: 10 PYTHON worker processes have been started on node: f33d with address: 127.0.0.1, which"
    print(restarted, file=sys.stderr)
    print("(TrainController pid=7) E core_worker.cc:1: the disk is full", file=sys.stderr)
    print(many, file=sys.stderr)
    print(file=sys.stderr)
    assert screen.getvalue() == "(TrainController pid=7) E core_worker.cc:1: the disk is full\n\n"
