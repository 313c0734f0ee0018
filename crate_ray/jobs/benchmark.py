"""Measure data loading, order, training, overhead and serving, and estimate scaling: crate-ray benchmark data|order|…

Each command imports its own modules when it runs, so training can be measured without Ray and boto3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from rich.table import Table

from crate_ray.cli import run_subcommand
from crate_ray.config import (
    BenchmarkDataConfig,
    BenchmarkOrderConfig,
    BenchmarkOverheadConfig,
    BenchmarkRooflineConfig,
    BenchmarkScalingConfig,
    BenchmarkServeConfig,
    BenchmarkTrainConfig,
)
from crate_ray.errors import UserError
from crate_ray.progress import console

_TITLES = {
    "crate_ray": "ours",
    "webdataset": "webdataset, {} processes",
    "spdl": "spdl",
    "litdata": "litdata, {} processes",
}
_SERVERS = {
    "crate_ray_bytes": "crate-ray serve, bytes",
    "crate_ray_json": "crate-ray serve, JSON",
    "mlflow_json": "mlflow models serve, JSON",
}


def data(config: BenchmarkDataConfig) -> None:
    """Measure our loader, stock webdataset, spdl and LitData, and print the fastest repeat of each as a table."""
    from crate_ray.benchmarks.data_loading import compare

    _check_writable(config.json_file)
    report = compare(config)
    _write_json(config.json_file, report)

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
    notes = []
    for name, found in report["datasets"].items():
        for contestant, title in _TITLES.items():
            if contestant not in found:
                notes.append(f"{name}: {contestant} was not measured: {found['unavailable'][contestant]}.")
                continue
            run = found[contestant]
            ours = contestant == "crate_ray"
            memory = run["peak_memory_bytes"]
            table.add_row(
                name if ours else "",
                title.format(run["processes"]),
                f"{run['images_per_second']:,.0f}",
                f"{run['images_per_second_per_core']:,.0f}",
                f"{run['bytes_per_second'] / 1e6:,.1f}",
                f"{run['first_batch_seconds']:.2f} s",
                "?" if memory is None else f"{memory / 2**20:,.0f} MiB",
                f"{found['ratio_on_same_data']:.2f}" if ours else "",
                f"{found['ratio_vs_webdataset']:.2f}" if ours else "",
            )
        if found["floor_images_per_second"] is not None:
            notes.append(
                f"{name}: reading only the JPEGs' Huffman codes, down to the last row of a crop, reaches "
                f"{found['floor_images_per_second']:,.0f} images/s; our loader reaches {found['share_of_floor']:.0%} "
                "of that."
            )
    console().print(table)
    for note in notes:
        console().print(note)


def order(config: BenchmarkOrderConfig) -> None:
    """Measure planning and mixing, and print tables."""
    from crate_ray.benchmarks.data_order import measure_order

    _check_writable(config.json_file)
    report = measure_order(config)
    _write_json(config.json_file, report)
    planning, mixing = report["planning"], report["distinct_classes"]
    samples = config.num_shards * config.shard_samples
    table = Table(title=f"{samples:,} samples in {config.num_shards:,} shards", show_header=False)
    table.add_row("open manifest and index", f"{planning['open_seconds']:.2f} s")
    table.add_row("plan, and find a worker's first windows", f"{planning['plan_seconds']:.2f} s")
    table.add_row("samples of any step", f"{planning['far_step_seconds'] * 1e3:.1f} ms")
    table.add_row("private memory for all of this", f"{planning['own_memory_bytes'] / 2**20:,.0f} MiB")
    table.add_row("mapped pages of the index", f"{planning['mapped_memory_bytes'] / 2**20:,.0f} MiB")
    console().print(table)
    table = Table(title=f"classes in a batch of {config.batch_size}; the data has {config.classes}, sorted by class")
    table.add_column("loader")
    table.add_column("distinct classes", justify="right")
    table.add_row(f"ours, blocks of {mixing['block_samples']:.0f}", f"{mixing['ours']:.0f}")
    table.add_row("webdataset, its documented buffer", f"{mixing['stock']:.0f}")
    table.add_row("webdataset, a buffer as large as ours", f"{mixing['stock_with_our_memory']:.0f}")
    table.add_row("uniform", f"{mixing['uniform']:.0f}")
    console().print(table)


def train(config: BenchmarkTrainConfig) -> None:
    """Measure training, and print speed and memory as tables."""
    from crate_ray.benchmarks.training import compare as compare_training

    _check_writable(config.json_file)
    report = compare_training(config)
    _write_json(config.json_file, report)
    machine, settings = report["machine"], report["settings"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    peaks = ", ".join(f"{rate / 1e12:,.2f} TFLOP/s in {name}" for name, rate in report["peak_flops"].items())
    headings = ("model", "images/s", "ms/image", "MFU", "peak memory", "× plain", "at most", "memory / plain")
    table = Table(
        title=f"Training at {config.image_size} px, {settings['batch_size']} images a step",
        caption=f"{where}; 100 % MFU is {peaks}; at most: × plain if a step were only its matrix products at that rate",
    )
    for heading in ("size", "precision", *headings):
        table.add_column(heading, justify="left" if heading in ("size", "precision", "model") else "right")
    for preset, precisions in report["presets"].items():
        for precision, found in precisions.items():
            for contestant in config.contestants:
                table.add_row(preset, precision, *_training_row(contestant, found))
    console().print(table)
    if report["image_sizes"]:
        title = f"By image size: {settings['presets'][0]}, {config.precisions[0]}"
        table = Table(title=f"{title}, {settings['image_sizes_batch']} images a step")
        for heading in ("pixels", *headings):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for side, found in report["image_sizes"].items():
            for contestant in config.contestants:
                table.add_row(side, *_training_row(contestant, found))
        console().print(table)


def _training_row(contestant: str, found: dict[str, Any]) -> tuple[str, ...]:
    run, ours = found[contestant], contestant == "crate_mae"
    if "failed" in run:
        return contestant, run["failed"]
    memory = run["peak_memory_bytes"]
    return (
        contestant,
        f"{run['images_per_second']:,.2f}",
        f"{1e3 / run['images_per_second']:,.1f}",
        f"{run['mfu']:.0%}",
        "?" if memory is None else f"{memory / 2**20:,.0f} MiB",
        f"{found['ratio_vs_plain']:.2f}" if ours and "ratio_vs_plain" in found else "",
        f"{found['ratio_limit']:.2f}" if ours and "ratio_limit" in found else "",
        f"{found['memory_vs_plain']:.2f}" if ours and "memory_vs_plain" in found else "",
    )


def overhead(config: BenchmarkOverheadConfig) -> None:
    """Measure the overhead of a Ray Train job, and print it as a table."""
    from crate_ray.benchmarks.overhead import measure

    _check_writable(config.json_file)
    report = measure(config)
    _write_json(config.json_file, report)
    seconds = report["step_seconds"]
    table = Table(
        title=f"{config.workers} workers, batches of {config.batch_size}: {seconds['ray_train']:.3f} s a step as a "
        f"Ray Train job, {seconds['torchrun']:.3f} s bare",
        caption=f"{report['machine']['cpu']}, {report['machine']['cores']} cores",
    )
    table.add_column("overhead")
    table.add_column("share of the time", justify="right")
    table.add_row("Ray Train job against bare torchrun", f"{report['ray_overhead']:+.2%}")
    if report["beside_share"] is not None:
        table.add_row("cores that Ray and the driver use", f"{report['beside_share']:.2%}")
    table.add_row("waiting for data", f"{report['data_wait_share']:.2%}")
    table.add_row(f"logging every {config.log_every} steps", f"{report['logging_share']:.2%}")
    if found := report.get("checkpoint"):
        table.add_row(
            f"a {found['preset']} checkpoint every {found['steps_between']} steps "
            f"({found['blocking_seconds']:.2f} s blocking, {found['background_seconds']:.1f} s in the background)",
            f"{found['share']:.2%}",
        )
    console().print(table)


def roofline(config: BenchmarkRooflineConfig) -> None:
    """Estimate the least time of a training step by what takes it, and print it as a table."""
    from crate_ray.benchmarks.roofline import FORMS, estimate_presets

    _check_writable(config.json_file)
    report = estimate_presets(config)
    _write_json(config.json_file, report)
    table = Table(
        title=f"A training step of {config.batch_size} images at {config.image_size} px, bf16: estimated, not measured",
        caption=f"{config.reached:.0%} of {config.peak_flops / 1e12:,.0f} TFLOP/s and of "
        f"{config.bytes_per_second / 1e12:.2f} TB/s; MFU of {config.peak_flops / 1e12:,.0f} TFLOP/s",
    )
    table.add_column("size")
    table.add_column("form")
    for heading in ("TFLOP", "GB", "ms", "MFU", "products", "attention", "the rest"):
        table.add_column(heading, justify="right")
    for preset, forms in report["presets"].items():
        for form in FORMS:
            found = forms[form]
            parts = [f"{1e3 * found[part]:.1f} ms" for part in ("products", "attention", "rest")]
            figures = (f"{found['flops'] / 1e12:.1f}", f"{found['bytes'] / 1e9:,.0f}", f"{1e3 * found['seconds']:.1f}")
            table.add_row(preset if form == FORMS[0] else "", form, *figures, f"{found['mfu']:.0%}", *parts)
    console().print(table)


def scaling(config: BenchmarkScalingConfig) -> None:
    """Estimate step times on many GPUs, and print them as a table."""
    from crate_ray.benchmarks.scaling import estimate
    from crate_ray.comparison.variants import count_parameters

    _check_writable(config.json_file)
    parameters = count_parameters(config.model)
    found = {s: [estimate(s, parameters, n, config) for n in config.gpus] for s in ("ddp", "fsdp")}
    figures = {s: [vars(e) | {"efficiency": e.efficiency} for e in estimates] for s, estimates in found.items()}
    _write_json(config.json_file, {"parameters": parameters, **figures})
    table = Table(
        title=f"Estimate: {parameters / 1e6:.1f} M parameters, batches of {config.batch_size}",
        caption="ring collectives; computation at mfu of the peak; not a measurement",
    )
    for heading in ("GPUs", "images each", "sent", "compute", "ddp: exposed", "share", "fsdp: exposed", "share"):
        table.add_column(heading, justify="right")
    for ddp, fsdp in zip(found["ddp"], found["fsdp"], strict=True):
        shown = [
            f"{ddp.samples_per_gpu:g}",
            f"{ddp.bytes_per_gpu / 1e6:,.0f} MB",
            f"{ddp.compute_seconds * 1e3:,.2f} ms",
        ]
        for one in (ddp, fsdp):
            shown += [f"{one.exposed_seconds * 1e3:,.2f} ms", f"{one.efficiency:.0%}"]
        table.add_row(str(ddp.gpus), *shown)
    console().print(table)


def serve(config: BenchmarkServeConfig) -> None:
    """Measure servers of a model, and print their throughput and latency as a table."""
    from crate_ray.benchmarks.serving import measure_serving

    _check_writable(config.json_file)
    report = measure_serving(config)
    _write_json(config.json_file, report)
    machine = report["machine"]
    table = Table(
        title=f"{config.model or config.preset}: requests of one JPEG of {config.picture_side} px, "
        f"fastest of {config.repeats} × {config.seconds:g} s",
        caption=f"{machine['cpu']}, {machine['cores']} cores, load {report['load_before']:.1f} before, "
        f"{report['load_after']:.1f} after",
    )
    for heading in ("", "clients", "images/s", "p50", "p99"):
        table.add_column(heading, justify="left" if not heading else "right")
    for size in ("1", str(config.batch_size)):
        what = "one picture" if size == "1" else f"{size} pictures"
        table.add_row(f"plain calls of {what}", "", *_serving_row(report["in_process"][size]))
    for name, title in _SERVERS.items():
        for clients, found in report[name].items():
            table.add_row(title, clients, *_serving_row(found))
    console().print(table)


def _serving_row(found: dict[str, float]) -> tuple[str, ...]:
    times = (f"{1e3 * found[name]:,.0f} ms" for name in ("p50_seconds", "p99_seconds"))
    return (f"{found['images_per_second']:,.1f}", *times)


def _write_json(json_file: str | None, report: Mapping[str, Any]) -> None:
    if json_file:
        Path(json_file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _check_writable(json_file: str | None) -> None:
    """Check before the measurement that the JSON file can be written."""
    if json_file:
        try:
            Path(json_file).open("a").close()
        except OSError as error:
            raise UserError(f"cannot write {json_file}: {error.strerror}; give another --json file") from None


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_subcommand(
        {
            "data": (BenchmarkDataConfig, data),
            "order": (BenchmarkOrderConfig, order),
            "train": (BenchmarkTrainConfig, train),
            "overhead": (BenchmarkOverheadConfig, overhead),
            "roofline": (BenchmarkRooflineConfig, roofline),
            "scaling": (BenchmarkScalingConfig, scaling),
            "serve": (BenchmarkServeConfig, serve),
        }
    )
