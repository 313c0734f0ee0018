"""The MLflow server and the account maker of docker/compose.yaml, run as they stand but on SQLite and loopback."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tests.jobs import ROOT, free_port

pytestmark = pytest.mark.daily

PASSWORDS = {
    "MLFLOW_ADMIN_PASSWORD": "0123456789abcdef",
    "MLFLOW_PASSWORD": "fedcba9876543210",
    "MLFLOW_SECRET_KEY": "s" * 32,
}
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def filled(text: str) -> str:
    """Text with its variables replaced, as Compose does."""
    return re.sub(r"\$\{([A-Z0-9_]+)[^}]*\}", lambda match: PASSWORDS.get(match[1], ""), text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    users = folder / "users.ini"
    content = filled(COMPOSE["configs"]["mlflow_users"]["content"])
    users.write_text(re.sub(r"(?m)^database_uri = .*$", f"database_uri = sqlite:///{folder}/users.db", content))
    service = COMPOSE["services"]["mlflow"]
    replaced = {"0.0.0.0": "127.0.0.1", "5000": str(port), "s3://mlflow/": f"{folder}/artifacts", "2": "1"}
    program, *arguments = [replaced.get(word, word) for word in shlex.split(service["command"])]
    env = {name: filled(value) for name, value in service["environment"].items() if not name.startswith("AWS_")}
    env |= {"MLFLOW_AUTH_CONFIG_PATH": str(users), "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name(program), *arguments],
            env={**os.environ, **env}, cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not _is_healthy(uri):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def _is_healthy(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def make_accounts(uri: str) -> None:
    """What the service `accounts` does."""
    service = COMPOSE["services"]["accounts"]
    env = {name: filled(value) for name, value in service["environment"].items()} | {"MLFLOW_TRACKING_URI": uri}
    subprocess.run([sys.executable, *service["command"][1:]], env={**os.environ, **env}, check=True)


def test_runs_log_as_a_user_who_may_not_touch_the_work_of_others(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_accounts(server)
    make_accounts(server)  # again at each `up`
    assert (
        requests.post(f"{server}/api/2.0/mlflow/experiments/search", json={"max_results": 1}, timeout=30).status_code
        == 401
    )

    def client(user: str, password: str) -> MlflowClient:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return MlflowClient(server)

    with pytest.raises(MlflowException, match="401|authenticat"):
        client("crate-ray", "wrong").create_experiment("x")
    others = client("admin", PASSWORDS["MLFLOW_ADMIN_PASSWORD"]).create_experiment("of the administrator")
    ours = client("crate-ray", PASSWORDS["MLFLOW_PASSWORD"])
    run = ours.create_run(ours.create_experiment("ours"))
    ours.log_metric(run.info.run_id, "loss", 0.5)
    assert ours.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    with pytest.raises(MlflowException, match="Permission denied"):
        ours.delete_experiment(others)
