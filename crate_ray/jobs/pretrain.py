"""Pretrain CRATE-MAE or ViT-MAE on sharded images: python jobs/pretrain.py --config jobs/configs/demo.yaml

Modules that take seconds to import are imported after the settings are parsed.
"""

from __future__ import annotations

from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import PretrainConfig


def main(config: PretrainConfig) -> None:
    """Start or resume the run, and publish its model in the run's folder and in MLflow."""
    from crate_ray.runs.pretraining import open_pretraining
    from crate_ray.tracking.pretraining import publish
    from crate_ray.training.lifecycle import run_training
    from crate_ray.training.pretraining import PretrainTask

    finished = run_training(config, PretrainTask, open_pretraining, publish)
    run = finished.run
    if finished.result is None:
        print(f"run {config.name!r} is already finished: step {run.first_step} of {run.total_steps}")
        return
    print(f"model      {finished.result}")
    print(f"MLflow run {finished.mlflow_run}")


def run() -> NoReturn:
    """Run the command."""
    run_job(PretrainConfig, main)
