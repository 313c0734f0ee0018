"""An evaluation from the references in its settings to the report, in a folder and in MLflow."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from crate_ray.config import EvaluateConfig
from crate_ray.evaluation.evaluate import evaluate
from crate_ray.evaluation.report import HTML_FILE, JSON_FILE, Report, render
from crate_ray.evaluation.subject import PUBLISHED_SUFFIXES, Subject, find_checkpoint, load_checkpoint, load_file
from crate_ray.progress import console
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.tracking.registry import find_run, load_described
from crate_ray.tracking.runs import redact, tracking_uri

_FOLDER = "evaluation"


def evaluate_model(config: EvaluateConfig) -> None:
    """Measure, write the report, log it, and say where it is and what it says."""
    out = console()
    trained = _load_subject("trained", config.model, config)
    baseline = _load_subject("baseline", config.baseline, config) if config.baseline else None
    report, images = evaluate(config, trained, baseline, lambda what: out.print(f"measuring {what}", highlight=False))
    for section, sentences in report.conclusions.items():
        out.print(f"\n{section}", style="bold")
        for sentence in sentences:
            out.print(f"  {sentence}", highlight=False, markup=False)
    output = _report_storage(config)
    files = {JSON_FILE: report.to_json(), HTML_FILE: render(report, images)}
    for name, content in files.items():
        output.write(name, content)
    run_id = _log(report, files, trained, config)
    print(f"\nreport     {output.uri}/{HTML_FILE}")
    print(f"MLflow run {run_id or 'none: MLflow does not know the run that trained this model'}")


def _load_subject(name: str, reference: str, config: EvaluateConfig) -> Subject:
    """The model behind a reference."""
    if _is_file(reference):
        return Subject(name, *load_file(reference, config.s3))
    if found := find_checkpoint(reference, config.s3):
        return Subject(name, *load_checkpoint(*found))
    return Subject(name, *load_described(reference, config.tracking, config.s3))


def _report_storage(config: EvaluateConfig) -> Storage:
    """Where the report goes: beside the model where that is a folder."""
    if config.output:
        return open_storage(config.output, config.s3)
    if config.model.startswith(("models:/", "runs:/")) or _is_file(config.model):
        name = re.sub(r"[^\w.-]+", "-", config.model).strip("-.")
        return open_storage(f"{_FOLDER}/{name}", config.s3)
    if found := find_checkpoint(config.model, config.s3):
        run, step = found
        return run.under(f"{_FOLDER}/step-{step:08d}")
    return open_storage(config.model, config.s3).under(_FOLDER)


def _is_file(reference: str) -> bool:
    """Whether a reference is to a published checkpoint's file."""
    return Path(reference).suffix in PUBLISHED_SUFFIXES and not Path(reference).is_dir()


def _log(report: Report, files: dict[str, bytes], trained: Subject, config: EvaluateConfig) -> str | None:
    """Add main numbers and report to the MLflow run that trained the model; its id, None where there is none."""
    client = MlflowClient(tracking_uri(config.tracking))
    run_key, step = trained.description.run_key, trained.description.step
    try:
        run_id = find_run(client, run_key) if run_key else None
        if run_id is None:
            return None
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(n, v, now, step) for n, v in report.metrics().items()])
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            client.log_artifacts(run_id, folder, _FOLDER)
    except MlflowException as error:
        print(f"MLflow did not take the report, which is complete without it: {redact(str(error).splitlines()[0])}")
        return None
    return run_id
