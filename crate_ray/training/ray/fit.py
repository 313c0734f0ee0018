"""Ray Train, started and followed by the driver itself.

Ray Train (2.60) runs a controller, an actor that starts workers anew where they fail. It lives as long as the driver
does. What is changed here needs classes of Ray Train that are not for users.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray import PlacementGroupID
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crate_ray.storage.node_folders import process_folder

_KILLED_SECONDS = 5.0  # for the controller to be gone, at the most


def fit(
    loop: Callable[[dict[str, Any]], None],
    payload: dict[str, Any],
    scaling: ray.train.ScalingConfig,
    max_failures: int,
    follow: Callable[[ray.ObjectRef], None],
) -> None:
    """Train until the workers are done. Raises what Ray Train gives up with, once they fail too often.

    Args:
        loop: what every worker runs.
        payload: what it is called with.
        scaling: workers and their resources.
        max_failures: how often they are started again.
        follow: called with what will be ready when the workers are done. What it raises ends them.
    """
    # Ray Train's own record of checkpoints, which nobody reads, stays on this node: where it lies in the run's storage,
    # a connection that breaks while the controller writes it ends the run.
    with process_folder(f"driver-{uuid.uuid4().hex[:12]}") as folder:
        _Trainer(
            follow,
            _work,
            # By reference: workers fetch what is large to import after they have been started.
            train_loop_config={"loop": [ray.put(loop)], "payload": payload},
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=payload["attempt"],
                storage_path=folder.as_posix(),
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        ).fit()


def _work(given: dict[str, Any]) -> None:
    ray.get(given["loop"][0])(given["payload"])


class _Trainer(TorchTrainer):
    """Ray Train, whose controller the driver follows while it works, and can end.

    It gives back what workers held that died while they were started, and starts no process for Ray Data's datasets,
    which there are none of, nor, for a driver, one that asks the dashboard every second whether the controller lives:
    Ray gives back what was held when the driver's job ends, and until then the driver does so itself.
    """

    def __init__(self, follow: Callable[[ray.ObjectRef], None], *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._follow = follow

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        needless: list[type[RayTrainCallback]] = [DatasetsCallback]
        if _in_driver():
            needless.append(PlacementGroupCleanerCallback)
        callbacks = [one for one in super()._create_default_callbacks() if not isinstance(one, tuple(needless))]
        return [_GiveBack(), *callbacks]  # the first to hear of workers, before any can fail

    def _initialize_and_run_controller(self, **settings: Any) -> ray.train.Result:
        context = ray.get_runtime_context()
        # The address lets Ray Train clean up after a trial that was killed even where several Rays run on one machine.
        environment = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0", **get_env_vars_to_propagate()}
        environment["RAY_ADDRESS"] = context.gcs_address
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        actor = ray.remote(TrainController).options(
            num_cpus=0, scheduling_strategy=here, runtime_env={"env_vars": environment}
        )
        held_before = set(ray.util.placement_group_table())
        controller = actor.remote(**settings)
        done = controller.run.remote()
        try:
            self._follow(done)
            ray.get(done)
            return ray.get(controller.get_result.remote())
        except BaseException:
            ray.kill(controller)
            ray.wait([done], timeout=_KILLED_SECONDS)  # what it still writes would hinder the removal of its folder
            if _in_driver():
                _remove_groups(set(ray.util.placement_group_table()) - held_before)
            raise


def _in_driver() -> bool:
    """Whether this is a job's own process, with which all ends that it started, and not, say, a trial's."""
    return ray.get_runtime_context().get_actor_id() is None


def _remove_groups(groups: set[str]) -> None:
    """Remove placement groups, given by their ids in hex, that are of this job, with whose id theirs end."""
    job = ray.get_runtime_context().get_job_id()
    for group in groups:
        if group.endswith(job):
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


class _GiveBack(WorkerGroupCallback):
    """Where a worker dies while the process group is set up, Ray Train (2.60) forgets the group, but not what it holds:
    its placement group moves to the next node that comes, and where there is no other room, no later group ever starts.
    """

    def __init__(self) -> None:
        self._group: Any = None

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        self._give_back()
        try:
            yield
        except Exception:
            self._give_back()
            raise

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def _give_back(self) -> None:
        group, self._group = self._group, None
        if group is not None and group.has_started():  # false once Ray Train itself has shut it down
            group.get_worker_group_state().shutdown()
