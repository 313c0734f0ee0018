"""Evaluate a pretrained model: python jobs/evaluate.py --model runs/mine --probe.train … --probe.test … --data …

Or train several models in the same way and evaluate all of them: python jobs/evaluate.py compare --config FILE.yaml

Ray and MLflow are imported only if they are needed: a comparison with --launcher none runs without them.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import CompareConfig, EvaluateConfig
from crate_ray.progress import console
from crate_ray.storage.interface import open_storage


def main(config: EvaluateConfig) -> None:
    """Evaluate a model, and write and log the report."""
    from crate_ray.evaluation.job import evaluate_model

    evaluate_model(config)


def compare_models(config: CompareConfig) -> None:
    """Train and evaluate the models of a comparison, and print and store the table."""
    from crate_ray.comparison.compare import Trainer, compare
    from crate_ray.comparison.table import write_report

    trainer: Trainer
    if config.launcher == "ray":
        from crate_ray.comparison.on_ray import OnRay

        trainer = OnRay(config)
    else:
        from crate_ray.comparison.alone import Alone

        trainer = Alone(config)
    out = console()
    found = compare(config, trainer, lambda what: out.print(what, style="bold", highlight=False))
    folder = open_storage(config.storage, config.s3).under(config.name)
    files = write_report(folder, config, found)
    print(files["comparison.md"].decode())
    print(f"table      {folder.uri}/comparison.md")


def run() -> NoReturn:
    """Run the command."""
    if sys.argv[1:2] == ["compare"]:
        run_job(CompareConfig, compare_models, sys.argv[2:])
    else:
        run_job(EvaluateConfig, main)
