"""Secrets are planted wherever a user can put one. The jobs work with them, and nothing that they leave holds one."""

from __future__ import annotations

import base64
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
import requests
import yaml

from tests.faults.services import mlflow_server
from tests.jobs import environment, free_port, job
from tests.s3_gateway import S3Gateway

pytestmark = [pytest.mark.ray, pytest.mark.daily]

PASSWORD = "p@ss wörd/51c0ffee"
PLANTED = {
    "password of MLflow": PASSWORD,
    "the same, encoded": quote(PASSWORD, safe=""),
    "login of MLflow": base64.b64encode(f"ann:{PASSWORD}".encode()).decode(),
    "password of the endpoint": "endpoint-8d1f3b",
    "token in an address": "token-77aa91bc",
    "password in the base of a sweep": "base-0f9e8d7c",
    "variable of the environment": "variable-5566778899",
}


@contextmanager
def asking_for_a_login(server: str) -> Iterator[str]:
    """Address of a proxy that forwards requests to a server if they have the user name and password."""
    wanted = "Basic " + PLANTED["login of MLflow"]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")}
            if self.headers.get("Authorization") == wanted:
                found = requests.request(self.command, server + self.path, data=body, headers=headers, timeout=60)
                status, content, kind = found.status_code, found.content, found.headers.get("Content-Type", "")
            else:
                status, content, kind = 401, b"who are you?", "text/plain"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()


@pytest.mark.timeout(1800)
def test_no_artefact_of_any_job_holds_a_secret(s3_gateway: S3Gateway, tmp_path: Path) -> None:
    boto3.client(
        "s3", endpoint_url=s3_gateway.endpoint, region_name="us-east-1",
        aws_access_key_id=s3_gateway.access_key, aws_secret_access_key=s3_gateway.secret_key,
    ).create_bucket(Bucket="secrets")  # fmt: skip
    given, work = tmp_path / "given", tmp_path / "work"
    sessions = Path(tempfile.mkdtemp(prefix="crs-"))  # a short path, for Ray's sockets
    for folder in (given, work, work / "mlflow", work / "output"):
        folder.mkdir()
    secrets = PLANTED | {"secret key of S3": s3_gateway.secret_key}
    try:
        with mlflow_server(work / "mlflow", free_port()) as server, asking_for_a_login(server) as proxy:
            _run_all(s3_gateway, proxy, given, work, sessions)
        logs = [path for path in sessions.rglob("*") if path.is_file()]
        assert len(logs) > 20
        found = []
        for path in [*(path for path in work.rglob("*") if path.is_file()), *logs]:
            content = path.read_bytes()
            found += [f"{path}: {name}" for name, secret in secrets.items() if secret.encode() in content]
        assert not found, "\n".join(found)
    finally:
        shutil.rmtree(sessions, ignore_errors=True)


def _run_all(gateway: S3Gateway, proxy: str, given: Path, work: Path, sessions: Path) -> None:
    uri = f"http://ann:{quote(PASSWORD, safe='@ ')}@{proxy}?token={PLANTED['token in an address']}"
    endpoint = f"http://key:{PLANTED['password of the endpoint']}@{gateway.endpoint.removeprefix('http://')}"
    env = environment(work) | gateway.environment
    env |= {"RAY_TMPDIR": str(sessions), "MY_TOKEN": PLANTED["variable of the environment"], "MLFLOW_TRACKING_URI": uri}
    said: list[str] = []

    def run(name: str, *arguments: str, code: int = 0, **more: str) -> str:
        done = subprocess.run(
            job(name, *arguments), cwd=work, env=env | more, capture_output=True, text=True, timeout=500
        )
        (work / "output" / f"{len(said):02d}-{name}.txt").write_text(done.stdout + done.stderr)
        said.append(name)
        assert done.returncode == code, done.stdout + done.stderr
        assert "who are you?" not in done.stdout + done.stderr  # the login reached MLflow
        return done.stdout + done.stderr

    s3 = ("--s3.endpoint-url", endpoint)
    services = ("--tracking.uri", uri, *s3)
    for split in ("train", "test"):
        output = f"s3://secrets/{split}"
        out = run("prepare", "--source", "digits", "--split", split, "--output", output, *s3)
        assert f"--s3.endpoint-url {gateway.endpoint}" in out
    small = {
        "model": {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 1, "num_subspaces": 2, "channels": 1},
        "data": {"train": "s3://secrets/train", "validation": "s3://secrets/test", "crop_scale": [0.8, 1]},
        "training": {"batch_size": 64, "steps": 4, "validate_every": 2, "compile": "off"},
    }
    base_uri = f"http://user:{PLANTED['password in the base of a sweep']}@nowhere.invalid"
    (given / "base.yaml").write_text(yaml.safe_dump(small | {"tracking": {"uri": base_uri}}))
    (given / "start.yaml").write_text(yaml.safe_dump(small))
    search = {"optim.lr": {"choice": [1e-3]}}
    (given / "sweep.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "search": search, "trials": 1}))
    probe = ("--probe.train", "s3://secrets/train", "--probe.test", "s3://secrets/test")

    out = run("pretrain", "--config", str(given / "start.yaml"), "--name", "mine", *services)
    assert f"at http://{proxy}" in out and f"--tracking.uri http://{proxy}" in out  # MLflow has it, as well
    # The same start again, with the login in the environment.
    login = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": PASSWORD, "MLFLOW_TRACKING_URI": ""}
    resumed = ("--tracking.uri", f"http://{proxy}", "--s3.endpoint-url", gateway.endpoint)
    steps = ("--training.steps", "6")
    out = run("pretrain", "--config", str(given / "start.yaml"), "--name", "mine", *resumed, *steps, **login)
    assert "resuming at step 4" in out and "does not have everything" not in out
    run("register", "--run", "runs/mine", *services)
    run("evaluate", "--model", "models:/crate-mae/1", "--data", "s3://secrets/test", *probe, *services)
    run("finetune", "--model", "models:/crate-mae/1", "--data.train", "s3://secrets/train", "--training.steps", "2",
        "--name", "tuned", *s3)  # fmt: skip
    run("embed", "--model", "runs/mine", "--data", "s3://secrets/test", "--output", "embedded", *services)
    out = run("sweep", "--config", str(given / "sweep.yaml"), *services)
    assert "best: " in out and (work / "runs/sweep/best.yaml").exists()
    # Errors, too.
    run("register", "--run", "runs/absent", *services, code=2)
    run("evaluate", "--model", f"s3://ann:{PLANTED['token in an address']}@secrets/x", *probe, *services, code=2)
    run("pretrain", "--config", str(given / "start.yaml"), "--name", "wrong", "--tracking.uri", "http://127.0.0.1:1",
        "--tracking.deliver_seconds", "1", "--s3.endpoint-url", f"{endpoint}:1", code=2)  # fmt: skip
