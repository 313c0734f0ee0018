"""How the driver trains: it starts or resumes a run on Ray Train, follows it, and passes on a wish to stop."""

from __future__ import annotations

import logging
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
from crate_ray.storage.lease import Lease
from crate_ray.training.control import Watchdog
from crate_ray.training.loop import train
from crate_ray.training.ray.fit import fit
from crate_ray.training.ray.mailbox import Mailbox
from crate_ray.training.ray.worker import run_worker
from crate_ray.training.signals import Stopped, StopRequest, stop_signals
from crate_ray.training.task import Task

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_SILENT_SECONDS = 30.0  # without a sign of life, no worker is there that could save a checkpoint


def train_on_ray(run: Run, lease: Lease, task_class: type[Task], listeners: Sequence[Listener]) -> None:
    """Train to the last step, on `scaling.workers` Ray Train workers; recovers from up to max_failures failures, and
    from the newest checkpoint when an elastic run gets another number of workers.

    Needs Ray (see ray_cluster.start_ray), and the run's lease, entered (see planning.driver_lease). Listeners hear of
    metrics and pictures in this thread. Returns at once when the run is already finished. Raises UserError for what a
    worker found wrong with the user's input, and LeaseLost when another driver has taken the run over.
    """
    if run.is_finished:
        return
    config = run.config
    wants_weights = isinstance(config, PretrainConfig) and config.init_from is not None
    if wants_weights and not run.first_step and run.record.initial_weights is None:
        raise ValueError("the run is to start from weights that have not been given to it; see run.start_from")
    resources, use_gpu = _worker_resources(config)
    threads = run.record.threads or int(resources["CPU"])
    if config.scaling.cpus_per_worker not in (None, threads):
        raise UserError(
            f"run {config.name!r} was begun with {threads} CPUs per worker and results depend on it; "
            f"set scaling.cpus_per_worker {threads}"
        )
    lease.check()
    with stop_signals() as asked:
        _fit_and_follow(run, task_class, listeners, lease, asked, resources, use_gpu=use_gpu, threads=threads)


def _fit_and_follow(
    run: Run,
    task_class: type[Task],
    listeners: Sequence[Listener],
    lease: Lease,
    asked: StopRequest,
    resources: dict[str, float],
    *,
    use_gpu: bool,
    threads: int,
) -> None:
    """Start Ray Train, deliver what the workers tell, and pass on a wish to stop. Raises as `train_on_ray` does."""
    config = run.config
    record = run.record.model_copy(update={"threads": threads})
    write_record(run.storage, record)

    # Each start of the driver is an attempt; our commit records, not Ray's, say which checkpoint is the newest.
    earlier = [int(i.key.split("/")[0].removeprefix("attempt-")) for i in run.storage.list("attempt-")]
    attempt = f"attempt-{max(earlier, default=0) + 1:03d}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()
    payload = {  # see loop.train
        "config": config.model_dump(mode="json"),
        "record": record.model_dump(mode="json"),
        "total_steps": run.total_steps,
        "attempt": attempt,
        "mailbox": mailbox,
    }
    scaling = ray.train.ScalingConfig(
        num_workers=config.scaling.workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=config.scaling.resize_seconds,
    )
    loop = partial(run_worker, train=partial(train, task_class))

    def follow(done: ray.ObjectRef) -> None:
        watchdog, stopping = Watchdog(config.scaling.hang_seconds), False
        while not ray.wait([done], timeout=_POLL_SECONDS)[0]:
            _deliver(mailbox, listeners, watchdog)
            watchdog.check(time.monotonic())
            lease.check()
            if asked.signal and not stopping:
                stopping = True
                logger.warning("stopping: a checkpoint is saved first (Ctrl-C again to stop at once)")
                mailbox.stop.remote()
            if stopping and (not watchdog.has_begun or watchdog.silence(time.monotonic()) > _SILENT_SECONDS):
                raise Stopped(asked.signal)
        _deliver(mailbox, listeners, watchdog)

    try:
        fit(loop, payload, scaling, config.scaling.max_failures, follow)
    except ray.train.TrainingFailedError as error:
        if sentence := _failure_to_mend(error):
            raise UserError(sentence) from None
        raise
    newest = newest_complete(run.storage)
    if newest is None or newest.step < run.total_steps:
        if asked.signal:
            raise Stopped(asked.signal)
        raise RuntimeError(f"the workers ended before step {run.total_steps} was committed: {newest}")


def _failure_to_mend(error: BaseException) -> str | None:
    """What a worker said of a full disk or a storage that is away, where that ended the run."""
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        said = str(failure).strip().rsplit("\n", 1)[-1]  # of a traceback, its end
        kind, _, rest = said.partition(": ")
        if kind.startswith("crate_ray.") or kind in ("OSError", "TimeoutError"):
            said = rest
        elif not isinstance(failure, OSError | UserError):
            continue
        return (
            f"rank {rank} cannot go on: {said}; mend that and start the run again, which goes on from its newest "
            "checkpoint"
        )
    return None


def _deliver(mailbox: Any, listeners: Sequence[Listener], watchdog: Watchdog) -> None:
    for kind, step, *rest in ray.get(mailbox.drain.remote()):
        if kind == "alive":
            watchdog.seen(rest[0], time.monotonic())
        for listener in listeners:
            if kind == "metrics":
                listener.metrics(step, *rest)
            elif kind == "picture":
                listener.picture(step, *rest)
            elif kind == "bad_samples":
                listener.bad_samples(step, *rest)
            elif kind == "note":
                listener.note(step, *rest)
        if kind == "error":
            # Ray Train would try again, which would not help.
            raise UserError(*rest)


def _worker_resources(config: RunConfig) -> tuple[dict[str, float], bool]:
    """CPUs and GPUs of each worker, and whether it has a GPU: what is set, or an equal share of the cluster's nodes.

    The share is for as many workers as the cluster has room for now, where their number is a range.
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
                "add nodes, or set scaling.cpus_per_worker where an autoscaler will add them"
            )
        cpus = max(c for c in range(1, max(counts) + 1) if sum(n // c for n in counts) >= workers)
    return ({"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}), use_gpu
