"""Ray Train, in the process of its own that starts its controller.

It imports nothing of ours: a run begins no sooner than this process does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback


def fit(loop: list[Any], payload: dict[str, Any], scaling: ray.train.ScalingConfig, max_failures: int) -> None:
    """Ray task: train until the workers are done. Raises what Ray Train gives up with, once they fail too often.

    Args:
        loop: Ray's reference to what every worker runs, in a list, so that it is not fetched here.
        payload: what it is called with.
        scaling: workers and their resources.
        max_failures: how often they are started again.
    """
    # Ray Train's own record of checkpoints, which nobody reads, stays on this node: where it lies in the run's storage,
    # a connection that breaks while the controller writes it ends the run.
    with tempfile.TemporaryDirectory(prefix="crate-ray-train-") as folder:
        _Trainer(
            _work,
            train_loop_config={"loop": loop, "payload": payload},
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=payload["attempt"],
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        ).fit()


def _work(given: dict[str, Any]) -> None:
    ray.get(given["loop"][0])(given["payload"])


class _Trainer(TorchTrainer):
    """Ray Train, which gives back what workers held that died while they were started, and starts no process for Ray
    Data's datasets, which there are none of."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]
        return [_GiveBack(), *callbacks]  # the first to hear of workers, before any can fail


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
