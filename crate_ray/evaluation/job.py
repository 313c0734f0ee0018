"""Evaluate the models of a configuration, write the report to a folder, and log it to MLflow."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from crate_ray.config import EvaluateConfig
from crate_ray.errors import UserError
from crate_ray.evaluation.evaluate import evaluate
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.report import HTML_FILE, JSON_FILE, Report, evaluation_folder, render
from crate_ray.progress import console
from crate_ray.runs.mlflow_lookup import find_run, first_line, open_client
from crate_ray.runs.references import load_encoder, locate, parse
from crate_ray.storage.interface import Storage, open_storage


class Evaluation(NamedTuple):
    """A finished evaluation."""

    report: Report
    """All numbers."""
    page: str
    """Address of the HTML page."""
    run_id: str | None
    """MLflow run that the report was logged to, if any."""


def evaluate_model(config: EvaluateConfig) -> None:
    """Evaluate a model, write and log the report, and print its conclusions and its address."""
    out = console()
    done = run_evaluation(config, lambda line: out.print(line, soft_wrap=True))
    for section, sentences in done.report.conclusions.items():
        out.print(f"\n{section}", style="bold")
        for sentence in sentences:
            out.print(f"  {sentence}")
    print(f"\nreport     {done.page}")
    print(f"MLflow run {done.run_id or 'none: MLflow does not know the run that trained this model'}")


def run_evaluation(config: EvaluateConfig, say: Callable[[str], None]) -> Evaluation:
    """Evaluate a model, write the report as HTML and JSON, and log it. `say` prints a line of progress."""
    trained = _load("trained", config.model, config, say)
    baseline = _load("baseline", config.baseline, config, say) if config.baseline else None
    output = _report_storage(config, trained.description.step)
    report, images = evaluate(config, trained, baseline, lambda what: say(f"measuring {what}"))
    files = {JSON_FILE: report.to_json(), HTML_FILE: render(report, images)}
    for name, content in files.items():
        output.write(name, content)
    return Evaluation(report, f"{output.uri}/{HTML_FILE}", _log(report, files, trained, config))


def _load(name: str, reference: str, config: EvaluateConfig, say: Callable[[str], None]) -> EvaluatedModel:
    model, description = load_encoder(reference, config.tracking, config.s3, config.image_size)
    step = f", step {description.step}" if description.step else ""
    say(f"{name} model: {reference}{step}")
    return EvaluatedModel(name, model, description)


def _report_storage(config: EvaluateConfig, step: int) -> Storage:
    """Folder for the report: by default in the folder of the run or model, else in the working folder."""
    if config.output:
        return open_storage(config.output, config.s3)
    reference, evaluation = parse(config.model), evaluation_folder(config.image_size)
    located = locate(config.model, config.tracking, config.s3) if reference.kind == "folder" else None
    if located is None:
        name = re.sub(r"[^\w.-]+", "-", config.model).strip("-.")
        return open_storage(f"{evaluation}/{name}", config.s3)
    if reference.checkpoint is not None:
        return located.storage.under(f"{evaluation}/step-{step:08d}")
    return located.storage.under(evaluation)


def _log(report: Report, files: dict[str, bytes], trained: EvaluatedModel, config: EvaluateConfig) -> str | None:
    """Log main metrics and report to the MLflow run that trained the model. Returns its id; None without such a run."""
    run_key, step = trained.description.run_key, trained.description.step
    if run_key is None:
        return None
    try:
        client = open_client(config.tracking)
    except UserError:  # there is no MLflow database, so there is no run
        return None
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    try:
        run_id = find_run(client, run_key)
        if run_id is None:
            return None
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(n, v, now, step) for n, v in report.metrics().items()])
        with tempfile.TemporaryDirectory(prefix="crate-ray-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            client.log_artifacts(run_id, folder, report.folder())
    except MlflowException as error:
        print(f"the report could not be logged to MLflow ({first_line(error)}); its files are complete")
        return None
    return run_id
