"""MLflow's model registry: register and list models. See champions.py for the alias @champion, card.py for cards."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from crate_ray.config import S3Config, TrackingConfig
from crate_ray.config.identifiers import check_model_name
from crate_ray.errors import UserError
from crate_ray.runs.mlflow_lookup import find_run, first_line, login, open_client, tracking_uri
from crate_ray.tracking.decision import CHAMPION, Measure

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

KIND_TAG = "crate_ray.kind"
CONFIG_TAG = "crate_ray.config"
COMMIT_TAG = "crate_ray.commit"
PARAMETERS_TAG = "crate_ray.parameters"
DECISION_TAG = "crate_ray.promotion"
"""The last decision on the version; see decision.py."""
DATA_TAG = "crate_ray.measured_on"
"""Data that the numbers in MEASURE_TAGS were measured on."""
MEASURE_TAGS: dict[Measure, str] = {
    "probe": "crate_ray.probe_accuracy",
    "knn": "crate_ray.knn_accuracy",
    "rank": "crate_ray.effective_rank",
    "top1": "crate_ray.top1_accuracy",
}
"""The last numbers of the version."""


def register(reference: str, name: str, tracking: TrackingConfig, s3: S3Config) -> ModelVersion:
    """Make the model behind a reference a new version of a registered model.

    Args:
        reference: which model; see runs/references.py.
        name: name of the registered model.
        tracking: where MLflow is. It must know the run that trained the model. For a published checkpoint, a run
            that stands for its import is created.
        s3: where S3 is.

    Raises:
        UserError: there is no such model, MLflow does not know its run, or the registered model's versions are of
            another kind (encoders, classifiers).
    """
    # Imported here because listing versions needs no model.
    from crate_ray.models.exported import WEIGHTS_FILE
    from crate_ray.models.fit import safetensors_shapes
    from crate_ray.runs.references import fetch, locate, parse
    from crate_ray.tracking.card import update_card
    from crate_ray.tracking.flavor import log_model

    try:
        check_model_name(name)
    except ValueError as error:
        raise UserError(f"{error}; give another --name") from None
    published = parse(reference).kind == "published"
    # No run trained a published checkpoint here, so there may be no database yet.
    client = MlflowClient(login(tracking_uri(tracking))) if published else open_client(tracking)
    located = locate(reference, tracking, s3)
    source = reference if located is None else located.storage.uri
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        folder = Path(temporary)
        description = fetch(reference, folder, tracking, s3)
        kind = "encoder" if description.classifier is None else "classifier"
        if others := {kind_of(version) for version in client.search_model_versions(f"name = '{name}'")} - {kind}:
            raise UserError(
                f"{name} has versions that are {others.pop()}s, and {source} holds {_an(kind)}; give another --name"
            )
        if published and located is None:
            run_id: str | None = _import_run(client, reference, tracking)
        else:
            run_id = find_run(client, description.run_key) if description.run_key else None
        if run_id is None:
            raise UserError(
                f"MLflow at {tracking_uri(tracking)} has no record of the run that trained {source}; "
                "set tracking.uri to where it was tracked"
            )
        info = log_model(tracking_uri(tracking), run_id, folder)
        parameters = sum(math.prod(shape) for shape in safetensors_shapes(folder / WEIGHTS_FILE).values())
    if published and located is None:
        client.set_terminated(run_id)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "step": str(description.step),
        "dataset": description.dataset or "",
        "run": source,
        KIND_TAG: kind,
        CONFIG_TAG: description.model_dump_json(include={"model", "classifier", "kind"}, exclude_none=True),
        COMMIT_TAG: client.get_run(run_id).data.tags.get("mlflow.source.git.commit", "unknown"),
        PARAMETERS_TAG: str(parameters),
    }
    version = client.create_model_version(name, info.model_uri, run_id, tags=tags, model_id=info.model_id)
    update_card(client, name, int(version.version))
    return version


def list_versions(name: str, tracking: TrackingConfig) -> list[ModelVersion]:
    """The versions of a registered model, newest first.

    Raises:
        UserError: there is no such registered model.
    """
    client = open_client(tracking)
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        raise UserError(
            f"MLflow at {tracking_uri(tracking)} has no registered model {name!r}: {first_line(error)}"
        ) from None
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version), reverse=True)
    for version in versions:
        version.aliases = [alias for alias, number in aliases.items() if str(number) == str(version.version)]
    return versions


def find_version(name: str, version: int | None, tracking: TrackingConfig) -> ModelVersion:
    """A version of a registered model; None: the champion.

    Raises:
        UserError: there is no such version.
    """
    versions = list_versions(name, tracking)
    for found in versions:
        if int(found.version) == version or (version is None and CHAMPION in found.aliases):
            return found
    numbers = ", ".join(str(each.version) for each in reversed(versions)) or "none"
    wanted = f"@{CHAMPION}" if version is None else f"version {version}"
    raise UserError(f"{name} has no {wanted}; it has these versions: {numbers}")


def _import_run(client: MlflowClient, reference: str, tracking: TrackingConfig) -> str:
    """Create a run that stands for the import of a published checkpoint, and return its id."""
    found = client.get_experiment_by_name(tracking.experiment)
    experiment = client.create_experiment(tracking.experiment) if found is None else found.experiment_id
    name = reference.rpartition("/")[2].removeprefix("published:")
    return str(client.create_run(experiment, run_name=name, tags={"crate_ray.imported": reference}).info.run_id)


def kind_of(version: ModelVersion) -> str:
    """'encoder' or 'classifier'."""
    return str(version.tags.get(KIND_TAG, "encoder"))


def _an(kind: str) -> str:
    return "an encoder" if kind == "encoder" else "a classifier"
