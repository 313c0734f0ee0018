"""Pretrain CRATE-MAE or ViT-MAE: crate-ray pretrain --data /path/to/images, or --config cifar10.yaml

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

from typing import Any, NoReturn

from crate_ray.cli import run_job
from crate_ray.config import PretrainConfig


def main(config: PretrainConfig) -> None:
    """Start or resume the run, and publish its model in the run's folder and in MLflow."""
    from crate_ray.jobs.training import train_and_publish
    from crate_ray.runs.pretraining import open_pretraining
    from crate_ray.training.pretraining import PretrainTask

    train_and_publish(config, PretrainTask, open_pretraining)


def choose_settings(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Complete the settings of `--data PATH`: prepare the data, and choose the settings that the user did not give."""
    from crate_ray.jobs.automatic import complete

    return complete(values, path)


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(PretrainConfig, main, complete=choose_settings)
