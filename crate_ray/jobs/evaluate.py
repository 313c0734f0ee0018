"""Evaluate a pretrained model: crate-ray evaluate --model runs/mine --probe.train … --probe.test … --data …

`evaluate compare` is the same as `crate-ray compare`.

Ray and MLflow are imported only if they are needed. A comparison with --launcher none runs without them.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import EvaluateConfig
from crate_ray.jobs import compare


def main(config: EvaluateConfig) -> None:
    """Evaluate a model, and write and log the report."""
    from crate_ray.evaluation.job import evaluate_model

    evaluate_model(config)


def run() -> NoReturn:
    """The command; `evaluate compare` is the same as `compare`."""
    if sys.argv[1:2] == ["compare"]:
        compare.run(sys.argv[2:])
    run_job(EvaluateConfig, main)
