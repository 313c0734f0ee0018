"""Pretrain CRATE-MAE or ViT-MAE: crate-ray pretrain --data /path/to/images, or --config cifar10.yaml

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

from typing import Any, NoReturn

from crate_ray.cli import run_job
from crate_ray.config import PretrainConfig
from crate_ray.training.display import ProgressDisplay


def main(config: PretrainConfig) -> None:
    """Start or resume the run, follow it, and leave its model in the run's folder and in MLflow."""
    from crate_ray.ray_cluster import start_ray
    from crate_ray.runs.planning import driver_lease
    from crate_ray.runs.pretraining import open_run, start_from
    from crate_ray.runs.references import initial_weights
    from crate_ray.tracking.pretraining import is_published, publish, track
    from crate_ray.training.pretraining import PretrainTask
    from crate_ray.training.ray.driver import train_on_ray

    with driver_lease(config) as lease:
        run = open_run(config)
        if run.is_finished and is_published(run):
            print(f"run {config.name!r} is already finished: step {run.first_step} of {run.total_steps}")
            return
        run = start_from(run, lambda reference: initial_weights(reference, config))
        with track(run, lease) as tracker:
            if not run.is_finished:
                start_ray()
                with ProgressDisplay(run.first_step, run.total_steps) as display:
                    train_on_ray(run, lease, PretrainTask, [tracker, display])
            folder = publish(run, tracker)
    print(f"model      {folder}")
    print(f"MLflow run {tracker.where}")


def choose_settings(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Complete the settings of `--data PATH`: prepare the data, and choose what the user left open."""
    from crate_ray.jobs.automatic import complete

    return complete(values, path)


def run() -> NoReturn:
    """Parse the command line and pretrain."""
    run_job(PretrainConfig, main, complete=choose_settings)
