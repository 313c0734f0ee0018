"""Fine-tune a pretrained encoder to classify: crate-ray finetune --model runs/mine --data.train data/labelled

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import FinetuneConfig


def main(config: FinetuneConfig) -> None:
    """Start or resume the run, and publish its classifier in the run's folder and in MLflow."""
    from crate_ray.finetuning.run import open_finetuning
    from crate_ray.finetuning.task import FinetuneTask
    from crate_ray.jobs.next_commands import next_commands
    from crate_ray.tracking.pretraining import publish
    from crate_ray.training.lifecycle import run_training

    finished = run_training(config, FinetuneTask, open_finetuning, publish)
    run = finished.run
    if finished.result is None:
        print(f"run {config.name!r} is already finished: step {run.first_step} of {run.total_steps}")
        return
    print(f"classifier {finished.result}")
    print(f"MLflow run {finished.mlflow_run}")
    for command in next_commands(config):
        print(f"next       {command}")


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(FinetuneConfig, main)
