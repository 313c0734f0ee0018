"""Measure what a model learned: python jobs/evaluate.py --model runs/mine --probe.train … --probe.test … --data …

Or train several models alike and measure all of them: python jobs/evaluate.py compare --config FILE.yaml
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from crate_ray.cli import run_job
from crate_ray.comparison.compare import compare, write_report
from crate_ray.config import CompareConfig, EvaluateConfig
from crate_ray.data.storage import Storage, open_storage
from crate_ray.evaluation.evaluate import evaluate
from crate_ray.evaluation.report import HTML_FILE, JSON_FILE, Report, render
from crate_ray.evaluation.subject import PUBLISHED_SUFFIXES, Subject, find_checkpoint, load_checkpoint, load_file
from crate_ray.progress import console
from crate_ray.tracking.registry import find_run, load_described
from crate_ray.tracking.runs import redact, tracking_uri

FOLDER = "evaluation"


def main(config: EvaluateConfig) -> None:
    """Measure, write the report, log it, and say where it is and what it says."""
    out = console()
    trained = load_subject("trained", config.model, config)
    baseline = load_subject("baseline", config.baseline, config) if config.baseline else None
    report, images = evaluate(config, trained, baseline, lambda what: out.print(f"measuring {what}", highlight=False))
    for section, sentences in report.conclusions.items():
        out.print(f"\n{section}", style="bold")
        for sentence in sentences:
            out.print(f"  {sentence}", highlight=False, markup=False)
    output = report_storage(config)
    files = {JSON_FILE: report.to_json(), HTML_FILE: render(report, images)}
    for name, content in files.items():
        output.write(name, content)
    run_id = log(report, files, trained, config)
    print(f"\nreport     {output.uri}/{HTML_FILE}")
    print(f"MLflow run {run_id or 'none: MLflow does not know the run that trained this model'}")


def load_subject(name: str, reference: str, config: EvaluateConfig) -> Subject:
    """The model behind a reference."""
    if is_file(reference):
        return Subject(name, *load_file(reference, config.s3))
    if found := find_checkpoint(reference, config.s3):
        return Subject(name, *load_checkpoint(*found))
    return Subject(name, *load_described(reference, config.tracking, config.s3))


def report_storage(config: EvaluateConfig) -> Storage:
    """Where the report goes: beside the model where that is a folder."""
    if config.output:
        return open_storage(config.output, config.s3)
    if config.model.startswith(("models:/", "runs:/")) or is_file(config.model):
        name = re.sub(r"[^\w.-]+", "-", config.model).strip("-.")
        return open_storage(f"{FOLDER}/{name}", config.s3)
    if found := find_checkpoint(config.model, config.s3):
        run, step = found
        return run.under(f"{FOLDER}/step-{step:08d}")
    return open_storage(config.model, config.s3).under(FOLDER)


def is_file(reference: str) -> bool:
    """Whether a reference is to a published checkpoint's file."""
    return Path(reference).suffix in PUBLISHED_SUFFIXES and not Path(reference).is_dir()


def log(report: Report, files: dict[str, bytes], trained: Subject, config: EvaluateConfig) -> str | None:
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
            client.log_artifacts(run_id, folder, FOLDER)
    except MlflowException as error:
        print(f"MLflow did not take the report, which is complete without it: {redact(str(error).splitlines()[0])}")
        return None
    return run_id


def compare_models(config: CompareConfig) -> None:
    """Train and measure the models of a comparison, and show and store the table."""
    out = console()
    found = compare(config, lambda what: out.print(what, style="bold", highlight=False))
    folder = open_storage(config.storage, config.s3).under(config.name)
    files = write_report(folder, config, found)
    print(files["comparison.md"].decode())
    print(f"table      {folder.uri}/comparison.md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        run_job(CompareConfig, compare_models, sys.argv[2:])
    else:
        run_job(EvaluateConfig, main)
