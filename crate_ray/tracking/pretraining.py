"""A training run in MLflow: what it is (parameters, lineage, code, environment), and the model that it ends with."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

from mlflow.entities import Dataset

from crate_ray.data.format.dataset import ShardSet
from crate_ray.models.exported import DESCRIPTION_FILE
from crate_ray.runs.export import export_run
from crate_ray.runs.pretraining import Run
from crate_ray.storage.lease import Lease, LeaseLost
from crate_ray.tracking.runs import RunTracker, flatten, spool_folder

_MODEL_FOLDER = "model"


@contextmanager
def track(run: Run, lease: Lease, extra_tags: Mapping[str, str] | None = None) -> Iterator[RunTracker]:
    """Follow a run in MLflow: RUNNING inside, then FINISHED, FAILED or (Ctrl-C) KILLED.

    Drivers of one run share its entry in MLflow and, on one machine, its spool: so the run's lease is needed, entered.
    """
    lease.check()
    config = run.config
    start = run.record.finetune
    tags = source_tags("finetune" if start else "pretrain") | dict(extra_tags or {})
    settings = config.model_dump(mode="json")
    if start is not None:
        settings |= {"encoder": start.encoder.model_dump(mode="json"), "num_classes": start.classifier.num_classes}
    orders = [order.model_dump(mode="json") for order in run.record.order.datasets]
    order = orders[0] if len(orders) == 1 else {str(number): part for number, part in enumerate(orders)}
    params = flatten(settings) | flatten({"order": order, "total_steps": run.total_steps})
    shares = [weight / sum(run.mixture.weights) for weight in run.mixture.weights]
    lineage = list(map(_lineage, run.mixture.datasets, shares))
    parent = start.parent if start else None
    if parent is not None:
        told = {"model": parent.reference, "step": parent.step, "dataset": parent.dataset}
        tags |= flatten({name: value for name, value in told.items() if value is not None}, "crate_ray.parent_")
    tracker = RunTracker(
        config.tracking,
        run.record.run_key,
        config.name,
        params,
        tags,
        lineage,
        parent_key=parent.run_key if parent else None,
    )
    tracker.text("environment.txt", environment())
    try:
        yield tracker
    except LeaseLost:
        tracker.abandon()
        raise
    except BaseException as error:
        stopped = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        patience = min(10, run.config.tracking.deliver_seconds)
        if not tracker.finish("FINISHED" if tracker.is_complete else stopped, timeout=patience):
            print(tracker.undelivered)
        raise
    if not tracker.finish("FINISHED"):
        print(tracker.undelivered)


def publish(run: Run, tracker: RunTracker) -> str:
    """Write the final weights into the run's folder as an exported model, and log it; returns where it is."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_run(run.storage, folder)
        tracker.model(folder)
        # The description last: it says that all the rest is there.
        for path in sorted(folder.iterdir(), reverse=True):
            run.storage.write(f"{_MODEL_FOLDER}/{path.name}", path)
    tracker.is_complete = True
    return run.storage.under(_MODEL_FOLDER).uri


def is_published(run: Run) -> bool:
    """Whether a finished run has left its model, and MLflow has everything of it."""
    return run.storage.exists(f"{_MODEL_FOLDER}/{DESCRIPTION_FILE}") and not spool_folder(run.record.run_key).exists()


def source_tags(job: str) -> dict[str, str]:
    """MLflow tags of a run that say which job of which code made it, and who ran it."""
    return {
        "crate_ray.job": job,
        "mlflow.source.type": "JOB",
        "mlflow.source.name": f"jobs/{job}.py",
        "mlflow.source.git.commit": git_commit(),
        "mlflow.user": getpass.getuser(),
    }


def git_commit() -> str:
    """Commit of the code that runs: CRATE_RAY_GIT_COMMIT (a submitted job has no .git), else git's, else 'unknown'."""
    if commit := os.environ.get("CRATE_RAY_GIT_COMMIT"):
        return commit
    command = ["git", "-C", Path(__file__).parent.as_posix(), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> str:
    """Python, platform and every installed package, one a line."""
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
    return "\n".join([f"python=={platform.python_version()}", f"# {platform.platform()}", *packages]) + "\n"


def _lineage(dataset: ShardSet, share: float) -> Dataset:
    manifest, uri = dataset.manifest, dataset.storage.uri
    profile = manifest.model_dump(
        mode="json", include={"num_samples", "num_shards", "total_bytes", "kind", "num_classes"}
    ) | {"share": share}
    return Dataset(
        name="/".join(uri.rstrip("/").split("/")[-2:]),
        digest=manifest.digest()[:32],
        source_type="s3" if uri.startswith("s3://") else "local",
        source=json.dumps({"uri": uri, "manifest": f"{uri}/manifest.json"}),
        profile=json.dumps(profile),
    )
