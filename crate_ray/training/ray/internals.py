"""Everything that training uses of Ray's private interface.

Ray Train passes objects in RunConfig(callbacks=...) on to its controller, but their base classes are private.
tests/unit/test_ray_internals.py checks that the names used here exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import PlacementGroupID
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.placement_group import PlacementGroup

_CALLBACKS_ENV = "RAY_TRAIN_CALLBACKS"


class SendController(ControllerCallback):
    """Puts the handle of the controller, an actor, into the driver's mailbox, so that the driver can end it."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        self._mailbox.set_controller.remote([ray.get_runtime_context().current_actor])


class ReleaseFailedStart(WorkerGroupCallback):
    """Releases the resources of a worker group whose start has failed.

    If a worker dies while the process group is set up, Ray Train (2.60) drops the worker group without removing its
    placement group. The placement group then takes the resources of the next node that joins. Without other resources,
    no later worker group can start.
    """

    def __init__(self) -> None:
        self._group: Any = None

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        self._release()
        try:
            yield
        except Exception:
            self._release()
            raise

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def _release(self) -> None:
        group, self._group = self._group, None
        if group is not None and group.has_started():  # false after Ray Train itself has shut it down
            group.get_worker_group_state().shutdown()


def install_release_failed_start() -> None:
    """Let Ray Train create a ReleaseFailedStart for every run of this process.

    Callbacks in this environment variable run before Ray Train's own callbacks, one of which sets up the process group.
    Callbacks in RunConfig run after them, which is too late to see a worker group whose set-up fails.
    """
    name = f"{ReleaseFailedStart.__module__}.{ReleaseFailedStart.__qualname__}"
    names = [known for known in os.environ.get(_CALLBACKS_ENV, "").split(",") if known]
    if name not in names:
        os.environ[_CALLBACKS_ENV] = ",".join([name, *names])


def keep_credentials_here() -> None:
    """Let Ray Tune (2.60) not copy this process's AWS credentials into the runtime environment of trials.

    Ray writes runtime environments to its logs and shows them in its dashboard. Trials find the credentials of their
    node, as workers do.
    """
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.difference_update({name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")})


def remove_placement_groups(groups: set[str]) -> None:
    """Remove placement groups of this job, given by their hexadecimal ids. Those of other jobs are not removed."""
    job = ray.get_runtime_context().get_job_id()
    for group in groups:
        if group.endswith(job):  # a placement group's id ends with its job's
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
