"""Measurements to compare with: python jobs/benchmark.py data"""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from crate_ray.benchmarks.data_loading import compare
from crate_ray.cli import run_subcommand
from crate_ray.config import BenchmarkDataConfig
from crate_ray.errors import UserError
from crate_ray.progress import console


def data(config: BenchmarkDataConfig) -> None:
    """Measure our loader and stock webdataset, and show the fastest of each as a table."""
    if config.json_file:  # now, rather than when all is measured
        try:
            Path(config.json_file).open("a").close()
        except OSError as error:
            raise UserError(f"cannot write {config.json_file}: {error.strerror}; name another --json file") from None
    report = compare(config)
    if config.json_file:
        Path(config.json_file).write_text(json.dumps(report, indent=2) + "\n")

    machine = report["machine"]
    turbo = "with" if machine["libjpeg_turbo_3"] else "without"
    table = Table(
        title=f"{config.image_size} px, batches of {config.batch_size}, "
        f"fastest of {config.repeats} × {config.seconds:g} s",
        caption=f"{machine['cpu']}, {machine['cores']} cores, {turbo} libjpeg-turbo 3",
    )
    first = next(iter(report["datasets"]))
    table.add_column("data")
    table.add_column("loader")
    same, other = "× webdataset", f"× webdataset on {first}"
    for heading in ("images/s", "per core", "MB/s", "first batch", "peak memory", same, other):
        table.add_column(heading, justify="right")
    for name, found in report["datasets"].items():
        for contestant in ("crate_ray", "webdataset"):
            run = found[contestant]
            ours = contestant == "crate_ray"
            memory = run["peak_memory_bytes"]
            table.add_row(
                name if ours else "",
                "ours" if ours else f"webdataset, {run['processes']} processes",
                f"{run['images_per_second']:,.0f}",
                f"{run['images_per_second_per_core']:,.0f}",
                f"{run['bytes_per_second'] / 1e6:,.1f}",
                f"{run['first_batch_seconds']:.2f} s",
                "?" if memory is None else f"{memory / 2**20:,.0f} MiB",
                f"{found['ratio_on_same_data']:.2f}" if ours else "",
                f"{found['ratio_vs_webdataset']:.2f}" if ours else "",
            )
    console().print(table)


if __name__ == "__main__":
    run_subcommand({"data": (BenchmarkDataConfig, data)})
