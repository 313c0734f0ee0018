"""The driver's side of training: it starts or resumes a run on Ray Train, follows it, and stops it on request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crate_ray.config import PretrainConfig
from crate_ray.errors import UserError
from crate_ray.runs.commits import newest_complete
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import Run, RunConfig
from crate_ray.runs.record import write_record
from crate_ray.storage.interface import Storage
from crate_ray.storage.lease import Lease
from crate_ray.training.control import Watchdog
from crate_ray.training.ray.fit import fit, ray_failures, ray_scaling
from crate_ray.training.ray.mailbox import Mailbox
from crate_ray.training.ray.worker import run_worker
from crate_ray.training.signals import Stopped, StopRequest, stop_signals
from crate_ray.training.task import Task

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_SILENT_SECONDS = 30.0  # without a heartbeat for so long, there is no worker that could save a checkpoint


def train_on_ray(run: Run, lease: Lease, task_class: type[Task], listeners: Sequence[Listener]) -> None:
    """Train to the last step on `scaling.workers` Ray Train workers.

    Recovers from up to `scaling.max_failures` failures. An elastic run resumes from its newest checkpoint when it gets
    another number of workers. Returns at once when the run is already finished.

    Needs Ray as ray_cluster.start_ray sets it up, and the run's lease, entered (see planning.driver_lease). Listeners
    are called in this thread. Raises UserError for mistakes that a worker found in the user's input, Stopped when
    SIGTERM or Ctrl-C has stopped the run, and LeaseLost when another driver has taken it over.
    """
    if run.is_finished:
        return
    config = run.config
    wants_weights = isinstance(config, PretrainConfig) and config.init_from is not None
    if wants_weights and not run.first_step and run.record.initial_weights is None:
        raise ValueError("the run starts from weights that it has not been given; call runs.pretraining.start_from")
    resources, use_gpu = _worker_resources(config)
    threads = run.record.threads or int(resources["CPU"])
    if config.scaling.cpus_per_worker not in (None, threads):
        raise UserError(
            f"run {config.name!r} was started with {threads} CPUs per worker, and its results depend on that number; "
            f"set scaling.cpus_per_worker {threads}"
        )
    lease.check()
    record = run.record.model_copy(update={"threads": threads})
    write_record(run.storage, record)
    mailbox = _start_mailbox()
    payload = {  # see worker.run_worker
        "config": config.model_dump(mode="json"),
        "record": record.model_dump(mode="json"),
        "total_steps": run.total_steps,
        "attempt": _new_attempt(run.storage),
        "mailbox": mailbox,
    }
    with stop_signals() as request:
        try:
            fit(
                partial(run_worker, task_class=task_class),
                payload,
                ray_scaling(config.scaling, resources, use_gpu=use_gpu),
                ray_failures(config.scaling),
                lambda done: _follow(done, mailbox, listeners, config.scaling.hang_seconds, lease, request),
            )
        except Stopped as stopped:
            raise Stopped(stopped.signal, _newest_step(run)) from None
        except ray.train.TrainingFailedError as error:
            if message := _fixable_failure(error):
                raise UserError(message) from None
            raise
        step = _newest_step(run)
        if step < run.total_steps:
            if request.signal:
                raise Stopped(request.signal, step)
            raise RuntimeError(f"the workers ended before step {run.total_steps} was committed; newest: step {step}")


def _start_mailbox() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()


def _new_attempt(storage: Storage) -> str:
    """A new folder for this start's checkpoints. Commit records, not folders, say which checkpoint is the newest."""
    earlier = [int(i.key.split("/")[0].removeprefix("attempt-")) for i in storage.list("attempt-")]
    return f"attempt-{max(earlier, default=0) + 1:03d}"


def _newest_step(run: Run) -> int:
    newest = newest_complete(run.storage)
    return newest.step if newest else 0


def _follow(
    done: threading.Event,
    mailbox: Any,
    listeners: Sequence[Listener],
    hang_seconds: float,
    lease: Lease,
    request: StopRequest,
) -> None:
    """Deliver the workers' events to the listeners, and pass on a request to stop, until the workers are done."""
    watchdog, stopping = Watchdog(hang_seconds), False
    while not done.wait(_POLL_SECONDS):
        _deliver(mailbox, listeners, watchdog)
        now = time.monotonic()
        watchdog.check(now)
        lease.check()
        if request.signal and not stopping:
            stopping = True
            logger.warning("stopping: a checkpoint is saved first (Ctrl-C again stops at once)")
            mailbox.request_stop.remote()
        if stopping and (not watchdog.has_begun or watchdog.silence(now) > _SILENT_SECONDS):
            raise Stopped(request.signal)
    _deliver(mailbox, listeners, watchdog)


def _deliver(mailbox: Any, listeners: Sequence[Listener], watchdog: Watchdog) -> None:
    for kind, step, *rest in ray.get(mailbox.drain.remote()):
        if kind == "heartbeat":
            watchdog.seen(rest[0], time.monotonic())
        elif kind == "error":
            raise UserError(*rest)  # Ray Train would restart the workers, which would not help
        else:
            for listener in listeners:
                getattr(listener, kind)(step, *rest)


def _fixable_failure(error: BaseException) -> str | None:
    """An error message for a failure that the user can fix: a full disk, or a storage that is away; else None."""
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        message = str(failure).strip().rsplit("\n", 1)[-1]  # the end of a traceback
        kind, _, rest = message.partition(": ")
        if kind.startswith("crate_ray.") or kind in ("OSError", "TimeoutError"):
            message = rest
        elif not isinstance(failure, OSError | UserError):
            continue
        return (
            f"rank {rank} cannot continue: {message}; fix that and run the same command again, which resumes from the "
            "newest checkpoint"
        )
    return None


def _worker_resources(config: RunConfig) -> tuple[dict[str, float], bool]:
    """CPUs and GPUs of each worker, and whether it has a GPU: as configured, or an equal share of the cluster's nodes.

    If the number of workers is a range, the share is for as many as the cluster has room for now.
    """
    scaling = config.scaling
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    use_gpu = scaling.gpu if scaling.gpu is not None else gpus >= scaling.min_workers
    cpus = scaling.cpus_per_worker
    if cpus is None:
        counts = [int(node.get("CPU", 0)) for node in nodes]
        most = min(scaling.max_workers, gpus) if use_gpu and gpus >= scaling.min_workers else scaling.max_workers
        workers = min(most, sum(counts))
        if workers < scaling.min_workers:
            raise UserError(
                f"{scaling.min_workers} workers need a CPU each, the cluster has {sum(counts)}; lower scaling.workers, "
                "add nodes, or set scaling.cpus_per_worker if an autoscaler will add them"
            )
        cpus = max(c for c in range(1, max(counts) + 1) if sum(n // c for n in counts) >= workers)
    return ({"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}), use_gpu
