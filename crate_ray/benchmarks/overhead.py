"""Overhead of a Ray Train job in addition to the training itself: Ray, waiting for data, logging, checkpoints."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from crate_ray.benchmarks.machine import describe_machine
from crate_ray.config import BenchmarkOverheadConfig, PrepareConfig, PretrainConfig
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.progress import console
from crate_ray.ray_cluster import start_ray
from crate_ray.runs import metrics
from crate_ray.runs.listener import Listener
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import open_storage
from crate_ray.training.lifecycle import run_training
from crate_ray.training.pretraining import PretrainTask

_CHECKPOINT_EVERY, _CHECKPOINT_STEPS = 7, 15  # 3 steps settle, 4 are timed before the first checkpoint, 6 after it
_SETTLING = 3
_COUNTED_STEPS = 500


class _Follower(Listener):
    """Stores every metric by step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {}

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value


class _Meter(Listener):
    """Measures the CPU time of this process and of its Ray's processes, without those that train.

    If other programs use the machine too, this is a better measure than the time of the steps, which they lengthen.
    """

    def __init__(self) -> None:
        self._first: tuple[float, dict[int, float]] | None = None
        self.share: float | None = None
        """Share of the time of all cores since the first metrics; None if this process did not start Ray."""

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        now, used = time.monotonic(), _seconds_beside_training()
        if not used:
            return
        if self._first is None:
            self._first = now, used
            return
        began, before = self._first
        seconds = sum(used[process] - before.get(process, 0) for process in used)
        self.share = seconds / ((now - began) * len(os.sched_getaffinity(0)))


def _seconds_beside_training() -> dict[int, float]:
    """CPU time by process id of this process and its descendants that do not train. Empty if none of them trains."""
    found, trains = {}, False
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            if " ".join(process.cmdline()).startswith("ray::RayTrainWorker"):
                trains = True
                continue
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found if trains else {}


def measure(config: BenchmarkOverheadConfig) -> dict[str, Any]:
    """All figures, for JSON: seconds per step as a Ray Train job and bare, and the shares of each overhead."""
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        folder = Path(temporary)
        data = config.data or _make_data(folder, config)
        start_ray()
        report = {"machine": describe_machine(), **_against_bare(folder, data, config)}
        if config.checkpoint_preset is not None:
            report["checkpoint"] = _checkpoint(folder, data, config)
    return report


def _against_bare(folder: Path, data: str, config: BenchmarkOverheadConfig) -> dict[str, Any]:
    """Run the same steps as a Ray Train job and under bare torchrun, in turns."""
    seconds: dict[str, list[float]] = {"ray_train": [], "torchrun": []}
    shares: dict[str, list[float]] = {metrics.DATA_WAIT_SHARE: [], metrics.LOGGING_SHARE: []}
    beside: list[float] = []
    for number in range(config.rounds):
        settings = _settings(f"overhead-{number}", folder, data, config)
        follower, meter = _Follower(), _Meter()
        console().print(f"round {number + 1} of {config.rounds}: {config.steps} steps as a Ray Train job, then bare")
        _train(settings, follower, meter)
        if meter.share is not None:
            beside.append(meter.share)
        taken = follower.values[metrics.STEP_SECONDS]
        seconds["ray_train"] += [taken[step] for step in sorted(taken)[1:]]
        for name, found in shares.items():
            found += [follower.values[name][step] for step in sorted(taken)[1:]]
        record = open_run(settings).record  # includes the workers' number of threads
        bare = _bare(folder, settings, record.model_dump(mode="json"), config)
        seconds["torchrun"] += [interval / config.log_every for interval in bare[1:]]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "step_seconds": medians,
        "intervals": seconds,
        "ray_overhead": medians["ray_train"] / medians["torchrun"] - 1,
        "beside_share": statistics.fmean(beside) if beside else None,
        **{name.rsplit("/", 1)[-1]: statistics.fmean(values) for name, values in shares.items()},
    }


def _train(settings: PretrainConfig, *listeners: Listener) -> None:
    """Train as a job does, without the progress display."""
    run_training(
        settings,
        PretrainTask,
        open_run,
        finish=lambda run, tracker: None,
        listeners=listeners,
        show_progress=False,
    )


def _bare(
    folder: Path, settings: PretrainConfig, record: dict[str, Any], config: BenchmarkOverheadConfig
) -> list[float]:
    given, times = folder / "bare.json", folder / "times.json"
    given.write_text(
        json.dumps({"config": settings.model_dump(mode="json"), "record": record, "total_steps": config.steps})
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.workers),
        "-m", "crate_ray.training.bare_loop", str(given), str(times),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the bare loop failed: {done.stderr.strip()[-500:]}")
    found: list[float] = json.loads(times.read_text())
    return found


def _checkpoint(folder: Path, data: str, config: BenchmarkOverheadConfig) -> dict[str, Any]:
    """Measure how much longer steps take during a checkpoint."""
    settings = _settings("checkpoint", folder, data, config)
    changes = {
        "model": {"preset": config.checkpoint_preset},
        "training": {"batch_size": config.checkpoint_batch_size, "steps": _CHECKPOINT_STEPS},
        "checkpoint": {"every_steps": _CHECKPOINT_EVERY},
        "tracking": {"log_every": 1, "picture_every": None},
    }
    settings = PretrainConfig.model_validate(settings.model_dump(mode="json") | changes)
    console().print(f"checkpoints of the {config.checkpoint_preset} preset: {_CHECKPOINT_STEPS} steps")
    follower = _Follower()
    _train(settings, follower)
    taken = follower.values[metrics.STEP_SECONDS]
    calm = statistics.median(taken[step] for step in range(_SETTLING + 1, _CHECKPOINT_EVERY + 1))
    # The blocking part lengthens the step after the checkpoint, the upload lengthens the steps that follow.
    hit = [taken[step] - calm for step in range(_CHECKPOINT_EVERY + 1, 2 * _CHECKPOINT_EVERY)]
    return {
        "preset": config.checkpoint_preset,
        "step_seconds": calm,
        "blocking_seconds": follower.values[metrics.CHECKPOINT_BLOCKING_SECONDS][_CHECKPOINT_EVERY],
        "background_seconds": follower.values[metrics.CHECKPOINT_BACKGROUND_SECONDS][_CHECKPOINT_EVERY],
        "lost_seconds": sum(hit),
        "steps_between": _COUNTED_STEPS,
        "share": sum(hit) / (_COUNTED_STEPS * calm),
    }


def _settings(name: str, folder: Path, data: str, config: BenchmarkOverheadConfig) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "name": name,
            "storage": str(folder / "runs"),
            "model": config.model.model_dump(mode="json"),
            "data": {"train": data},
            "training": {"batch_size": config.batch_size, "steps": config.steps},
            "scaling": {"workers": config.workers, "cpus_per_worker": config.cpus_per_worker},
            "checkpoint": {"every_steps": 10 * config.steps},
            "tracking": {
                "uri": f"sqlite:///{folder}/mlflow.db",
                "log_every": config.log_every,
                "picture_every": None,
            },
        }
    )


def _make_data(folder: Path, config: BenchmarkOverheadConfig) -> str:
    logging.getLogger("crate_ray").setLevel(logging.WARNING)
    prepared = PrepareConfig(source="shapes", output=str(folder / "data"))
    size = max(config.model.image_hw)
    pack(shapes_source("all", config.samples, size, 0), open_storage(prepared.output, prepared.s3), prepared)
    return prepared.output
