"""Lookups in MLflow: its address, the run of a run key, the folder of a run id, and registered models.

MLflow is imported inside the functions. Its import takes seconds, and a machine that uses only folders may not have it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from crate_ray.addresses import Address, redact
from crate_ray.config import S3Config, TrackingConfig, check_name
from crate_ray.config.identifiers import check_address
from crate_ray.errors import UserError, address_of
from crate_ray.storage.interface import Storage, open_storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

# One attempt per request. Callers retry by themselves, and no request may block for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

RUN_KEY_TAG = "crate_ray.run_key"

_EXPERIMENTS_PER_REQUEST = 1000
_SCHEME = re.compile(r"(file:|[A-Za-z][\w+.-]*://|databricks$|uc$)")

_lock = threading.Lock()
_LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_before: dict[str, str | None] = {}  # the variables' values before `login` set them
_logged_in: list[str] = []  # the server for which it set them


def tracking_uri(tracking: TrackingConfig) -> Address:
    """Address of MLflow: tracking.uri, else MLFLOW_TRACKING_URI, else a SQLite file mlflow.db in the working folder."""
    if tracking.uri:
        return tracking.uri if isinstance(tracking.uri, Address) else Address(tracking.uri)
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return address_of("MLFLOW_TRACKING_URI", given)
    return sqlite_address(Path("mlflow.db").resolve())


def sqlite_address(path: Path) -> Address:
    """The address of a SQLite file, whose folders may have any name, such as `main%2Ffix` or `what?`."""
    if not re.search(r"\?|%[0-9A-Fa-f]{2}", str(path)):
        return Address(f"sqlite:///{path}")
    from sqlalchemy import URL  # its versions encode different characters

    return Address(URL.create("sqlite", database=str(path)).render_as_string())


def absolute_tracking_uri(tracking: TrackingConfig) -> Address:
    """The address for processes with other working folders: that of a SQLite file has an absolute path."""
    uri = tracking_uri(tracking)
    path = sqlite_path(uri)
    return uri if path is None or path.is_absolute() else sqlite_address(path.absolute())


def login(address: Address) -> str:
    """The address by which MLflow reaches a server.

    MLflow prints the address of a server, and takes the user name and password from the environment of this process. So
    they go there. The address of a database keeps its password, because there is no other way.
    """
    if not address.startswith(("http://", "https://")):
        return address.full
    with _lock:
        if address.login is None:
            # Another server must not get them. MLflow itself puts the address of this one, without them, into
            # MLFLOW_TRACKING_URI.
            if address not in _logged_in:
                for name, value in _before.items():
                    os.environ.pop(name, None) if value is None else os.environ.update({name: value})
                _before.clear()
                _logged_in.clear()
        else:
            _logged_in[:] = [address]
            for name, value in zip(_LOGIN, address.login, strict=True):
                _before.setdefault(name, os.environ.get(name))
                os.environ[name] = value
    return str(address)


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address; None for other addresses."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    if match is None or "%" not in match[1]:
        return Path(match[1]) if match else None
    from sqlalchemy import make_url

    return Path(make_url(uri).database or match[1])


def first_line(error: Exception) -> str:
    """First line of an error message, without passwords."""
    return redact(str(error).splitlines()[0]) if str(error) else type(error).__name__


def open_client(tracking: TrackingConfig) -> MlflowClient:
    """A client for reading. MLflow would create a missing SQLite file; this does not.

    Raises:
        UserError: the SQLite file does not exist, or MLflow cannot use the address.
    """
    uri = tracking_uri(tracking)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise UserError(
            f"there is no MLflow database {path}; set --tracking.uri or MLFLOW_TRACKING_URI to "
            "where the runs are tracked"
        )
    return connect(uri)


def connect(uri: Address) -> MlflowClient:
    """A client of MLflow. Raises UserError if MLflow cannot use the address."""
    if not _SCHEME.match(uri):
        raise UserError(
            f"{uri!r} is not the address of an MLflow server or database, and MLflow no longer writes to folders; set "
            f"tracking.uri to http://HOST:PORT, or to sqlite:///{Path('mlflow.db').absolute()} for a file"
        )
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient(login(uri))
    except MlflowException as error:
        raise UserError(f"MLflow cannot use the address {uri} ({first_line(error)}); check tracking.uri") from None


def find_run(client: MlflowClient, run_key: str) -> str | None:
    """MLflow id of the run with a run key (see RunRecord); None if MLflow does not know it."""
    page, token = _EXPERIMENTS_PER_REQUEST, None
    while True:
        experiments = client.search_experiments(max_results=page, page_token=token)
        ids = [experiment.experiment_id for experiment in experiments]
        found = client.search_runs(ids, f"tags.`{RUN_KEY_TAG}` = '{run_key}'", max_results=1) if ids else ()
        token = experiments.token
        if found or not token:
            return found[0].info.run_id if found else None


def run_storage(run_id: str, tracking: TrackingConfig, s3: S3Config) -> Storage:
    """Folder of the run with an MLflow id.

    Raises:
        UserError: MLflow has no such run, or it is not one of ours.
    """
    client = open_client(tracking)
    from mlflow.exceptions import MlflowException

    where = tracking_uri(tracking)
    try:
        params = client.get_run(run_id).data.params
    except MlflowException as error:
        raise UserError(f"MLflow at {where} cannot find the run {run_id!r}: {first_line(error)}") from None
    if not {"storage", "name"} <= params.keys():
        raise UserError(f"the run {run_id!r} in MLflow at {where} is neither a pretraining nor a fine-tuning run")
    try:
        check_address(params["storage"])
        check_name(params["name"])
    except ValueError as error:
        raise UserError(f"the run {run_id!r} in MLflow at {where} names no folder of a run: {error}") from None
    return open_storage(params["storage"], s3).under(params["name"])


def version_of_alias(name: str, alias: str, tracking: TrackingConfig) -> str:
    """Number of the registered model's version that has an alias.

    Raises:
        UserError: there is none, or MLflow does not answer.
    """
    client = open_client(tracking)
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        raise UserError(
            f"MLflow at {tracking_uri(tracking)} cannot find models:/{name}@{alias}: {first_line(error)}"
        ) from None


def download_registered(uri: str, names: tuple[str, ...], folder: Path, tracking: TrackingConfig) -> None:
    """Copy files of a registered model, models:/<name>@<alias> or models:/<name>/<version>, into a local folder.

    Raises:
        UserError: there is no such model, or it lacks one of the files.
    """
    open_client(tracking)
    import mlflow
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    where = tracking_uri(tracking)
    # MLflow (3.17) resolves an alias in the store that is set globally, even if registry_uri names another one.
    mlflow.set_tracking_uri(login(where))
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        try:
            found = Path(download_artifacts(uri, dst_path=temporary))
        except MlflowException as error:
            raise UserError(f"MLflow at {where} cannot load {uri}: {first_line(error)}") from None
        for name in names:
            path = next(found.rglob(name), None)
            if path is None:
                raise UserError(f"{uri} is not a model registered by crate-ray: it has no {name}")
            shutil.copy(path, folder / name)
