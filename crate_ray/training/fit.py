"""Ray Train, in the process of its own that starts its controller.

It imports nothing of ours: a run begins no sooner than this process does.
"""

from __future__ import annotations

import tempfile
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer


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
        TorchTrainer(
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
