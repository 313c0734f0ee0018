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
    """Run or continue the sweep, and show its trials."""
    from crate_ray.ray_cluster import start_ray
    from crate_ray.sweeps.report import best_trial, results_table
    from crate_ray.sweeps.run import BEST_FILE, open_sweep, run_sweep

    sweep, shared = open_sweep(config)
    start_ray(dashboard=True)  # Ray Train uses it to find killed trials and to release their resources
    records = run_sweep(sweep, shared)
    frame = results_table(records, sweep)
    table = Table(title=f"{sweep.name}: {sweep.objective}")
    for name in frame.columns:
        table.add_column(name)
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row))
    console().print(table)
    if best_trial(records, sweep) is None:
        raise UserError("no trial finished; the table's last column says why")
    print(f"best: {sweep.storage}/{sweep.name}/{BEST_FILE}  ({command('pretrain')} --config …)")


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_job(SweepConfig, main)
