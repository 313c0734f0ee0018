"""Search over pretraining settings: crate-ray sweep --config sweep-codebook.yaml

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

from typing import NoReturn

from rich.table import Table

from crate_ray.cli import command, run_job
from crate_ray.config import SweepConfig
from crate_ray.errors import UserError
from crate_ray.progress import console


def main(config: SweepConfig) -> None:
    """Run or continue the sweep, and show its trials and what it found."""
    from crate_ray.ray_cluster import start_ray
    from crate_ray.sweeps.axes import value_text
    from crate_ray.sweeps.best import register_best
    from crate_ray.sweeps.report import BEST_FILE, SUMMARY_FILE, results_table
    from crate_ray.sweeps.results import best_trial
    from crate_ray.sweeps.run import open_sweep, run_sweep

    sweep, shared = open_sweep(config)
    start_ray(dashboard=True)  # Ray Train uses it to find killed trials and to release their resources
    records, summary = run_sweep(sweep, shared)
    frame = results_table(records, sweep).drop(columns=["seconds", "parameters"])
    table = Table(title=f"{sweep.name}: {sweep.objective}")
    for name in frame.columns:
        table.add_column(name)
    for row in frame.itertuples(index=False):
        table.add_row(*("" if value is None or value != value else value_text(value) for value in row))
    console().print(table)
    best = best_trial(records, sweep)
    if summary is None or best is None:
        raise UserError("no trial finished; the table's last column says why")
    for line in summary.lines():
        console().print(line, soft_wrap=True)
    folder = f"{sweep.storage}/{sweep.name}"
    print(f"summary    {folder}/{SUMMARY_FILE}")
    print(f"next       {command('pretrain')} --config {folder}/{BEST_FILE}")
    if sweep.register_best:
        version = register_best(sweep, best, sweep.register_best)
        print(f"registered {sweep.register_best} version {version} is the model of trial {best.trial}")


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(SweepConfig, main)
