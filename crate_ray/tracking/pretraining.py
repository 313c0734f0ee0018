"""A training run in MLflow: its parameters, lineage, code and environment, and the model that it publishes."""

from __future__ import annotations

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
from pydantic import ValidationError

from crate_ray.data.format.dataset import ShardSet
from crate_ray.models.exported import DESCRIPTION_FILE, WEIGHTS_FILE, ModelDescription
from crate_ray.runs.export import export_run
from crate_ray.runs.pretraining import Run
from crate_ray.storage.interface import NotFound
from crate_ray.storage.lease import Lease, LeaseLost
from crate_ray.storage.node_folders import spool_folder, user_name
from crate_ray.tracking.run_tracker import RunTracker, flatten

_MODEL_FOLDER = "model"
_DESCRIPTION = f"{_MODEL_FOLDER}/{DESCRIPTION_FILE}"


@contextmanager
def track(
    run: Run, lease: Lease, extra_tags: Mapping[str, str] | None = None, *, must_record: bool = True
) -> Iterator[RunTracker]:
    """Track a run in MLflow. Its status is RUNNING inside the context, then FINISHED, FAILED or (Ctrl-C) KILLED.

    Hold the run's lease, because drivers of the same run share its MLflow run and, on one machine, its spool.

    Raises:
        UserError: MLflow cannot record a new run, and `must_record` is set.
    """
    lease.check()
    config = run.config
    start = run.record.finetune
    tags = source_tags("finetune" if start else "pretrain") | dict(extra_tags or {})
    parent = start.parent if start else None
    if parent is not None:
        known = {"model": parent.reference, "step": parent.step, "dataset": parent.dataset}
        tags |= flatten({name: value for name, value in known.items() if value is not None}, "crate_ray.parent_")
    shares = [weight / sum(run.mixture.weights) for weight in run.mixture.weights]
    tracker = RunTracker(
        config.tracking,
        run.record.run_key,
        config.name,
        _params(run),
        tags,
        list(map(_lineage, run.mixture.datasets, shares)),
        parent_key=parent.run_key if parent else None,
    )
    tracker.text("environment.txt", environment())
    tracker.check(is_new=must_record and not run.first_step)
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


def _params(run: Run) -> dict[str, str]:
    """A run's settings and data order as MLflow parameters."""
    settings = run.config.model_dump(mode="json")
    start = run.record.finetune
    if start is not None:
        settings |= {"encoder": start.encoder.model_dump(mode="json"), "num_classes": start.classifier.num_classes}
    orders = [order.model_dump(mode="json") for order in run.record.order.datasets]
    order = orders[0] if len(orders) == 1 else {str(number): part for number, part in enumerate(orders)}
    return flatten(settings) | flatten({"order": order, "total_steps": run.total_steps})


def publish(run: Run, tracker: RunTracker) -> str:
    """Export the model of a finished run to its folder and log it to MLflow. Returns the model's folder."""
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        folder = Path(temporary)
        export_run(run.storage, folder)
        tracker.model(folder)
        # The description is written last, because it marks the weights as complete. An old description, from an earlier
        # end of the run, is deleted first: it would not match the new weights.
        run.storage.delete(_DESCRIPTION)
        run.storage.write(f"{_MODEL_FOLDER}/{WEIGHTS_FILE}", folder / WEIGHTS_FILE)
        run.storage.write(_DESCRIPTION, folder / DESCRIPTION_FILE)
    tracker.is_complete = True
    return run.storage.under(_MODEL_FOLDER).uri


def is_published(run: Run) -> bool:
    """Whether a run has published the model of its newest checkpoint and MLflow has received everything."""
    if spool_folder(run.record.run_key).exists():
        return False
    try:
        description = ModelDescription.model_validate_json(run.storage.read_small(_DESCRIPTION))
    except (NotFound, ValidationError):
        return False
    return description.step == run.first_step


def source_tags(job: str) -> dict[str, str]:
    """MLflow tags that name the job, the version of the code, and the user."""
    return {
        "crate_ray.job": job,
        "mlflow.source.type": "JOB",
        "mlflow.source.name": f"jobs/{job}.py",
        "mlflow.source.git.commit": git_commit(),
        "mlflow.user": user_name(),
    }


def git_commit() -> str:
    """Git commit of this code: CRATE_RAY_GIT_COMMIT (submitted jobs have no .git), else from git, else 'unknown'."""
    if commit := os.environ.get("CRATE_RAY_GIT_COMMIT"):
        return commit
    command = ["git", "-C", Path(__file__).parent.as_posix(), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> str:
    """Versions of Python, the platform and all installed packages, one per line."""
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
