"""The training loop without Ray and MLflow, in this process or in processes that torchrun has started.

Benchmarks and tests compare Ray Train jobs with it, in time and bit by bit. It also trains on machines that have only
torch, and there `train_stored` resumes from checkpoints. With torchrun:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m crate_ray.training.bare_loop RUN TIMES

The file RUN holds a pretraining run's settings and record. TIMES gets the seconds of each interval of
tracking.log_every steps.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray.config import FinetuneConfig, PretrainConfig
from crate_ray.errors import UserError
from crate_ray.runs.commits import new_attempt
from crate_ray.runs.listener import Listener
from crate_ray.runs.metrics import STEP_SECONDS, VALIDATION_LOSS
from crate_ray.runs.planning import Run, with_threads
from crate_ray.runs.record import RunRecord, write_record
from crate_ray.runs.starts import record_start
from crate_ray.storage.lease import Lease
from crate_ray.training.checkpoints import Peers, WorkerCheckpoints
from crate_ray.training.loop import TrainingLoop
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.signals import Stopped, StopRequest, stop_signals
from crate_ray.training.task import Assembled, Task
from crate_ray.training.worker import Checkpoints, Control, StartFacts, StepDecision, Worker


class Trained(NamedTuple):
    """Result of a training."""

    weights: dict[str, Tensor]
    """Weights of the model after the last step, on the CPU."""
    seconds: list[float]
    """Duration of each whole interval of tracking.log_every steps."""
    held_out: dict[str, float]
    """Metrics on the held-out data after the last step; empty without held-out data."""


def train(
    task_class: type[Task],
    config: PretrainConfig | FinetuneConfig,
    record: RunRecord,
    total_steps: int,
    *,
    weights: Mapping[str, Tensor] | None = None,
    listeners: Sequence[Listener] = (),
) -> Trained:
    """Train all steps of a run. If there is a process group, this process trains its part.

    Starts from `weights` if they are given. If the record has no number of threads, each process uses all cores. Only
    rank 0's listeners receive events. No pictures are made, and no checkpoints.
    """
    record = record.model_copy(update={"threads": record.threads or _cores()})
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as scratch:
        arguments = config, record, total_steps, Path(scratch), _NoCheckpoints(weights), listeners, _Control()
        return _train(task_class, *arguments)[0]


def train_stored(task_class: type[Task], run: Run, lease: Lease, listeners: Sequence[Listener] = ()) -> Trained:
    """Train the remaining steps of a run in this process, with checkpoints in the run's folder, as on Ray.

    A finished run is not trained. Its weights are returned without `held_out`. Needs the run's entered lease (see
    planning.driver_lease). The features are not measured while the run trains, so `probe` has no effect.

    Raises:
        UserError: the run was started with another number of threads, or has more steps than the settings say.
        Stopped: SIGTERM, from the parent of this process, has stopped the run after it has saved a checkpoint.
        LeaseLost: another process has taken over the run.
    """
    if run.first_step > run.total_steps:
        raise UserError(
            f"run {run.config.name!r} is at step {run.first_step:,}, beyond its last step {run.total_steps:,}; raise "
            f"training.steps or training.epochs, or delete {run.storage.uri} to train it again"
        )
    record = with_threads(run, _cores())
    start = record_start(run)
    write_record(run.storage, record)
    config, attempt = _without_probe(run.config), new_attempt(run.storage)
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as scratch:
        peers = Peers(
            group=uuid.uuid4().hex,
            rank=0,
            world_size=1,
            is_first_of_node=True,
            scratch=Path(scratch),
            node_scratch=Path(scratch),
            barrier=lambda: None,
            broadcast=lambda value: value,
        )
        checkpoints = WorkerCheckpoints(
            run.storage, attempt, record, config.checkpoint, peers, _NoSaveEvents(), _local_device()
        )
        with stop_signals(by_parent=True) as request:
            control = _StopControl(request, lease)
            arguments = config, record, run.total_steps, Path(scratch), checkpoints, listeners, control
            if start.changed:
                for listener in listeners:
                    listener.note(start.step, f"other settings than at the start before: {start.changes}")
            try:
                trained, step = _train(task_class, *arguments)
            except BaseException:
                with suppress(Exception):
                    checkpoints.finish()  # it still writes to the scratch folder
                raise
        if step < run.total_steps:
            raise Stopped(request.signal, step)
        return trained


def _without_probe(config: PretrainConfig | FinetuneConfig) -> PretrainConfig | FinetuneConfig:
    checkpoint = config.checkpoint
    if checkpoint.keep_best_by != "validation_loss":  # nothing measures it, and every checkpoint would be kept
        checkpoint = checkpoint.model_copy(update={"keep_best": 0})
    without = {"probe": None} if isinstance(config, PretrainConfig) else {}
    return config.model_copy(update={"checkpoint": checkpoint, **without})


def _train(
    task_class: type[Task],
    config: PretrainConfig | FinetuneConfig,
    record: RunRecord,
    total_steps: int,
    scratch: Path,
    checkpoints: Checkpoints,
    listeners: Sequence[Listener],
    control: Control,
) -> tuple[Trained, int]:
    """Returns also the step at which training ended."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    reporter = _LocalReporter(listeners if rank == 0 else ())
    tracking = config.tracking.model_copy(update={"picture_every": None})
    worker = Worker(
        rank=rank,
        world_size=world_size,
        device=_local_device(),
        scratch=scratch,
        reporter=reporter,
        control=control,
        checkpoints=checkpoints,
        preemption_notice=lambda: False,
    )
    loop = TrainingLoop(task_class, config.model_copy(update={"tracking": tracking}), record, total_steps, worker)
    loop.resume()
    loop.run()
    state = {name: tensor.detach().cpu() for name, tensor in loop.task.model.state_dict().items()}
    loop.finish()
    every = config.tracking.log_every
    seconds = [every * values[STEP_SECONDS] for step, values in reporter.logged.items() if not step % every]
    return Trained(state, seconds, reporter.held_out), loop.step


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _local_device() -> torch.device:
    """The GPU of this process among those of its machine, as torchrun numbers them, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@dataclass
class _LocalReporter:
    """Passes events on to listeners in this process, and stores the metrics that `train` returns."""

    listeners: Sequence[Listener]
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if STEP_SECONDS in values:
            self.logged[step] = values
        if VALIDATION_LOSS in values:
            self.held_out = values
        for listener in self.listeners:
            listener.metrics(step, values, int(1000 * time.time()))

    def picture(self, step: int, name: str, png: bytes) -> None:
        for listener in self.listeners:
            listener.picture(step, name, png)

    def started(self, step: int, facts: StartFacts) -> None:
        for listener in self.listeners:
            listener.started(step, facts._asdict())

    def first_step(self, step: int, loss: float, seconds: float) -> None:
        for listener in self.listeners:
            listener.first_step(step, loss, seconds)

    def note(self, step: int, text: str) -> None:
        for listener in self.listeners:
            listener.note(step, text)

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        for listener in self.listeners:
            listener.bad_samples(step, causes, split)

    def flush(self) -> None:
        pass


class _Control:
    """A control without a driver: the run is never asked to stop."""

    def decide(self, step: int) -> StepDecision:
        return StepDecision(stop=False, check_preemption=False)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass


@dataclass
class _StopControl(_Control):
    """The run stops when this process is asked to, and ends when it has lost its lease."""

    request: StopRequest
    lease: Lease

    def decide(self, step: int) -> StepDecision:
        self.lease.check()
        return StepDecision(stop=bool(self.request.signal), check_preemption=False)


@dataclass
class _NoCheckpoints:
    """Saves nothing. Training starts from the given weights, or else from the seed's random weights."""

    weights: Mapping[str, Tensor] | None

    def restore(self, assembled: Assembled) -> int:
        if self.weights is not None:
            assembled.task.model.load_state_dict(self.weights)
        return 0

    def save(self, step: int, assembled: Assembled, validation_loss: float | None = None) -> None:
        pass

    def raise_failure(self) -> None:
        pass

    def finish(self) -> None:
        pass


class _NoSaveEvents:
    """Listeners are called in this process, before a checkpoint is saved, so there is nothing to wait for."""

    def flush(self) -> None:
        pass

    def wait_until_recorded(self) -> None:
        pass

    def checkpoint(self, step: int, seconds: float) -> None:
        pass


def main(settings: Path, times: Path) -> None:
    """Join torchrun's process group and train. Rank 0 writes its times."""
    given = json.loads(settings.read_text())
    _local_device()  # before NCCL chooses one
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config, record = PretrainConfig.model_validate(given["config"]), RunRecord.model_validate(given["record"])
    seconds = train(PretrainTask, config, record, given["total_steps"]).seconds
    if dist.get_rank() == 0:
        times.write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
