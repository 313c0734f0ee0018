"""Runs a comparison: every variant and seed is a pretraining run of its own, measured in the same way, in one table.

Runs that are there are not repeated, so that a comparison which was cut off goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, Field
from scipy import stats

from crate_ray.comparison.variants import OURS, count_parameters, plan_variants
from crate_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, Settings
from crate_ray.data.shards import ShardSet, load_dataset
from crate_ray.data.storage import Storage, open_storage
from crate_ray.errors import UserError
from crate_ray.evaluation.classification import classify
from crate_ray.evaluation.extraction import Extraction
from crate_ray.evaluation.feature_cache import FeatureCache, default_folder
from crate_ray.evaluation.subject import Subject
from crate_ray.progress import ProgressDisplay
from crate_ray.ray_cluster import start_ray
from crate_ray.tracking.pretraining import is_published, publish, track
from crate_ray.tracking.registry import load_described
from crate_ray.training.listener import Listener
from crate_ray.training.run import open_run, pretrain

MEASURES = {
    "loss": "validation loss",
    "probe": "linear probe",
    "probe_best": "linear probe, best layer",
    "knn": "k-NN",
    "knn_best": "k-NN, best layer",
    "images_per_second": "images/s",
    "memory_bytes": "memory",
}
"""Of a run, by name, with titles."""
_FORMATS = {"loss": (1, 4, ""), "images_per_second": (1, 0, ""), "memory_bytes": (2**-20, 0, " MiB")}
"""Scale, digits and unit of what is no accuracy."""
_SPEED_FROM = 0.2  # the first part of a run is left out of its speed


class RunFigures(Settings):
    """What was measured of one run."""

    seed: int
    """Of the run."""
    loss: float
    """Masked loss on the held-out data after the last step."""
    probe: float
    """Test accuracy of the linear probe on the feature that was asked for."""
    probe_best: float
    """The same on the feature and layer that are best on held-out training samples."""
    knn: float
    """Test accuracy of k-NN."""
    knn_best: float
    """The same of the best feature and layer."""
    images_per_second: float
    """Median over the log intervals of all workers together."""
    memory_bytes: float
    """Largest memory of the first worker: of its GPU, or resident."""


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t)."""

    mean: float
    low: float | None
    high: float | None


class Variant(Settings):
    """One model of a comparison."""

    parameters: int
    """Trainable numbers."""
    model: dict[str, object]
    """Its settings."""
    runs: list[RunFigures]
    """One per seed."""
    intervals: dict[str, Interval] = Field(default_factory=dict)
    """By measure, over the seeds."""
    differences: dict[str, Interval] = Field(default_factory=dict)
    """The same of the differences to the first variant, seed by seed; none for the first variant."""


def interval(values: list[float]) -> Interval:
    """Mean and 95 % interval of independent values; one value has none."""
    centre = float(np.mean(values))
    if len(values) < 2:
        return Interval(centre, None, None)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(centre, centre - half, centre + half)


def compare(config: CompareConfig, say: Callable[[str], None]) -> dict[str, Variant]:
    """Train and measure every variant with every seed; the first one is the model that the comparison is about."""
    plan = plan_variants(config)
    train, test = (load_dataset(open_storage(uri, config.s3)) for uri in (config.probe.train, config.probe.test))
    folder = open_storage(config.storage, config.s3).under(config.name)
    extraction = Extraction(FeatureCache(default_folder(), 20 * 2**30), config.s3)
    for runs in plan.values():
        for run in runs:
            if run.data.validation is None:
                raise UserError("compare needs held-out data: set data.validation in base or settings")
            open_run(run)  # whatever would stop the last run stops the comparison before the first
    if not all(folder.exists(_record(run)) for runs in plan.values() for run in runs):
        start_ray()
    found: dict[str, Variant] = {}
    for name, runs in plan.items():
        figures = []
        for run in runs:
            say(f"{name}, seed {run.seed}")
            figures.append(_figures(config, run, folder, (train, test), extraction))
        found[name] = Variant(
            parameters=count_parameters(runs[0].model), model=runs[0].model.model_dump(mode="json"), runs=figures
        )
    ours = found[OURS]
    for name, variant in found.items():
        for measure in MEASURES:
            own, first = ([getattr(run, measure) for run in v.runs] for v in (variant, ours))
            variant.intervals[measure] = interval(own)
            if name != OURS:
                variant.differences[measure] = interval([a - b for a, b in zip(own, first, strict=True)])
    return found


def _figures(
    config: CompareConfig,
    run: PretrainConfig,
    folder: Storage,
    labelled: tuple[ShardSet, ShardSet],
    extraction: Extraction,
) -> RunFigures:
    """Train a run if it is not finished, and measure it if it was not yet."""
    if folder.exists(_record(run)):
        return RunFigures.model_validate_json(folder.read(_record(run)))
    follower = _Follower(folder, f"figures/{run.name}.speed.json")
    opened = open_run(run)
    if not (opened.is_finished and is_published(opened)):
        with track(opened, {"crate_ray.comparison": config.name}) as tracker:
            with ProgressDisplay(opened.first_step, opened.total_steps) as display:
                pretrain(opened, [tracker, display, follower])
            publish(opened, tracker)
    model, description = load_described(opened.storage.uri, config.tracking, config.s3)
    settings = EvaluateConfig(model=opened.storage.uri, probe=config.probe)
    scores = classify([Subject("trained", model, description)], *labelled, settings, config.probe, extraction).metrics()
    figures = RunFigures(
        seed=run.seed,
        probe=scores["probe_accuracy_encoder"],
        probe_best=scores["probe_accuracy_best_encoder"],
        knn=scores["knn_accuracy_encoder"],
        knn_best=scores["knn_accuracy_best_encoder"],
        **follower.figures(opened.total_steps),
    )
    folder.write(_record(run), figures.model_dump_json(indent=1).encode())
    return figures


def _record(run: PretrainConfig) -> str:
    return f"figures/{run.name}.json"


class _Follower(Listener):
    """Keeps speed, memory and loss of a run, in a file too: a run may be finished by a later start."""

    def __init__(self, folder: Storage, name: str) -> None:
        self._folder, self._name = folder, name
        self._kept = _Followed()
        if folder.exists(name):
            self._kept = _Followed.model_validate_json(folder.read(name))

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        kept = self._kept
        if "images_per_second" in values:
            kept.images_per_second[step] = values["images_per_second"]
            memory = values.get("gpu_memory_bytes", values.get("memory_bytes", 0.0))
            kept.memory_bytes = max(kept.memory_bytes, memory)
        if "validation_loss" in values:
            kept.loss[step] = values["validation_loss"]
            self._folder.write(self._name, kept.model_dump_json().encode())

    def figures(self, total_steps: int) -> dict[str, float]:
        """Loss after the last step, median speed, most memory."""
        kept = self._kept
        speeds = [v for step, v in kept.images_per_second.items() if step > _SPEED_FROM * total_steps]
        return {
            "loss": kept.loss[total_steps],
            "images_per_second": float(np.median(speeds)),
            "memory_bytes": kept.memory_bytes,
        }


class _Followed(BaseModel):
    images_per_second: dict[int, float] = {}
    memory_bytes: float = 0.0
    loss: dict[int, float] = {}


def write_report(folder: Storage, config: CompareConfig, found: dict[str, Variant]) -> dict[str, bytes]:
    """Store the table as JSON and Markdown; the files by name."""
    report = {
        "settings": config.model_dump(mode="json", exclude={"s3", "tracking"}),
        "variants": {name: variant.model_dump(mode="json") for name, variant in found.items()},
    }
    files = {
        "comparison.json": json.dumps(report, indent=1).encode(),
        "comparison.md": markdown(config, found).encode(),
    }
    for name, content in files.items():
        folder.write(name, content)
    return files


def markdown(config: CompareConfig, found: dict[str, Variant]) -> str:
    """The comparison as a table."""
    header = ["model", "parameters", *MEASURES.values()]
    lines = [
        f"Means over {len(config.seeds)} seeds with 95 % intervals (Student's t), and below them the differences to "
        f"{OURS} with the same seed; base {Path(config.base).name}.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
    ]
    for name, variant in found.items():
        cells = [_cell(measure, variant.intervals[measure]) for measure in MEASURES]
        lines.append(f"| {name} | {variant.parameters / 1e6:.2f} M | " + " | ".join(cells) + " |")
        if variant.differences:
            cells = [_cell(measure, variant.differences[measure], sign="+") for measure in MEASURES]
            lines.append("| | | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(measure: str, value: Interval, sign: str = "") -> str:
    scale, digits, unit = _FORMATS.get(measure, (100, 1, " %"))
    text = f"{scale * value.mean:{sign},.{digits}f}"
    if value.high is not None:
        text += f" ± {scale * (value.high - value.mean):,.{digits}f}"
    return text + unit
