"""Results of a comparison: figures of every run, intervals over the seeds, and a table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field
from scipy import stats

from crate_ray.comparison.variants import OURS
from crate_ray.config import CompareConfig, Record
from crate_ray.storage.interface import Storage

MEASURES = {
    "loss": "validation loss",
    "probe": "linear probe",
    "probe_best": "linear probe, best layer",
    "probe_untrained": "linear probe, untrained",
    "knn": "k-NN",
    "knn_best": "k-NN, best layer",
    "knn_untrained": "k-NN, untrained",
    "finetuned": "fine-tuned",
    "scratch": "from scratch",
    "images_per_second": "images/s",
    "memory_bytes": "memory",
}
"""Titles of the measures of a run, by name."""
_FORMATS = {"loss": (1, 4, ""), "images_per_second": (1, 0, ""), "memory_bytes": (2**-20, 0, " MiB")}
"""Scale, digits and unit of the measures that are not accuracies."""


class PretrainFigures(Record):
    """Measurements of one pretraining run."""

    loss: float
    """Masked loss on the held-out data after the last step."""
    images_per_second: float
    """Speed of all workers together; see settled_speed."""
    memory_bytes: float
    """Peak memory of the first worker: of its GPU, or its resident memory without a GPU."""


class RunFigures(PretrainFigures):
    """Measurements of one run, of its probes and of its fine-tuning."""

    seed: int
    """Seed of the run."""
    probe: float
    """Test accuracy of the linear probe on the requested feature."""
    probe_best: float
    """Test accuracy of the linear probe on the feature and layer that are best on held-out training samples."""
    knn: float
    """Test accuracy of k-NN on the requested feature."""
    knn_best: float
    """Test accuracy of k-NN on the feature and layer that are best on held-out training samples."""
    probe_untrained: float
    """Control: test accuracy of the linear probe on the requested feature of the encoder before training."""
    knn_untrained: float
    """Control: test accuracy of k-NN on the requested feature of the encoder before training."""
    finetuned: float | None = None
    """Test accuracy after fine-tuning; None without fine-tuning."""
    scratch: float | None = None
    """Control: test accuracy of the same fine-tuning from random weights; None without fine-tuning."""


class PixelFigures(Record):
    """Control for all models: test accuracies on raw pixels."""

    probe: float
    """Accuracy of a linear probe."""
    knn: float
    """Accuracy of k-NN."""


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t)."""

    mean: float
    low: float | None
    high: float | None


class Variant(Record):
    """One model of a comparison."""

    parameters: int
    """Number of trainable parameters."""
    model: dict[str, object]
    """Its settings."""
    runs: list[RunFigures]
    """One per seed."""
    intervals: dict[str, Interval] = Field(default_factory=dict)
    """Mean and interval over the seeds, by measure."""
    differences: dict[str, Interval] = Field(default_factory=dict)
    """Mean and interval of the differences to the first variant with the same seed. Empty for the first variant."""


class Comparison(Record):
    """All results of a comparison."""

    variants: dict[str, Variant]
    """Variants by name. The others are compared with the first."""
    pixels: PixelFigures
    """Control: the same measures on raw pixels."""


def settled_speed(speeds: list[float]) -> float:
    """Median of a run's images/s over its log intervals, without the first fifth; 0.0 if there are no intervals."""
    settled = speeds[len(speeds) // 5 :]
    return statistics.median(settled) if settled else 0.0


def interval(values: list[float]) -> Interval:
    """Mean and 95 % interval of independent values. A single value has no interval."""
    centre = float(np.mean(values))
    if len(values) < 2:
        return Interval(centre, None, None)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(centre, centre - half, centre + half)


def summarize(found: dict[str, Variant]) -> None:
    """Fill in each variant's intervals and differences, for every measure that all of its runs have."""
    ours = found[OURS]
    for name, variant in found.items():
        for measure in MEASURES:
            own, first = ([getattr(run, measure) for run in v.runs] for v in (variant, ours))
            if None in own:
                continue
            variant.intervals[measure] = interval(own)
            if name != OURS:
                variant.differences[measure] = interval([a - b for a, b in zip(own, first, strict=True)])


def write_report(folder: Storage, config: CompareConfig, found: Comparison) -> dict[str, bytes]:
    """Store the table as JSON and Markdown, and its figure if matplotlib is installed.

    Returns:
        Content of the files by name.
    """
    report = {
        "settings": config.model_dump(mode="json", exclude={"s3", "tracking"}),
        **found.model_dump(mode="json"),
    }
    files = {
        "comparison.json": json.dumps(report, indent=1).encode(),
        "comparison.md": markdown(config, found).encode(),
    }
    try:
        from crate_ray.comparison.figure import figure_of

        files["comparison.png"] = figure_of(found)
    except ModuleNotFoundError as missing:  # some machines without Ray
        if missing.name != "matplotlib":
            raise
    for name, content in files.items():
        folder.write(name, content)
    return files


def _components(config: CompareConfig) -> str:
    if config.components is None and not config.whiten:
        return ""
    number = f"{config.components} " if config.components else "all "
    return f" Probe and k-NN are of {number}principal components{', whitened' if config.whiten else ''}."


def markdown(config: CompareConfig, found: Comparison) -> str:
    """The comparison as a table."""
    measures = [measure for measure in MEASURES if measure in found.variants[OURS].intervals]
    header = ["model", "parameters", *(MEASURES[measure] for measure in measures)]
    seeds = len(config.seeds)
    over = f"Means over {seeds} seeds with 95 % intervals (Student's t)" if seeds > 1 else f"Seed {config.seeds[0]}"
    lines = [
        f"{over}, and below them the differences to {OURS} with the same seed; base {Path(config.base).name}."
        + _components(config),
        "",
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
    ]
    for name, variant in found.variants.items():
        cells = [_cell(measure, variant.intervals[measure]) for measure in measures]
        lines.append(f"| {name} | {variant.parameters / 1e6:.2f} M | " + " | ".join(cells) + " |")
        if variant.differences:
            cells = [_cell(measure, variant.differences[measure], sign="+") for measure in measures]
            lines.append("| | | " + " | ".join(cells) + " |")
    pixels = {name: _cell(name, interval([value])) for name, value in found.pixels.model_dump().items()}
    lines.append("| raw pixels | | " + " | ".join(pixels.get(measure, "") for measure in measures) + " |")
    return "\n".join(lines) + "\n"


def _cell(measure: str, value: Interval, sign: str = "") -> str:
    scale, digits, unit = _FORMATS.get(measure, (100, 1, " %"))
    text = f"{scale * value.mean:{sign},.{digits}f}"
    if value.high is not None:
        text += f" ± {scale * (value.high - value.mean):,.{digits}f}"
    return text + unit
