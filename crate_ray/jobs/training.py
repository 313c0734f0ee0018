"""The common part of the pretraining and fine-tuning jobs: train, then print the results and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TypeVar

from crate_ray.config import FinetuneConfig, PretrainConfig
from crate_ray.evaluation.online import measure_checkpoint
from crate_ray.runs.mlflow_lookup import tracking_uri
from crate_ray.runs.planning import Run
from crate_ray.tracking.pretraining import publish
from crate_ray.training.lifecycle import run_training
from crate_ray.training.task import Task

_ConfigT = TypeVar("_ConfigT", PretrainConfig, FinetuneConfig)


def train_and_publish(
    config: _ConfigT, task_class: type[Task], open_run: Callable[[_ConfigT], Run], *, show_next: bool = True
) -> None:
    """Start or resume a run, publish its model to the run's folder and to MLflow, and print where both are.

    Args:
        config: settings of the run.
        task_class: what the workers train.
        open_run: opens the run.
        show_next: also print the commands that usually follow.

    Raises:
        UserError: as lifecycle.run_training.
    """
    finished = run_training(config, task_class, open_run, publish, measure=measure_checkpoint)
    run = finished.run
    if finished.result is None:
        print(f"run {config.name!r} is already finished: step {run.first_step} of {run.total_steps}")
        return
    print(f"{'model' if isinstance(config, PretrainConfig) else 'classifier':10} {finished.result}")
    print(f"MLflow run {finished.mlflow_run}")
    for command in next_commands(config) if show_next else ():
        print(f"next       {command}")


def next_commands(config: PretrainConfig | FinetuneConfig) -> list[str]:
    """Shell commands that evaluate a trained model (pretraining only), register it, and show the run in MLflow."""
    run = f"{config.storage.rstrip('/')}/{config.name}"
    uri = tracking_uri(config.tracking)
    tracked = ["--tracking.uri", uri] if config.tracking.uri else []
    endpoint = ["--s3.endpoint-url", config.s3.endpoint_url] if config.s3.endpoint_url else []
    commands = []
    if isinstance(config, PretrainConfig) and config.data.validation:
        commands.append(
            ["crate-ray", "evaluate", "--model", run, "--data", config.data.validation, *tracked, *endpoint]
        )
    commands.append(["crate-ray", "register", "--run", run, *tracked, *endpoint])
    if uri.startswith("sqlite:"):
        commands.append(["mlflow", "ui", "--backend-store-uri", uri])
    return [shlex.join(command) for command in commands]
