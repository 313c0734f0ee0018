"""Measure what a model learned: python jobs/evaluate.py --model runs/mine --probe.train … --probe.test … --data …

Or train several models alike and measure all of them: python jobs/evaluate.py compare --config FILE.yaml

What needs Ray or MLflow is imported where it is needed: a comparison with --launcher none runs without.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from crate_ray.cli import run_job
from crate_ray.config import EvaluateConfig
from crate_ray.jobs import compare


def main(config: EvaluateConfig) -> None:
    """Measure, write the report, log it, and say where it is and what it says."""
    from crate_ray.evaluation.job import evaluate_model

    evaluate_model(config)


def run() -> NoReturn:
    """The command; `evaluate compare` is the same as `compare`."""
    if sys.argv[1:2] == ["compare"]:
        compare.run(sys.argv[2:])
    run_job(EvaluateConfig, main)
