"""The driver's side of training: it starts or resumes a run on Ray Train, follows it, and stops it on request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crate_ray.config import PretrainConfig
from crate_ray.errors import UserError
from crate_ray.ray_cluster import cluster_nodes, worker_resources
from crate_ray.runs.commits import new_attempt, newest_complete
from crate_ray.runs.listener import Listener
from crate_ray.runs.metrics import CHECKPOINT_BACKGROUND_SECONDS
from crate_ray.runs.planning import Run, with_threads
from crate_ray.runs.record import write_record
from crate_ray.storage.lease import Lease
from crate_ray.training.control import Watchdog
from crate_ray.training.ray.fit import fit, ray_failures, ray_scaling
from crate_ray.training.ray.mailbox import Mailbox
from crate_ray.training.ray.measuring import Measure, Measurements
from crate_ray.training.ray.worker import run_worker
from crate_ray.training.signals import Stopped, StopRequest, stop_signals
from crate_ray.training.task import Task

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_SILENT_SECONDS = 30.0  # after this time without heartbeats, no worker is left that could save a checkpoint


def train_on_ray(
    run: Run, lease: Lease, task_class: type[Task], listeners: Sequence[Listener], measure: Measure | None = None
) -> None:
    """Train to the last step on `scaling.workers` Ray Train workers.

    Recovers from up to `scaling.max_failures` failures. If the number of workers of an elastic run changes, the run
    resumes from its newest checkpoint. Returns at once if the run is already finished.

    Needs Ray, as ray_cluster.start_ray sets it up, and the run's entered lease (see planning.driver_lease). Listeners
    are called in this thread. `measure` measures the checkpoints of a run that has a `probe`. Raises UserError for
    mistakes that a worker found in the user's input, Stopped if SIGTERM or Ctrl-C has stopped the run, and LeaseLost if
    another driver has taken it over.
    """
    if run.is_finished:
        return
    config = run.config
    wants_weights = isinstance(config, PretrainConfig) and config.init_from is not None
    if wants_weights and not run.first_step and run.record.initial_weights is None:
        raise ValueError("the run's initial weights are not stored yet; call runs.pretraining.start_from first")
    resources, use_gpu = worker_resources(config.scaling, cluster_nodes())
    record = with_threads(run, int(resources["CPU"]))
    lease.check()
    write_record(run.storage, record)
    mailbox = _start_mailbox()
    payload = {  # see worker.run_worker
        "config": config.model_dump(mode="json"),
        "record": record.model_dump(mode="json"),
        "total_steps": run.total_steps,
        "attempt": new_attempt(run.storage),
        "mailbox": mailbox,
    }
    with stop_signals() as request, _measurements(run, measure, mailbox) as measurements:
        try:
            fit(
                partial(run_worker, task_class=task_class),
                payload,
                ray_scaling(config.scaling, resources, use_gpu=use_gpu),
                ray_failures(config.scaling),
                lambda done: _follow(
                    done, mailbox, listeners, measurements, config.scaling.hang_seconds, lease, request
                ),
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


@contextmanager
def _measurements(run: Run, measure: Measure | None, mailbox: Any) -> Iterator[Measurements | None]:
    """Measurements of the run's checkpoints, if it has labelled data for them."""
    config = run.config
    if measure is None or not isinstance(config, PretrainConfig) or config.probe is None:
        yield None
        return
    measurements = Measurements(measure, config, config.probe.every, run.total_steps, mailbox)
    try:
        yield measurements
    finally:
        measurements.end()


def _start_mailbox() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()


def _newest_step(run: Run) -> int:
    newest = newest_complete(run.storage)
    return newest.step if newest else 0


def _follow(
    done: threading.Event,
    mailbox: Any,
    listeners: Sequence[Listener],
    measurements: Measurements | None,
    hang_seconds: float,
    lease: Lease,
    request: StopRequest,
) -> None:
    """Until the workers are done, deliver their events to the listeners, and pass on a request to stop."""
    watchdog, stopping = Watchdog(hang_seconds), False
    while not done.wait(_POLL_SECONDS):
        _deliver(mailbox, listeners, watchdog, measurements)
        if measurements:
            measurements.advance()
        now = time.monotonic()
        watchdog.check(now)
        lease.check()
        if request.signal and not stopping:
            stopping = True
            logger.warning("stopping: a checkpoint is saved first (Ctrl-C again stops at once)")
            mailbox.request_stop.remote()
        if stopping and (not watchdog.has_begun or watchdog.silence(now) > _SILENT_SECONDS):
            raise Stopped(request.signal)
    _deliver(mailbox, listeners, watchdog, measurements)
    while measurements and not request.signal and not measurements.wait(_POLL_SECONDS):
        lease.check()
    _deliver(mailbox, listeners, watchdog)


def _deliver(
    mailbox: Any, listeners: Sequence[Listener], watchdog: Watchdog, measurements: Measurements | None = None
) -> None:
    for kind, step, *rest in ray.get(mailbox.drain.remote()):
        if kind == "heartbeat":
            watchdog.seen(rest[0], time.monotonic())
        elif kind == "error":
            raise UserError(*rest)  # Ray Train would restart the workers, which would not help
        else:
            for listener in listeners:
                getattr(listener, kind)(step, *rest)
            if measurements and kind == "metrics" and CHECKPOINT_BACKGROUND_SECONDS in rest[0]:
                measurements.committed(step)


def _fixable_failure(error: BaseException) -> str | None:
    """Message for a failure that the user can fix, such as a full disk or an unavailable storage; else None."""
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
