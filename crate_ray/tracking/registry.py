"""Models by name: find, register, promote and load them. The alias @champion moves only forward."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from crate_ray.config import S3Config, TrackingConfig
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import DESCRIPTION_FILE, WEIGHTS_FILE, ModelDescription, load_any, load_exported
from crate_ray.runs.checkpoint import RUN_FILE
from crate_ray.runs.export import export_run
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.tracking.flavor import log_model
from crate_ray.tracking.runs import find_run, redact, tracking_uri

CHAMPION = "champion"
PROBE_TAG = "crate_ray.probe_accuracy"
KIND_TAG = "crate_ray.kind"


def load_model(
    reference: str, *, tracking: TrackingConfig | None = None, s3: S3Config | None = None
) -> MaskedAutoencoder | Classifier:
    """The torch module behind a reference, in evaluation mode, a masked autoencoder or a fine-tuned classifier; see
    `fetch_model` for what can be referred to."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fetch_model(reference, folder, tracking or TrackingConfig(), s3 or S3Config())
        return load_any(folder)[0]


def load_described(
    reference: str, tracking: TrackingConfig, s3: S3Config
) -> tuple[MaskedAutoencoder, ModelDescription]:
    """Masked autoencoder and description behind a reference. Raises UserError for a classifier."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fetch_model(reference, folder, tracking, s3)
        return load_exported(folder)


def fetch_model(reference: str, folder: Path, tracking: TrackingConfig, s3: S3Config) -> None:
    """Copy an exported model into a local folder.

    A reference is `models:/<name>@<alias>` or `models:/<name>/<version>` in MLflow's registry, `runs:/<run id>`, or the
    folder (local or S3) of a run, whose newest checkpoint counts, or of an exported model. Raises UserError when there
    is no such model.
    """
    if reference.startswith("models:/"):
        _fetch_registered(reference, folder, tracking)
    elif reference.startswith("runs:/"):
        export_run(_run_storage(reference.removeprefix("runs:/"), tracking, s3), folder)
    else:
        storage = open_storage(reference, s3)
        if storage.exists(DESCRIPTION_FILE):
            for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
                storage.download(name, folder / name)
        elif storage.exists(RUN_FILE):
            export_run(storage, folder)
        else:
            raise UserError(f"{storage.uri} holds neither a run nor an exported model; give the folder of one")


def register(run: str, name: str, tracking: TrackingConfig, s3: S3Config) -> ModelVersion:
    """Make the encoder, or the classifier, at a run's newest checkpoint a new version of a registered model.

    `run` is the run's folder, or its id in MLflow. Raises UserError when it has no checkpoint, is not in MLflow, or is
    of another kind than the model's versions.
    """
    client = _client(tracking)
    storage = _run_storage(run, tracking, s3)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        description = export_run(storage, folder)
        kind = "encoder" if description.classifier is None else "classifier"
        if others := {_kind(version) for version in client.search_model_versions(f"name = '{name}'")} - {kind}:
            raise UserError(
                f"{name} has versions that are {others.pop()}s, and {storage.uri} holds {_an(kind)}; give it another "
                "--name"
            )
        run_id = find_run(client, description.run_key or "")
        if run_id is None:
            raise UserError(
                f"MLflow at {redact(tracking_uri(tracking))} has no record of the run at {storage.uri}; "
                "give the tracking.uri that it was trained with"
            )
        info = log_model(tracking_uri(tracking), run_id, folder)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"step": str(description.step), "dataset": description.dataset or "", "run": storage.uri, KIND_TAG: kind}
    return client.create_model_version(name, info.model_uri, run_id, tags=tags, model_id=info.model_id)


def _kind(version: ModelVersion) -> str:
    return str(version.tags.get(KIND_TAG, "encoder"))


def _an(kind: str) -> str:
    return "an encoder" if kind == "encoder" else "a classifier"


def promote(
    name: str, version: int, accuracy: float, champion_accuracy: float | None, tracking: TrackingConfig
) -> None:
    """Move @champion to a version, unless its accuracy is below the champion's (None: there is no champion).

    Both accuracies must come from the same probe. Raises UserError with the numbers when it refuses.
    """
    client = _client(tracking)
    client.set_model_version_tag(name, str(version), PROBE_TAG, f"{accuracy:.4f}")
    if champion_accuracy is not None and accuracy < champion_accuracy:
        raise UserError(
            f"{name} version {version} is not promoted: its probe accuracy {accuracy:.4f} is below the champion's "
            f"{champion_accuracy:.4f}"
        )
    client.set_registered_model_alias(name, CHAMPION, str(version))


def champion_version(name: str, tracking: TrackingConfig) -> int | None:
    """Version that @champion stands at, None before the first promotion.

    Raises UserError when there is no such registered model.
    """
    versions = list_versions(name, tracking)
    return next((int(v.version) for v in versions if CHAMPION in v.aliases), None)


def list_versions(name: str, tracking: TrackingConfig) -> list[ModelVersion]:
    """Versions of a registered model, newest first. Raises UserError when there is no such model."""
    client = _client(tracking)
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        raise UserError(
            f"MLflow at {redact(tracking_uri(tracking))} has no registered model {name!r}: {_first(error)}"
        ) from None
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version), reverse=True)
    for version in versions:
        version.aliases = [alias for alias, number in aliases.items() if str(number) == str(version.version)]
    return versions


def _client(tracking: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri(tracking))


def _fetch_registered(reference: str, folder: Path, tracking: TrackingConfig) -> None:
    uri = tracking_uri(tracking)
    mlflow.set_tracking_uri(uri)  # the registry's address is a global of MLflow's
    try:
        with tempfile.TemporaryDirectory() as temporary:
            downloaded = Path(download_artifacts(reference, dst_path=temporary))
            for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
                shutil.copy(next(downloaded.rglob(name)), folder / name)
    except MlflowException as error:
        raise UserError(f"MLflow at {redact(uri)} cannot give {reference}: {_first(error)}") from None
    except StopIteration:
        raise UserError(f"{reference} is not a model that crate-ray registered: it lacks {DESCRIPTION_FILE}") from None


def _run_storage(run: str, tracking: TrackingConfig, s3: S3Config) -> Storage:
    """Folder of a run, given the folder itself or an MLflow id."""
    if "/" not in run and not Path(run).exists():
        try:
            params = _client(tracking).get_run(run).data.params
            return open_storage(params["storage"], s3).under(params["name"])
        except (MlflowException, KeyError) as error:
            where = f"MLflow at {tracking_uri(tracking)}: {error}"
            raise UserError(f"{run!r} is neither a folder nor a pretraining run in {redact(where)}") from None
    return open_storage(run, s3)


def _first(error: Exception) -> str:
    return redact(str(error).splitlines()[0])
