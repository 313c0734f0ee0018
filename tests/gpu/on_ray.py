"""The parts of the GPU check that need Ray: a run by the project's driver, SIGTERM, and its resumption. See check.py.

`python -m tests.gpu.on_ray --config FILE` is the driver of one run. It is that of `crate-ray pretrain` without MLflow,
which the GPU machine does not have: the same settings, lease, Ray, training, signals and exit codes. It prints the
run's events as JSON. The parts start it in processes of its own.

Three runs are compared bit by bit. They use fp32, eager layers and deterministic algorithms, because the usual kernels
on a GPU add numbers in an order that changes from run to run. A fourth run has the usual settings.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crate_ray.cli import run_job
from crate_ray.config import PrepareConfig, PretrainConfig, S3Config
from crate_ray.runs import metrics
from crate_ray.runs.commits import load_weights, newest_complete
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import driver_lease
from crate_ray.runs.pretraining import open_pretraining
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.task import WorkerContext

Results = dict[str, Any]

DRY = os.environ.get("CRATE_RAY_GPU_CHECK") == "dry"
"""Rehearse on the CPU, with a smaller model."""
STEPS = 300 if DRY else 1500
WORK = Path(os.environ.get("CRATE_RAY_GPU_WORK", "none"))
"""Folder that the parts share: data, runs, and Ray's files."""
_STOP_AFTER = STEPS // 10
_SIGTERM_EXIT = 128 + signal.SIGTERM  # as docs/troubleshooting.md says


# --- The driver -----------------------------------------------------------------------------------------------------


class DeterministicTask(PretrainTask):
    """Pretraining in which the same step gives the same bits on a GPU too."""

    def __init__(self, config: PretrainConfig, context: WorkerContext) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # The backward passes of these kernels add up gradients in any order.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        super().__init__(config, context)


class Printed(Listener):
    """Prints events that the parts need as lines of JSON."""

    def started(self, step: int, facts: dict[str, Any]) -> None:
        print(json.dumps({"event": "started", "step": step, **facts}), flush=True)

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        print(json.dumps({"event": "metrics", "step": step, **values}), flush=True)


def train(config: PretrainConfig) -> None:
    """Start or resume a run on a Ray of its own, as training.lifecycle.run_training does."""
    from crate_ray.ray_cluster import start_ray
    from crate_ray.training.ray.driver import train_on_ray

    with driver_lease(config) as lease:
        run = open_pretraining(config)
        start_ray()
        task = PretrainTask if config.name == "usual" else DeterministicTask
        train_on_ray(run, lease, task, [Printed()])


# --- The parts ------------------------------------------------------------------------------------------------------


class Driven(NamedTuple):
    """How a driver has ended."""

    exit_code: int
    events: list[dict[str, Any]]
    seconds: float
    start_seconds: float
    """From the start of the process to the first step."""
    asked_at: int
    """The newest logged step when the driver got SIGTERM; 0 if it got none."""

    def logged(self, metric: str) -> list[float]:
        """The values of a metric, in order."""
        return [event[metric] for event in self.events if metric in event]

    def start(self) -> dict[str, Any]:
        """The first start of the workers."""
        return next(event for event in self.events if event["event"] == "started")


def settings(name: str) -> Path:
    """File with the settings of a run; written when it does not exist."""
    file = WORK / f"{name}.json"
    if file.exists():
        return file
    small = {"patch_size": 8, "dim": 64, "depth": 2, "num_subspaces": 4}
    exact = {} if name == "usual" else {"precision": "fp32", "compile": "off"}
    config = {
        "name": name,
        "storage": (WORK / "runs").as_posix(),
        "data": {"train": training_data()},
        "model": {"image_size": 32} | (small if DRY else {"patch_size": 4, "dim": 256, "depth": 3, "num_subspaces": 8}),
        "training": {"steps": STEPS, "batch_size": 16 if DRY else 256, **exact},
        "optim": {"lr": 1e-3 if DRY else 2e-3},
        "scaling": {"workers": 1, "gpu": not DRY} | ({"cpus_per_worker": 1} if DRY else {}),
        "checkpoint": {"every_steps": STEPS // 3},
        "tracking": {"log_every": 10, "picture_every": None},
    }
    PretrainConfig.model_validate(config)
    file.write_text(json.dumps(config))
    return file


def training_data() -> str:
    """CIFAR-10 of the bundle. Without it, the built-in shapes, which have the same size."""
    from crate_ray.data.prepare.builtin import shapes_source
    from crate_ray.data.prepare.packing import pack

    cifar = Path(os.environ.get("CRATE_RAY_GPU_CIFAR", "none")) / "train"
    if cifar.is_dir():
        return cifar.as_posix()
    config = PrepareConfig(source="shapes", output=(WORK / "shapes").as_posix())
    if not (WORK / "shapes").exists():
        pack(shapes_source("all", 400 if DRY else 4000, 32, 0), open_storage(config.output, config.s3), config)
    return config.output


def drive(name: str, expected: int = 0, *, stop: bool = False) -> Driven:
    """Run the driver of a run to its end. With `stop`, it gets SIGTERM in the middle of training.

    Raises RuntimeError if its exit code is not the expected one, or if the workers have failed and were started again,
    which a run survives. Then Ray's logs are copied to OUT.
    """
    command = [sys.executable, "-m", "tests.gpu.on_ray", "--config", settings(name).as_posix()]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": WORK.as_posix()}
    env |= {"RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1"}  # containers may have a small /dev/shm
    if name != "usual":
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    began, first, asked_at = time.monotonic(), 0.0, 0
    events: list[dict[str, Any]] = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):  # from Ray
                print(line, end="", file=sys.stderr)
                continue
            events.append(event := json.loads(line))
            if event["event"] == "metrics":
                first = first or time.monotonic() - began
                if stop and not asked_at and event["step"] >= _STOP_AFTER:
                    process.send_signal(signal.SIGTERM)
                    asked_at = event["step"]
    starts = sum(event["event"] == "started" for event in events)
    if process.returncode != expected or starts != 1:
        logs = WORK / "ray/session_latest/logs"
        if logs.is_dir():
            shutil.copytree(logs, Path(os.environ["OUT"]) / f"ray-logs-{name}", dirs_exist_ok=True)
        raise RuntimeError(
            f"{name}: the driver ended with {process.returncode} (expected: {expected}), its workers started {starts} "
            "times (expected: 1)"
        )
    return Driven(process.returncode, events, time.monotonic() - began, first, asked_at)


def saved(name: str) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of the newest checkpoint of a run."""
    state, weights = load_weights(storage(name))
    return state.step, weights


def storage(name: str) -> Storage:
    """A run's folder."""
    return open_storage((WORK / "runs").as_posix(), S3Config()).under(name)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of weights, relative to the largest weight of each tensor. 0: the same bits."""
    found = 0.0
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            found = max(found, ((tensor - other[name]).abs().max() / tensor.abs().max()).item(), 1e-30)
    return found


def _trained(name: str) -> Results:
    driven = drive(name)
    losses = driven.logged(metrics.LOSS)
    speeds = sorted(driven.logged(metrics.IMAGES_PER_SECOND))
    return {
        "data": Path(training_data()).parent.name if "cifar" in training_data() else "shapes",
        "device": driven.start()["device"],
        "steps": saved(name)[0],
        "finished": saved(name)[0] == STEPS,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "images_per_second": speeds[len(speeds) // 2],
        "start_seconds": round(driven.start_seconds, 1),
        "run_seconds": round(driven.seconds, 1),
    }


def ray_whole() -> Results:
    """A run to its end, with deterministic algorithms."""
    return _trained("whole")


def ray_stopped() -> Results:
    """The same run in another folder. SIGTERM in the middle saves a checkpoint and ends the driver."""
    driven = drive("stopped", _SIGTERM_EXIT, stop=True)
    newest = newest_complete(storage("stopped"))
    return {
        "exit_code": driven.exit_code,
        "asked_at": driven.asked_at,
        "saved_at": newest.step if newest else 0,
        "steps": STEPS,
    }


def ray_resumed() -> Results:
    """The same command again. It resumes where SIGTERM stopped it, and ends with the weights of the whole run."""
    newest = newest_complete(storage("stopped"))
    driven = drive("stopped")
    (step, weights), (_, expected) = saved("stopped"), saved("whole")
    found: Results = {
        "saved_at": newest.step if newest else 0,
        "resumed_at": driven.start()["step"],
        "finished": step == STEPS,
        "difference": difference(weights, expected),
    }
    if found["difference"]:  # does the GPU give the same bits at all?
        drive("again")
        found["difference_undisturbed"] = difference(saved("again")[1], expected)
    return found


def ray_usual() -> Results:
    """A run with the usual settings: on a GPU, bf16 and compiled layers."""
    return _trained("usual")


PARTS: dict[str, Callable[[], Results]] = {
    "ray_whole": ray_whole,
    "ray_stopped": ray_stopped,
    "ray_resumed": ray_resumed,
    "ray_usual": ray_usual,
}


if __name__ == "__main__":
    if sys.argv[1] in PARTS:
        print(json.dumps(PARTS[sys.argv[1]]()))
    else:
        from tests.gpu import on_ray  # by its name, so that workers can import the task

        run_job(PretrainConfig, on_ray.train)
