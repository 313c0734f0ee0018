"""Runs Ray Train in a thread, so that the driver can follow the run at the same time, and end it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from crate_ray.config import ScalingConfig
from crate_ray.storage.node_folders import process_folder
from crate_ray.training.ray.internals import (
    SendController,
    install_release_failed_start,
    remove_placement_groups,
)
from crate_ray.training.ray.process_group import ClosedTorchConfig

_ABORT_SECONDS = 10.0
_POLL_SECONDS = 0.1


def ray_scaling(scaling: ScalingConfig, resources: dict[str, float], *, use_gpu: bool) -> ray.train.ScalingConfig:
    """Ray Train's settings of a worker group, from ours and the resources of each worker."""
    return ray.train.ScalingConfig(
        num_workers=scaling.workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=scaling.resize_seconds,
        accelerator_type=scaling.accelerator_type,
        label_selector=dict(scaling.label_selector) or None,
    )


def ray_failures(scaling: ScalingConfig) -> ray.train.FailureConfig:
    """Ray Train's settings of how often workers are restarted, from ours."""
    return ray.train.FailureConfig(
        max_failures=scaling.max_failures, max_preemption_failures=scaling.max_preemption_failures
    )


def fit(
    loop: Callable[[dict[str, Any]], None],
    payload: dict[str, Any],
    scaling: ray.train.ScalingConfig,
    failures: ray.train.FailureConfig,
    follow: Callable[[threading.Event], None],
) -> None:
    """Train until the workers are done. Raises ray.train.TrainingFailedError when they fail too often.

    Args:
        loop: function that every worker runs.
        payload: argument of `loop`. Its `attempt` names this start, and its `mailbox` is the driver's.
        scaling: workers and their resources.
        failures: how often the workers are restarted.
        follow: called in this thread, with an event that is set when the workers are done. If it raises an exception,
            the workers are ended.
    """
    install_release_failed_start()
    # Ray Train's own record of the run is not used, so it stays on this node. In the run's storage, a broken connection
    # while the controller writes the record would end the run.
    with process_folder(f"driver-{uuid.uuid4().hex[:12]}") as folder:
        trainer = TorchTrainer(
            _run_loop,
            # By reference, so that workers import large modules only after they have started.
            train_loop_config={"loop": [ray.put(loop)], "payload": payload},
            torch_config=ClosedTorchConfig(),
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=payload["attempt"],
                storage_path=folder.as_posix(),
                failure_config=failures,
                callbacks=[SendController(payload["mailbox"])],
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        held_before = set(ray.util.placement_group_table())
        training = _Fitting(trainer)
        training.start()
        try:
            follow(training.done)
        except BaseException:
            _end(training, payload["mailbox"])
            if _in_driver():
                remove_placement_groups(set(ray.util.placement_group_table()) - held_before)
            raise
        training.join()
    if training.error is not None:
        raise training.error


class _Fitting(threading.Thread):
    """Runs TorchTrainer.fit in a thread. Outside the main thread, Ray Train does not install a handler for SIGINT."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray train", daemon=True)
        self._trainer = trainer
        self.done = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train; sets `error` if that fails, and `done`."""
        try:
            self._trainer.fit()
        except BaseException as error:  # the driver's main thread raises it
            self.error = error
        finally:
            self.done.set()


def _run_loop(given: dict[str, Any]) -> None:
    ray.get(given["loop"][0])(given["payload"])


def _end(training: _Fitting, mailbox: Any) -> None:
    """End Ray Train's controller and its workers. If they do not end in time, kill the controller."""
    deadline = time.monotonic() + _ABORT_SECONDS
    while not (controller := ray.get(mailbox.controller.remote())):
        if training.done.wait(_POLL_SECONDS) or time.monotonic() > deadline:
            return
    controller[0].abort.remote()
    if not training.done.wait(deadline - time.monotonic()):
        ray.kill(controller[0])
        training.done.wait(_ABORT_SECONDS)  # it may still write files, and its folder is removed next


def _in_driver() -> bool:
    """Whether this process is the driver of a Ray job, and not a trial of a sweep. A driver outlives all it started."""
    return ray.get_runtime_context().get_actor_id() is None
