"""Measurements to compare with: python jobs/benchmark.py data, python jobs/benchmark.py order"""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from crate_ray.benchmarks.data_loading import compare
from crate_ray.benchmarks.data_order import measure_order
from crate_ray.cli import run_subcommand
from crate_ray.config import BenchmarkDataConfig, BenchmarkOrderConfig
from crate_ray.errors import UserError
from crate_ray.progress import console


def data(config: BenchmarkDataConfig) -> None:
    """Measure our loader and stock webdataset, and show the fastest of each as a table."""
    _check_writable(config.json_file)
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


def order(config: BenchmarkOrderConfig) -> None:
    """Measure planning and mixing, and show them as a table."""
    _check_writable(config.json_file)
    report = measure_order(config)
    if config.json_file:
        Path(config.json_file).write_text(json.dumps(report, indent=2) + "\n")
    planning, mixing = report["planning"], report["distinct_classes"]
    samples = config.num_shards * config.shard_samples
    table = Table(title=f"{samples:,} samples in {config.num_shards:,} shards", show_header=False)
    table.add_row("open manifest and index", f"{planning['open_seconds']:.2f} s")
    table.add_row("plan, and find a worker's first windows", f"{planning['plan_seconds']:.2f} s")
    table.add_row("samples of a step anywhere", f"{planning['far_step_seconds'] * 1e3:.1f} ms")
    table.add_row("memory of its own for all that", f"{planning['own_memory_bytes'] / 2**20:,.0f} MiB")
    table.add_row("pages of the index that are mapped", f"{planning['mapped_memory_bytes'] / 2**20:,.0f} MiB")
    console().print(table)
    table = Table(title=f"classes in a batch of {config.batch_size}, of {config.classes} that lie sorted")
    table.add_column("loader")
    table.add_column("distinct classes", justify="right")
    table.add_row(f"ours, blocks of {mixing['block_samples']:.0f}", f"{mixing['ours']:.0f}")
    table.add_row("webdataset, its documented buffer", f"{mixing['stock']:.0f}")
    table.add_row("webdataset, a buffer as large as ours", f"{mixing['stock_with_our_memory']:.0f}")
    table.add_row("uniform", f"{mixing['uniform']:.0f}")
    console().print(table)


def _check_writable(json_file: str | None) -> None:
    """Find out now, rather than when all is measured."""
    if json_file:
        try:
            Path(json_file).open("a").close()
        except OSError as error:
            raise UserError(f"cannot write {json_file}: {error.strerror}; name another --json file") from None


if __name__ == "__main__":
    run_subcommand({"data": (BenchmarkDataConfig, data), "order": (BenchmarkOrderConfig, order)})
