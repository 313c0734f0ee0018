"""Runs in MLflow, on its SQLite store: every record arrives once, in the same run, even if the server was away or the
process was killed; the model loads and embeds; no secret of the environment is recorded."""

from __future__ import annotations

import io
import json
import re
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset, Run
from PIL import Image

from crate_ray.config import CrateMAEConfig, PrepareConfig, PretrainConfig, S3Config, TrackingConfig
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.runs.mlflow_lookup import RUN_KEY_TAG
from crate_ray.runs.references import load_model
from crate_ray.serving import FeatureExtractor
from crate_ray.storage.lease import LeaseLost
from crate_ray.storage.local import LocalStorage
from crate_ray.tracking.champions import rollback
from crate_ray.tracking.registry import list_versions, register
from crate_ray.tracking.run_tracker import RunTracker, flatten

ROOT = Path(__file__).parents[2]
AWAY = "http://127.0.0.1:9"  # the discard port: nobody listens
NOW = 1_700_000_000_000
PARAMS = {f"group.setting{i}": str(i) for i in range(130)}  # more than one request to MLflow holds
LINEAGE = Dataset(name="shapes", digest="abc", source_type="local", source='{"uri": "/data"}', profile='{"n": 3}')


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow store. Creating one takes seconds, so all tests share it."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()
    yield f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(before)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


def key_of(name: str) -> str:
    """The key of a run by its name in these tests; a key is its own."""
    return name if re.fullmatch("[0-9a-f]{32}", name) else uuid.uuid5(uuid.NAMESPACE_OID, name).hex


def tracker(uri: str, name: str, **values: Any) -> RunTracker:
    options: dict[str, Any] = {"params": PARAMS, "tags": {"kind": "test"}, "datasets": [LINEAGE], **values}
    return RunTracker(TrackingConfig(uri=uri, experiment="tests"), key_of(name), f"run {name}", **options)


def spool(tmp_path: Path, name: str) -> Path:
    return tmp_path / "cache" / "crate-ray" / "spool" / key_of(name)


def find(uri: str, name: str, experiment: str = "tests") -> Run:
    """The one run of a name or key."""
    key = key_of(name)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'")
    assert len(runs) == 1
    return client.get_run(runs[0].info.run_id)


def history(uri: str, run: Run, name: str) -> list[tuple[int, float, int]]:
    points = MlflowClient(uri).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def artifact(uri: str, run: Run, name: str, folder: Path) -> bytes:
    return Path(MlflowClient(uri).download_artifacts(run.info.run_id, name, str(folder))).read_bytes()


def png(seed: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_everything_arrives_and_a_second_start_continues_the_run(uri: str, tmp_path: Path) -> None:
    first = tracker(uri, "whole")
    expected = []
    for step in range(1, 1203):  # more metrics than MLflow takes at once
        first.metrics(step, {"loss": 1 / step, "lr": 0.1 * step}, NOW + step)
        expected.append((step, 1 / step, NOW + step))
    first.picture(200, "reconstruction", png(1))
    first.text("environment.txt", "python==3\n")
    first.metrics(1202, {"validation_loss": float("nan")}, NOW)
    assert first.finish("FAILED") is True
    assert not spool(tmp_path, "whole").exists()
    run = find(uri, "whole")
    assert run.info.run_id == first.run_id and first.where == f"{first.run_id} at {uri}"
    assert (run.info.run_name, run.info.status) == ("run whole", "FAILED")
    assert run.data.params == PARAMS
    assert run.data.tags["kind"] == "test"
    assert history(uri, run, "loss") == expected
    assert np.isnan(history(uri, run, "validation_loss")[0][1])
    (source,) = run.inputs.dataset_inputs
    assert (source.dataset.name, source.dataset.digest) == ("shapes", "abc")
    assert [(tag.key, tag.value) for tag in source.tags] == [("mlflow.data.context", "training")]

    second = tracker(uri, "whole", params={"other": "ignored of a known run"} | PARAMS)
    second.metrics(1203, {"loss": 0.5}, NOW + 2000)
    second.picture(1203, "reconstruction", png(2))
    second.text("environment.txt", "python==3\nsecond\n")
    assert second.finish("FINISHED") is True
    run = find(uri, "whole")
    assert run.info.run_id == second.run_id == first.run_id
    assert run.info.status == "FINISHED" and run.data.params == PARAMS
    assert history(uri, run, "loss") == [*expected, (1203, 0.5, NOW + 2000)]
    assert artifact(uri, run, "reconstruction/step-00000200.png", tmp_path) == png(1)
    assert artifact(uri, run, "reconstruction/step-00001203.png", tmp_path) == png(2)
    assert artifact(uri, run, "environment.txt", tmp_path) == b"python==3\nsecond\n"
    assert len(run.inputs.dataset_inputs) == 1


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_when_the_server_was_away(uri: str, tmp_path: Path) -> None:
    away = tracker(AWAY, "away")
    calls = []
    for step in range(1, 1201):  # more than one request to MLflow holds
        began = time.monotonic()
        away.metrics(step, {"loss": 1 / step}, NOW + step)
        calls.append(time.monotonic() - began)
    assert np.quantile(calls, 0.99) < 0.05  # it does not wait for the server
    away.picture(7, "reconstruction", png())
    began = time.monotonic()
    assert away.finish("FAILED", timeout=3) is False
    assert time.monotonic() - began < 5
    assert away.run_id == "" and away.where == f"not created yet at {AWAY}"
    folder = spool(tmp_path, "away")
    explanation = away.undelivered
    assert explanation.startswith(f"MLflow at {AWAY} does not have everything (") and str(folder) in explanation
    assert "127.0.0.1" in explanation.partition("(")[2] and "\n" not in explanation

    back = tracker(uri, "away")
    back.metrics(1201, {"loss": 1 / 1201}, NOW + 1201)
    assert back.finish("FINISHED") is True
    assert not folder.exists()
    run = find(uri, "away")
    assert history(uri, run, "loss") == [(step, 1 / step, NOW + step) for step in range(1, 1202)]
    assert artifact(uri, run, "reconstruction/step-00000007.png", tmp_path) == png()
    assert (run.info.status, run.data.params) == ("FINISHED", PARAMS)


def test_a_delivery_that_fails_midway_is_repeated_without_doubles(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, calls = MlflowClient.log_batch, []

    def flaky(self: MlflowClient, run_id: str, *args: Any, **values: Any) -> Any:
        result = log_batch(self, run_id, *args, **values)
        calls.append(values)
        if len(calls) in (1, 3):  # the server did its part, but its answer is lost: after 100 parameters, after metrics
            raise ConnectionError("the connection was cut")
        return result

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    monkeypatch.setattr("crate_ray.tracking.delivery._RETRY_SECONDS", 0.05)
    cut = tracker(uri, "cut")
    for step in range(1, 601):
        cut.metrics(step, {"loss": 1 / step}, NOW + step)
    assert cut.finish("FINISHED", timeout=20) is True  # it retries
    assert len(calls) >= 4
    run = find(uri, "cut")
    assert run.data.params == PARAMS and len(run.inputs.dataset_inputs) == 1
    assert history(uri, run, "loss") == [(step, 1 / step, NOW + step) for step in range(1, 601)]


def test_a_torn_line_in_the_spool_costs_only_itself(uri: str, tmp_path: Path) -> None:
    folder = spool(tmp_path, "torn")
    folder.mkdir(parents=True)
    folder.parent.parent.chmod(0o755)
    whole = json.dumps({"kind": "metrics", "step": 1, "values": {"loss": 0.25}, "time": NOW})
    (folder / "events.jsonl").write_text(f"{whole}\n{whole[:31]}")  # the machine went down while writing
    next_start = tracker(uri, "torn")
    next_start.metrics(2, {"loss": 0.5}, NOW)
    assert next_start.finish("FINISHED", timeout=20) is True, next_start.undelivered
    assert history(uri, find(uri, "torn"), "loss") == [(1, 0.25, NOW), (2, 0.5, NOW)]


def test_a_full_disk_costs_what_it_does_not_take_and_no_more(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("crate_ray.tracking.delivery._RETRY_SECONDS", 0.05)
    full = tracker(AWAY, "full")
    for step in range(1, 101):
        full.metrics(step, {"loss": 1 / step}, NOW + step)
    events = spool(tmp_path, "full") / "events.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 20, limits[1]))  # room for a part of a line
    try:
        full.metrics(101, {"loss": 1 / 101}, NOW + 101)
        full.picture(101, "reconstruction", b"x" * 2 * events.stat().st_size)
        full.note(101, "x" * 2 * events.stat().st_size)
        full.bad_samples(101, {"x": "x" * 2 * events.stat().st_size}, "training")
        full.metrics(102, {"loss": 1 / 102}, NOW + 102)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (warning,) = [record.message for record in caplog.records if "cannot write to" in record.message]
    assert (
        str(spool(tmp_path, "full")) in warning
        and "metrics and pictures for MLflow are lost until it works again" in warning
    )
    full.metrics(103, {"loss": 1 / 103}, NOW + 103)
    assert full.finish("FAILED", timeout=0.5) is False

    back = tracker(uri, "full")
    assert back.finish("FINISHED") is True, back.undelivered
    run = find(uri, "full")
    assert history(uri, run, "loss") == [(step, 1 / step, NOW + step) for step in [*range(1, 101), 103]]
    assert "cut off" not in caplog.text
    assert not MlflowClient(uri).list_artifacts(run.info.run_id)

    # If the end of a run cannot be recorded, the run does not count as delivered.
    ended = tracker(uri, "ended")
    ended.wait_for_run()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert ended.finish("FINISHED", timeout=0.5) is False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert spool(tmp_path, "ended").exists()


MODEL = CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=2)


@pytest.mark.filterwarnings("ignore")
def test_the_logged_model_embeds_like_the_exported_one(uri: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    exported = tmp_path / "exported"
    description = ModelDescription(model=MODEL, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), kind="image", step=7)
    export_model(exported, build_model(MODEL).state_dict(), description)
    run_tracker = tracker(uri, "model")
    run_tracker.model(exported)
    assert run_tracker.finish("FINISHED") is True, run_tracker.undelivered
    run = find(uri, "model")
    assert run.info.status == "FINISHED"
    for name in ("model.safetensors", "model.json"):
        assert artifact(uri, run, f"weights/{name}", tmp_path) == (exported / name).read_bytes()

    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    images = [png(seed, (9 + seed, 14)) for seed in range(5)]
    extractor = FeatureExtractor.from_folder(exported)
    expected = extractor(extractor.load(images)).numpy()
    got = loaded.predict(pd.DataFrame({"image": images}))
    assert got.shape == (5, 16) and got.dtype == np.float32
    assert np.abs(got - expected).max() <= 1e-6
    assert np.ptp(expected, axis=0).min() > 1e-3  # different images, different embeddings
    assert loaded.predict(pd.DataFrame({"image": images[:1]})).shape == (1, 16)
    # And the extractor is the encoder after the evaluation's preprocessing, whichever way an image comes in.
    with torch.no_grad():
        batch = extractor.load(images)
        normalised = (batch / 255 - torch.tensor(description.mean)[:, None, None]) / torch.tensor(description.std)[
            :, None, None
        ]
        tokens = extractor.model.encode(normalised).tokens
    assert np.allclose(expected, tokens[:, 1:].mean(1).numpy(), atol=1e-5)
    cls = FeatureExtractor.from_folder(exported, "cls")
    assert np.allclose(cls(batch).numpy(), tokens[:, 0].numpy(), atol=1e-5)
    arrays = [np.array(Image.open(io.BytesIO(image))) for image in images]
    assert torch.equal(extractor.load(arrays), batch)
    # Nothing in the model is a pickle, which loading would run.
    logged = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/model"))
    names = [path.name for path in logged.rglob("*") if path.is_file()]
    assert "model.safetensors" in names and not [n for n in names if n.endswith((".pkl", ".pt", ".pth", ".bin"))]


def test_flatten_names_every_leaf() -> None:
    nested = {"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": "g"}
    assert flatten(nested) == {"a.b.c": "1", "a.d": "None", "e": "[1, 2]", "f": "g"}


def test_a_pretraining_run_records_settings_and_lineage_but_no_secret(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crate_ray.runs.planning import driver_lease
    from crate_ray.runs.pretraining import open_run
    from crate_ray.tracking.pretraining import track

    secrets = {
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7",
        "AWS_SESSION_TOKEN": "FQoGZ",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    data = LocalStorage(tmp_path / "data" / "set")
    source = Source([Item(str(n), lambda n=n: {"png": png(n)}) for n in range(12)], None)
    pack(source, data, PrepareConfig(output="unused"))
    config = PretrainConfig.model_validate(
        {
            "name": "secretive",
            "storage": str(tmp_path / "runs"),
            "model": MODEL,
            "data": {"train": data.uri},
            "training": {"steps": 3, "batch_size": 4},
            "tracking": {"uri": uri, "experiment": "secrets"},
        }
    )
    with driver_lease(config) as lease:
        run = open_run(config)
        key = run.record.run_key
        for error, status in (
            (LeaseLost(), "RUNNING"),  # by another driver now
            (ValueError(), "FAILED"),
            (KeyboardInterrupt(), "KILLED"),
            (None, "FINISHED"),
        ):
            try:
                with track(run, lease) as run_tracker:
                    run_tracker.metrics(1, {"loss": 0.5}, NOW)
                    run_tracker.wait_for_run()
                    if error:
                        raise error
            except (LeaseLost, ValueError, KeyboardInterrupt):
                assert error is not None
            found = find(uri, key, "secrets")
            assert found.info.status == status
            assert spool(tmp_path, key).exists() == (status == "RUNNING")
    with pytest.raises(LeaseLost), track(run, driver_lease(config)):  # which nobody has taken
        pass
    assert not spool(tmp_path, key).exists()
    assert found.data.params["model.dim"] == "16" and found.data.params["training.batch_size"] == "4"
    assert (
        found.data.params["order.lanes"] == str(run.record.order.datasets[0].lanes)
        and found.data.params["total_steps"] == "3"
    )
    assert len(found.data.tags["mlflow.source.git.commit"]) in (40, 7)
    (source_entity,) = found.inputs.dataset_inputs
    assert source_entity.dataset.name.endswith("/set") and source_entity.dataset.digest == run.record.dataset[:32]
    assert json.loads(source_entity.dataset.source)["uri"] == data.uri
    environment = artifact(uri, found, "environment.txt", tmp_path).decode()
    assert f"torch=={torch.__version__}" in environment.splitlines()
    folder = Path(uri.removeprefix("sqlite:///")).parent
    written = [path for root in (folder, tmp_path) for path in root.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in written)
    for path in written:
        content = path.read_bytes()
        assert not [name for name, secret in secrets.items() if secret.encode() in content], path


def test_messages_have_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:1 has no registered model") as raised:
        list_versions("any", TrackingConfig(uri="http://user:secret@127.0.0.1:1"))
    assert "secret" not in str(raised.value)


KILLED = """
import os, shutil, sys
from mlflow import MlflowClient
from crate_ray.config import TrackingConfig
from crate_ray.tracking.run_tracker import RunTracker
uri, moment, key = sys.argv[1:]
upload, terminate = MlflowClient.log_artifact, MlflowClient.set_terminated

def log_artifact(*args):
    if moment == "before the upload":
        os._exit(3)
    upload(*args)
    if moment == "after the upload":
        os._exit(3)

MlflowClient.log_artifact = log_artifact
tracker = RunTracker(TrackingConfig(uri=uri, experiment="tests"), key, "killed", {}, {})
tracker.metrics(1, {"loss": 0.25}, 1_700_000_000_000)
tracker.picture(1, "reconstruction", b"the picture")
if moment == "while all is removed":
    shutil.rmtree = lambda path, **_: str(path).endswith(".removed") and os._exit(3)
tracker.finish("FAILED", timeout=60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the upload", "after the upload", "while all is removed"])
def test_a_process_killed_while_it_delivers_loses_nothing(uri: str, tmp_path: Path, moment: str) -> None:
    key = key_of(f"killed {moment}")
    process = subprocess.run([sys.executable, "-c", KILLED, uri, moment, key], cwd=ROOT, timeout=100)
    assert process.returncode == 3
    assert spool(tmp_path, key).exists() == (moment != "while all is removed")
    next_start = tracker(uri, key)
    next_start.metrics(2, {"loss": 0.5}, NOW)
    assert next_start.finish("FINISHED", timeout=60) is True, next_start.undelivered
    run = find(uri, key)
    assert artifact(uri, run, "reconstruction/step-00000001.png", tmp_path) == b"the picture"
    assert history(uri, run, "loss") == [(1, 0.25, NOW), (2, 0.5, NOW)]
    assert run.info.status == "FINISHED"
    assert not list(spool(tmp_path, key).parent.iterdir())


def test_a_record_that_is_refused_blocks_no_other(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refused = tracker(uri, "refused")
    refused.metrics(1, {"loss": 0.25}, NOW)
    refused.picture(1, "a", b"1")
    refused.metrics(2, {"a name with a colon: and \n a line break": 0.5}, NOW)
    refused.metrics(3, {f"many/{number}": 0.5 for number in range(1200)}, NOW)  # more than one request may hold
    refused.picture(3, "a", b"3")
    assert refused.finish("FINISHED", timeout=60) is True, refused.undelivered
    run = find(uri, "refused")
    assert (
        history(uri, run, "loss") == [(1, 0.25, NOW)]
        and len(run.data.metrics) == 1201
        and "many/1199" in run.data.metrics
    )
    assert artifact(uri, run, "a/step-00000003.png", tmp_path) == b"3"
    assert "skipping a record of run run refused that MLflow refuses" in caplog.text


def test_a_file_that_vanishes_from_the_spool_is_reported(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = tracker(AWAY, "vanished")
    away.picture(1, "a", b"1")
    away.picture(2, "a", b"2")
    assert away.finish("FAILED", timeout=0.1) is False
    (gone,) = spool(tmp_path, "vanished").glob("files/*/step-00000001.png")
    gone.unlink()
    assert tracker(uri, "vanished").finish("FINISHED", timeout=60) is True
    assert f"skipping {gone}, which was deleted before it was sent to MLflow" in caplog.text
    assert artifact(uri, find(uri, "vanished"), "a/step-00000002.png", tmp_path) == b"2"


def test_reading_creates_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracking, s3 = TrackingConfig(), S3Config()
    reads: list[Callable[[], object]] = [
        lambda: list_versions("any", tracking),
        lambda: load_model("models:/any@champion", tracking=tracking),
        lambda: load_model("runs:/0123", tracking=tracking),
        lambda: register("0123", "any", tracking, s3),
        lambda: rollback("any", tracking),
    ]
    for read in reads:
        with pytest.raises(UserError, match=rf"there is no MLflow database {tmp_path}/mlflow\.db; set --tracking\.uri"):
            read()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db?timeout=5")
        with pytest.raises(UserError, match=rf"there is no MLflow database {tmp_path}/other\.db; set"):
            read()
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert not list(tmp_path.iterdir())
