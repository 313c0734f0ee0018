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
    from crate_ray.jobs.training import train_and_publish

    train_and_publish(config, FinetuneTask, open_finetuning)


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(FinetuneConfig, main)
