"""MLflow that cannot record a run stops it before it trains, with the cause; what it cannot take costs only itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Dataset, Run, RunStatus

from crate_ray.config import RegisterConfig, S3Config, TrackingConfig
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.runs.mlflow_lookup import RUN_KEY_TAG, connect, find_run, sqlite_path, tracking_uri
from crate_ray.tracking import delivery
from crate_ray.tracking.delivery import mlflow_names
from crate_ray.tracking.registry import register
from crate_ray.tracking.run_tracker import RunTracker, flatten
from tests.unit.test_tracking import MODEL, NOW, key_of, spool, uri

__all__ = ["uri"]  # a fixture


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(delivery, "_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(delivery, "_PATIENCE_SECONDS", 1.0)


def tracker(uri: str, name: str, experiment: str = "checks", **values: Any) -> RunTracker:
    options: dict[str, Any] = {"params": {}, "tags": {}, **values}
    return RunTracker(TrackingConfig(uri=uri, experiment=experiment), key_of(name), name, **options)


def find(uri: str, name: str) -> Run:
    client = MlflowClient(uri)
    found = find_run(client, key_of(name))
    assert found is not None
    return client.get_run(found)


@given(st.lists(st.text(max_size=400), max_size=20, unique=True))
def test_every_name_becomes_one_that_mlflow_takes(names: list[str]) -> None:
    named = mlflow_names({name: name for name in names})
    assert sorted(named.values()) == sorted(names)  # none takes the place of another
    for name, before in named.items():
        assert re.fullmatch(r"[\w.\-/ ]{1,250}", name) and not re.search(r"//|/\./|\.\./|^/|^\.\.|/$", name), name
        assert name == before or len(name) > 8


def test_any_address_is_a_parameter(uri: str) -> None:
    addresses = [
        "/data/photos (2023)+old", "s3://bucket/x", "s3://bucket/y", "/data/" + "x" * 300, "/data/" + "x" * 299 + "y",
        "/data/ä, ö & ü", "/data/50%", "/data/a=b;c", "/data/[1]{2}", "/data/../up", "/data/100€", "/data/日本",
    ]  # fmt: skip
    params = flatten({"data": {"train": {address: number for number, address in enumerate(addresses)}}})
    long = Dataset(name="n" * 600, digest="abc", source_type="local", source="{}", profile="{}")
    run = tracker(uri, "addresses", params=params | {"seed": "1"}, tags={"long": "x" * 9000}, datasets=[long])
    run.metrics(1, {"loss": 0.5}, NOW)
    assert run.finish("FINISHED", timeout=60), run.undelivered
    data = find(uri, "addresses").data
    assert sorted(data.params.values()) == sorted([*map(str, range(len(addresses))), "1"])
    assert data.params["seed"] == "1" and data.metrics == {"loss": 0.5}


@pytest.mark.slow
def test_metrics_and_status_do_not_wait_for_artifacts(uri: str, tmp_path: Path) -> None:
    root, client = tmp_path / "root", MlflowClient(uri)
    root.write_text("a file where the folder should be")
    client.create_experiment("sealed", artifact_location=(root / "artifacts").as_uri())
    run = tracker(uri, "sealed", "sealed")
    run.text("environment.txt", "x")
    run.metrics(1, {"loss": 0.5}, NOW)
    run.tag("a.tag", "of a start")
    assert not run.finish("FINISHED", timeout=3)
    assert str(root) in run.undelivered
    found = find(uri, "sealed")
    assert (found.data.metrics, found.info.status) == ({"loss": 0.5}, "FINISHED")
    assert found.data.tags["a.tag"] == "of a start"
    # The next start delivers the rest.
    root.unlink()
    assert tracker(uri, "sealed", "sealed").finish("FINISHED", timeout=60)
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["environment.txt"]
    assert not spool(tmp_path, "sealed").exists()


def test_the_position_of_an_earlier_version_counts_for_files_and_records(uri: str, tmp_path: Path) -> None:
    folder = spool(tmp_path, "older")
    folder.mkdir(parents=True)
    for private in (folder, folder.parent, folder.parent.parent):
        private.chmod(0o700)
    lines = [json.dumps({"kind": "metrics", "step": n, "values": {"loss": n}, "time": NOW}) + "\n" for n in (1, 2)]
    (folder / "events.jsonl").write_text("".join(lines))
    (folder / "sent").write_text(str(len(lines[0])))
    assert tracker(uri, "older").finish("FINISHED", timeout=60)
    history = MlflowClient(uri).get_metric_history(find(uri, "older").info.run_id, "loss")
    assert [point.step for point in history] == [2]


def test_a_run_of_any_of_many_experiments_is_found(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crate_ray.runs.mlflow_lookup._EXPERIMENTS_PER_REQUEST", 2)
    client = MlflowClient(uri)
    ids = [client.create_experiment(f"one of many {number}") for number in range(7)]
    for number in (0, 3, 6):
        run = client.create_run(ids[number], tags={RUN_KEY_TAG: key_of(f"many {number}")})
        assert find_run(client, key_of(f"many {number}")) == run.info.run_id
    assert find_run(client, key_of("none")) is None


def _deleted(uri: str, tmp_path: Path) -> tuple[str, str]:
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("deleted"))
    return uri, "deleted"


def _sealed(uri: str, tmp_path: Path) -> tuple[str, str]:
    MlflowClient(uri).create_experiment("no artifacts", artifact_location="file:///proc/artifacts")
    return uri, "no artifacts"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (_deleted, "the experiment 'deleted' was deleted; restore it with mlflow experiments restore"),
        (_sealed, "takes metrics, but no artifacts"),
        (lambda _, __: ("mlruns", "x"), "'mlruns' is not the address of an MLflow server or database"),
        (lambda _, __: ("127.0.0.1:5000", "x"), "is not the address of an MLflow server or database"),
        (lambda _, folder: (f"file://{folder}/mlruns", "x"), "MLflow cannot use the address"),
        (lambda _, __: ("htp://127.0.0.1", "x"), "MLflow cannot use the address htp://127.0.0.1"),
        (lambda _, __: ("sqlite:////proc/none/mlflow.db", "x"), "cannot record this run.*; check tracking.uri"),
        (lambda _, __: ("http://127.0.0.1:9", "x"), "MLflow at http://127.0.0.1:9 cannot record this run"),
        (lambda uri, __: (uri, "x" * 501), "cannot record this run.*exceeds the maximum length"),
    ],
)
def test_what_cannot_record_a_run_stops_it_before_it_trains(
    place: Callable[[str, Path], tuple[str, str]], sentence: str, uri: str, tmp_path: Path
) -> None:
    where, experiment = place(uri, tmp_path)
    run = tracker(where, f"stopped {experiment[:9]} {where}", experiment)
    run.text("environment.txt", "x")
    with pytest.raises(UserError, match=sentence):
        run.check(is_new=True)
    assert not list(spool(tmp_path, "any").parent.iterdir())  # nothing stays behind
    if experiment == "no artifacts":
        assert find(uri, f"stopped no artifa {where}").info.status == "FAILED"


def test_a_check_that_succeeds_leaves_a_run_that_goes_on(uri: str) -> None:
    run = tracker(uri, "fine")
    run.text("environment.txt", "x")
    run.check(is_new=True)
    assert run.run_id and MlflowClient(uri).list_artifacts(run.run_id)
    assert run.finish("FINISHED", timeout=60)


def test_a_run_that_has_begun_goes_on_without_its_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tracker("http://127.0.0.1:9", "resumed")
    run.text("environment.txt", "x")
    run.check(is_new=False)
    assert "the run goes on, and its records wait in" in caplog.text
    assert not run.finish("FINISHED", timeout=0.1)
    assert spool(tmp_path, "resumed").exists()


@pytest.mark.filterwarnings("ignore")
def test_registering_keeps_the_end_and_the_status_of_a_run(uri: str, tmp_path: Path) -> None:
    before = mlflow.get_tracking_uri()
    description = ModelDescription(
        model=MODEL, mean=(0.5,) * 3, std=(0.2,) * 3, kind="image", step=7, run_key=key_of("registered")
    )
    export_model(tmp_path / "exported", build_model(MODEL).state_dict(), description)
    run = tracker(uri, "registered")
    assert run.finish("KILLED", timeout=60)
    ended = MlflowClient(uri).get_run(run.run_id).info
    time.sleep(0.01)
    tracking = TrackingConfig(uri=uri)
    version = register(str(tmp_path / "exported"), "kept", tracking, S3Config())
    assert version.version in (1, "1")
    after = MlflowClient(uri).get_run(run.run_id).info
    assert (after.end_time, after.status) == (ended.end_time, RunStatus.to_string(RunStatus.KILLED))
    # A name that MLflow refuses, or that no reference can hold, is refused before the model is uploaded.
    logged = len(MlflowClient(uri).search_logged_models([ended.experiment_id]))
    for name in ("a/b", "a:b", " ", "", "..", "a@b", "x" * 257, 'a"b', "a\nb"):
        with pytest.raises(UserError, match="the name of a registered model"):
            register(str(tmp_path / "exported"), name, tracking, S3Config())
        with pytest.raises(ValueError, match="the name of a registered model"):
            RegisterConfig(run="runs/mine", name=name)
    assert len(MlflowClient(uri).search_logged_models([ended.experiment_id])) == logged == 1
    mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("name", ["a b", "job%2Fbranch", "50%", "what?", "c#", "job@2", "a%25?b=c#d"])
def test_the_default_database_is_in_a_working_folder_of_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    address = tracking_uri(TrackingConfig())
    assert sqlite_path(address) == folder / "mlflow.db"
    if name == "job%2Fbranch":  # a database takes seconds to make
        connect(address).create_experiment("any")
        assert (folder / "mlflow.db").stat().st_size > 0


def test_a_database_in_the_package_of_a_submitted_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ray" / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(UserError, match=r"tracking\.uri \S+/mlflow\.db is in the copy .* which Ray deletes"):
        RunTracker(TrackingConfig(), key_of("submitted"), "submitted", {}, {})


@pytest.mark.slow
def test_mlflow_sends_no_usage_data() -> None:
    """Its own switch is off. In tests and in CI MLflow sends nothing anyway, so what it sends proves nothing here."""
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_DISABLE_TELEMETRY"}
    code = (
        "import crate_ray; from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY as off; print(off.get())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
