"""The report of an evaluation: one self-contained HTML page, and JSON with every number."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version

from jinja2 import Environment, PackageLoader, StrictUndefined

from crate_ray.config import EvaluateConfig, Record
from crate_ray.evaluation import figures
from crate_ray.evaluation.classification import Classification
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.figures import Image
from crate_ray.evaluation.intervals import Estimate
from crate_ray.evaluation.layers import Structure
from crate_ray.evaluation.learning import Learning
from crate_ray.evaluation.reconstruction import Reconstruction
from crate_ray.evaluation.segmentation import Segmentation

HTML_FILE, JSON_FILE = "report.html", "report.json"
_TEMPLATE = "report.html.j2"


_Section = Classification | Reconstruction | Structure | Learning | Segmentation


class ModelFacts(Record):
    """The model that was evaluated."""

    reference: str
    """Reference to the model, as in the settings."""
    title: str
    """Name of the model."""
    parameters: int
    """Number of parameters of encoder and decoder."""
    weights: str
    """SHA-256 of weights and preprocessing."""
    step: int
    """Optimiser steps of the training; 0 if unknown."""
    trained_on: str | None
    """Digest of the training data's manifest, if known."""
    settings: dict[str, object]
    """Its architecture."""

    @classmethod
    def of(cls, evaluated: EvaluatedModel, reference: str) -> ModelFacts:
        """Facts of the model behind a reference."""
        description = evaluated.description
        return cls(
            reference=reference,
            title=evaluated.title,
            parameters=evaluated.num_parameters,
            weights=evaluated.digest,
            step=description.step,
            trained_on=description.dataset,
            settings=description.model.model_dump(mode="json"),
        )


class Report(Record):
    """Everything that was measured. Sections without data are None and listed in left_out."""

    created: str
    """Date and time, UTC."""
    version: str
    """Version of crate-ray."""
    model: ModelFacts
    """The evaluated model."""
    baseline: ModelFacts | None
    """The model it is compared with."""
    settings: dict[str, object]
    """Settings of the evaluation."""
    image_size: int | tuple[int, int] | None = None
    """Size of the images, if another one than that of the training was asked for."""
    left_out: dict[str, str]
    """Missing sections, with the reason."""
    classification: Classification | None = None
    reconstruction: Reconstruction | None = None
    structure: Structure | None = None
    learning: Learning | None = None
    segmentation: Segmentation | None = None
    conclusions: dict[str, list[str]]
    """Sentences by section."""

    def metrics(self) -> dict[str, float]:
        """The main numbers, for MLflow, as evaluation/<dataset>/<metric>. So evaluations on several datasets stay.

        With another image size, as evaluation-<size>px/<dataset>/<metric>.
        """
        return {
            f"{evaluation_folder(self.image_size)}/{_label(addresses)}/{name}": value
            for section, addresses in self._sections()
            for name, value in section.metrics().items()
        }

    def folder(self) -> str:
        """Folder of the report among a run's artifacts, which names the datasets and the step."""
        addresses = [address for _, addresses in self._sections() for address in addresses]
        return f"{evaluation_folder(self.image_size)}/{_label(addresses)}/step-{self.model.step:08d}"

    def _sections(self) -> list[tuple[_Section, list[str]]]:
        """The sections that were measured, with the addresses of their datasets; the first one names the section."""
        out: list[tuple[_Section, list[str]]] = []
        if self.classification:
            out.append((self.classification, [self.classification.test, self.classification.train]))
        for section in (self.reconstruction, self.structure, self.learning, self.segmentation):
            if section:
                out.append((section, [section.data]))
        return out

    def to_json(self) -> bytes:
        """The content of report.json."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def evaluation_folder(image_size: int | tuple[int, int] | None) -> str:
    """Name of the folder of reports with this image size, and of their metrics; None for that of the training."""
    if image_size is None:
        return "evaluation"
    return f"evaluation-{image_size if isinstance(image_size, int) else 'x'.join(map(str, image_size))}px"


def _label(addresses: list[str]) -> str:
    """Name of datasets in MLflow: the end of the first one's address, and the start of a digest of all addresses."""
    end = re.sub(r"[^\w.-]+", "-", "-".join(addresses[0].rstrip("/").split("/")[-2:])).strip("-.")[-60:]
    return f"{end}-{sha256(json.dumps(addresses).encode()).hexdigest()[:6]}"


def describe(config: EvaluateConfig) -> tuple[str, str, dict[str, object]]:
    """Time, version and settings of an evaluation, without the addresses of MLflow and object storage."""
    hidden = {"tracking", "s3", "features_dir", "features_bytes"}
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return now, version("crate-ray"), config.model_dump(mode="json", exclude=hidden)


def render(report: Report, images: dict[str, list[Image]]) -> bytes:
    """The HTML page, with each section's figures embedded. Names and paths are escaped."""
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
    """Figures that are drawn from the report's numbers alone, by section."""
    out: dict[str, list[Image]] = {}
    if report.classification:
        by_layer = figures.accuracy_by_layer(report.classification)
        out["classification"] = [figures.accuracies(report.classification), *([by_layer] if by_layer else [])]
    if report.reconstruction:
        out["reconstruction"] = [figures.reconstruction_errors(report.reconstruction)]
    if report.structure:
        draw = (figures.layer_measures, figures.compression_steps, figures.codebooks_and_undoing)
        out["structure"] = [one(report.structure) for one in draw]
    if report.learning:
        out["learning"] = [figures.signals(report.learning)]
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
    """A mean and half the width of its symmetric interval."""
    if estimate is None:
        return "–"
    return f"{factor * estimate.value:.{digits}g} ± {factor * (estimate.high - estimate.low) / 2:.2g}"


def _data_uri(image: Image) -> str:
    return f"data:{image.mime};base64,{base64.b64encode(image.data).decode()}"
