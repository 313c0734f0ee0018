"""Fine-tune a pretrained encoder to classify: python jobs/finetune.py --model runs/mine --data.train data/labelled …

What takes seconds to import is imported once the settings are read.
"""

from __future__ import annotations

from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import FinetuneConfig
from crate_ray.training.display import ProgressDisplay


def main(config: FinetuneConfig) -> None:
    """Start or resume the run, follow it, and leave its classifier in the run's folder and in MLflow."""
    from crate_ray.finetuning.run import open_finetuning
    from crate_ray.finetuning.task import FinetuneTask
    from crate_ray.ray_cluster import start_ray
    from crate_ray.runs.planning import driver_lease
    from crate_ray.runs.references import pretrained_model
    from crate_ray.tracking.pretraining import is_published, publish, track
    from crate_ray.training.ray.driver import train_on_ray

    with driver_lease(config) as lease:
        run = open_finetuning(config, lambda reference: pretrained_model(reference, config.tracking, config.s3))
        if run.is_finished and is_published(run):
            print(f"run {config.name!r} is already finished: step {run.first_step} of {run.total_steps}")
            return
        with track(run, lease) as tracker:
            if not run.is_finished:
                start_ray()
                with ProgressDisplay(run.first_step, run.total_steps) as display:
                    train_on_ray(run, lease, FinetuneTask, [tracker, display])
            folder = publish(run, tracker)
    print(f"classifier {folder}")
    print(f"MLflow run {tracker.where}")


def run() -> NoReturn:
    """The command."""
    run_job(FinetuneConfig, main)
