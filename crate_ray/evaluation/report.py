"""The evaluation of a model as one HTML page that needs nothing else, and as JSON with every number."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from importlib.metadata import version

from jinja2 import Environment, PackageLoader, StrictUndefined

from crate_ray.config import EvaluateConfig, Settings
from crate_ray.evaluation import figures
from crate_ray.evaluation.classification import Classification
from crate_ray.evaluation.figures import Image
from crate_ray.evaluation.intervals import Estimate
from crate_ray.evaluation.layers import Structure
from crate_ray.evaluation.reconstruction import Reconstruction
from crate_ray.evaluation.segmentation import Segmentation
from crate_ray.evaluation.subject import Subject

HTML_FILE, JSON_FILE = "report.html", "report.json"
_TEMPLATE = "report.html.j2"


class ModelFacts(Settings):
    """Which model was measured."""

    reference: str
    """What was asked for."""
    title: str
    """What it is."""
    parameters: int
    """Trainable numbers of encoder and decoder."""
    weights: str
    """SHA-256 of weights and preprocessing."""
    step: int
    """Optimiser steps behind the weights; 0 where that is not known."""
    trained_on: str | None
    """Digest of its training data's manifest, where known."""
    settings: dict[str, object]
    """Its architecture."""

    @classmethod
    def of(cls, subject: Subject, reference: str) -> ModelFacts:
        """Facts of a subject that was asked for under a reference."""
        description = subject.description
        return cls(
            reference=reference,
            title=subject.title,
            parameters=subject.num_parameters,
            weights=subject.digest,
            step=description.step,
            trained_on=description.dataset,
            settings=description.model.model_dump(mode="json"),
        )


class Report(Settings):
    """All that was measured; sections without data are None, and said to be in left_out."""

    created: str
    """When, UTC."""
    version: str
    """Version of crate-ray."""
    model: ModelFacts
    """What was measured."""
    baseline: ModelFacts | None
    """What was measured beside it."""
    settings: dict[str, object]
    """How it was measured."""
    left_out: dict[str, str]
    """Sections that are missing, and why."""
    classification: Classification | None = None
    reconstruction: Reconstruction | None = None
    structure: Structure | None = None
    segmentation: Segmentation | None = None
    conclusions: dict[str, list[str]]
    """Plain sentences, by section."""

    def metrics(self) -> dict[str, float]:
        """The main numbers, for MLflow."""
        sections = (self.classification, self.reconstruction, self.structure, self.segmentation)
        return {name: value for section in sections if section for name, value in section.metrics().items()}

    def to_json(self) -> bytes:
        """The content of report.json."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def describe(config: EvaluateConfig) -> tuple[str, str, dict[str, object]]:
    """Time, version and the settings of an evaluation; where MLflow and object storage are is nobody's business."""
    hidden = {"tracking", "s3", "features_dir", "features_bytes"}
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return now, version("crate-ray"), config.model_dump(mode="json", exclude=hidden)


def render(report: Report, images: dict[str, list[Image]]) -> bytes:
    """The page, with each section's figures inside. Every name and path in it is escaped."""
    environment = Environment(
        loader=PackageLoader("crate_ray.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "plain": _plain, "about": _about, "data_uri": _data_uri}
    return environment.get_template(_TEMPLATE).render(report=report, images=images).encode()


def charts(report: Report) -> dict[str, list[Image]]:
    """The figures that follow from the numbers alone, by section."""
    out: dict[str, list[Image]] = {}
    if report.classification:
        by_layer = figures.accuracy_by_layer(report.classification)
        out["classification"] = [figures.accuracies(report.classification), *([by_layer] if by_layer else [])]
    if report.reconstruction:
        out["reconstruction"] = [figures.reconstruction_errors(report.reconstruction)]
    if report.structure:
        draw = (figures.layer_measures, figures.compression_steps, figures.codebooks_and_undoing)
        out["structure"] = [one(report.structure) for one in draw]
    if report.segmentation:
        out["segmentation"] = [figures.foregrounds(report.segmentation), figures.head_table(report.segmentation)]
    return out


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _plain(estimate: Estimate | None, digits: int = 3) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.{digits}g} [{estimate.low:.{digits}g}, {estimate.high:.{digits}g}]"


def _about(estimate: Estimate | None, digits: int = 3, factor: float = 1) -> str:
    """A mean and half the width of its interval, which is symmetric."""
    if estimate is None:
        return "–"
    return f"{factor * estimate.value:.{digits}g} ± {factor * (estimate.high - estimate.low) / 2:.2g}"


def _data_uri(image: Image) -> str:
    return f"data:{image.mime};base64,{base64.b64encode(image.data).decode()}"
