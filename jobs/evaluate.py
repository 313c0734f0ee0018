"""Measure what an encoder learned: python jobs/evaluate.py --model demo/runs/digits --probe.train … --probe.test …"""

from __future__ import annotations

from mlflow import MlflowClient
from rich.table import Table

from crate_ray.cli import run_job
from crate_ray.config import EvaluateConfig
from crate_ray.data.shards import load_dataset
from crate_ray.data.storage import open_storage
from crate_ray.evaluation.probe import probe
from crate_ray.progress import console
from crate_ray.tracking.registry import find_run, load_described
from crate_ray.tracking.runs import tracking_uri

ROWS = {"encoder": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}


def main(config: EvaluateConfig) -> None:
    """Fit the probes, show them, and add them to the run that trained the model."""
    train, test = (load_dataset(open_storage(uri, config.s3)) for uri in (config.probe.train, config.probe.test))
    model, description = load_described(config.model, config.tracking, config.s3)
    report = probe(model, description, train, test, config.probe)
    table = Table(title=f"linear probe, {report.train_samples:,} training and {report.test_samples:,} test samples")
    for heading in ("features", "accuracy", "± (95 %)", "C"):
        table.add_column(heading, justify="left" if heading == "features" else "right")
    for name, score in report.scores().items():
        cells = f"{score.accuracy:.1%}", f"{score.half_width:.1%}", f"{score.strength:g}"
        table.add_row(ROWS[name], *cells)
    console().print(table)
    client = MlflowClient(tracking_uri(config.tracking))
    run_id = find_run(client, description.run_key) if description.run_key else None
    if run_id:
        for name, value in report.metrics().items():
            client.log_metric(run_id, name, value, step=description.step)


if __name__ == "__main__":
    run_job(EvaluateConfig, main)
