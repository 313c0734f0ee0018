"""Throughput and latency of `crate-ray serve`, of `mlflow models serve`, and of plain calls, with the same model."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from crate_ray.addresses import Address
from crate_ray.benchmarks.machine import describe_machine
from crate_ray.config import BenchmarkServeConfig, CrateMAEConfig
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.progress import console
from crate_ray.runs.mlflow_lookup import sqlite_address
from crate_ray.runs.references import fetch
from crate_ray.served_model import ServedModel
from crate_ray.tracking.flavor import log_model

_START_SECONDS, _STOP_SECONDS = 300, 90
_PICTURES = 16

Ask = Callable[[http.client.HTTPConnection, int], Any]


def measure_serving(config: BenchmarkServeConfig) -> dict[str, Any]:
    """All figures, for JSON: of each contestant the fastest round. Servers are sent one picture a request.

    Both servers run all the while, and are measured in turns.

    Raises:
        UserError: a server does not start, or its answers are not those of the model.
    """
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        folder = Path(temporary)
        exported = _export(folder, config)
        model = ServedModel.from_folder(exported)
        pictures = [_picture(number, config.picture_side) for number in range(_PICTURES)]
        expected = [model(model.load([picture])).numpy() for picture in pictures]
        report: dict[str, Any] = {
            "machine": describe_machine(),
            "load_before": os.getloadavg()[0],
        }

        def check(answer: Any, number: int) -> None:
            difference = np.abs(np.array(answer["predictions"]) - expected[number]).max()
            if not difference < 1e-3:
                raise UserError(f"a server's answer differs from the model's by {difference:.2g}")

        bodies = [json.dumps({"inputs": {"image": [base64.b64encode(p).decode()]}}) for p in pictures]

        def as_json(connection: http.client.HTTPConnection, number: int) -> Any:
            return _post(connection, bodies[number], "application/json")

        def as_bytes(connection: http.client.HTTPConnection, number: int) -> Any:
            return _post(connection, pictures[number], "image/jpeg")

        with _crate_ray(folder, exported, config) as ours, _mlflow(folder, exported) as theirs:
            servers = {"crate_ray_bytes": (ours, as_bytes), "crate_ray_json": (ours, as_json)}
            servers |= {"mlflow_json": (theirs, as_json)}
            for port, ask in servers.values():
                with _connection(port) as connection:
                    for number in range(_PICTURES):
                        check(ask(connection, number), number)
            rounds = []
            for number in range(config.repeats):
                console().print(f"round {number + 1} of {config.repeats}")
                found = {"in_process": _in_process(model, pictures, config)}
                rounds.append(found | {name: _load(*server, config) for name, server in servers.items()})
        report["load_after"] = os.getloadavg()[0]
        for name in rounds[0]:
            runs = {key: [found[name][key] for found in rounds] for key in rounds[0][name]}
            report[name] = {key: max(each, key=lambda run: run["images_per_second"]) for key, each in runs.items()}
        return report | {"rounds": rounds}


def _export(folder: Path, config: BenchmarkServeConfig) -> Path:
    exported = folder / "model"
    if config.model is not None:
        description = fetch(config.model, exported, config.tracking, config.s3)
        if description.kind != "image":
            raise UserError(f"{config.model} takes grids; give a model of images")
        return exported
    architecture = CrateMAEConfig(preset=config.preset)
    description = ModelDescription(model=architecture, mean=(0.5,) * 3, std=(0.25,) * 3, kind="image")
    export_model(exported, build_model(architecture).state_dict(), description)
    return exported


def _picture(number: int, side: int) -> bytes:
    """A JPEG of coloured ellipses with some noise."""
    random = np.random.default_rng(number)
    picture = Image.new("RGB", (side, side), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(60):
        x, y, width, height = random.uniform(0, side, 4)
        draw.ellipse((x, y, x + width / 3, y + height / 3), fill=tuple(random.integers(0, 256, 3).tolist()))
    noisy = np.asarray(picture) + random.normal(0, 8, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _in_process(model: ServedModel, pictures: list[bytes], config: BenchmarkServeConfig) -> dict[str, Any]:
    """Plain calls, decoding included: one picture at a time, and in batches."""
    found = {}
    for size in (1, config.batch_size):
        chosen = (pictures * (size // len(pictures) + 1))[:size]
        taken: list[float] = []
        model(model.load(chosen))
        began = time.perf_counter()
        while time.perf_counter() - began < config.seconds:
            before = time.perf_counter()
            model(model.load(chosen))
            taken.append(time.perf_counter() - before)
        found[str(size)] = _summary(taken, size * len(taken) / sum(taken))
    return found


def _load(port: int, ask: Ask, config: BenchmarkServeConfig) -> dict[str, Any]:
    """Ask with each number of clients. Each one sends its next request when it has the answer to the last."""
    found = {}
    for clients in config.clients:
        taken: list[list[float]] = [[] for _ in range(clients)]
        problems: list[BaseException] = []
        end = time.perf_counter() + config.seconds

        def client(own: list[float], first: int, end: float, problems: list[BaseException]) -> None:
            try:
                with _connection(port) as connection:
                    number = first
                    while (before := time.perf_counter()) < end:
                        ask(connection, number % _PICTURES)
                        own.append(time.perf_counter() - before)
                        number += 1
            except Exception as error:
                problems.append(error)

        began = time.perf_counter()
        threads = [threading.Thread(target=client, args=(own, first, end, problems)) for first, own in enumerate(taken)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise UserError(f"a request failed: {problems[0]}")
        latencies = [value for own in taken for value in own]
        found[str(clients)] = _summary(latencies, len(latencies) / (time.perf_counter() - began))
    return found


def _summary(seconds: list[float], images_per_second: float) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99))
    return {"images_per_second": images_per_second, "p50_seconds": float(p50), "p99_seconds": float(p99)}


@contextmanager
def _connection(port: int) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.connect()
        assert connection.sock is not None
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection
    finally:
        connection.close()


def _post(connection: http.client.HTTPConnection, body: str | bytes, kind: str) -> Any:
    connection.request("POST", "/invocations", body, {"Content-Type": kind})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise UserError(f"status {answer.status}: {content[:300].decode('utf-8', 'replace')}")
    return json.loads(content)


@contextmanager
def _crate_ray(folder: Path, exported: Path, config: BenchmarkServeConfig) -> Iterator[int]:
    port = _free_port()
    command = [sys.executable, "-m", "crate_ray", "serve", "--model", str(exported), "--port", str(port)]
    command += ["--batch-size", str(config.batch_size)]
    with _running("crate-ray serve", command, folder, port, {"RAY_ADDRESS": "local"}):
        yield port


@contextmanager
def _mlflow(folder: Path, exported: Path) -> Iterator[int]:
    port, uri = _free_port(), sqlite_address(folder / "mlflow.db")
    import mlflow

    before = mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(str(uri))
    experiment = client.create_experiment("benchmark", artifact_location=(folder / "artifacts").as_uri())
    try:
        info = log_model(Address(uri), client.create_run(experiment).info.run_id, exported)
        path = mlflow.artifacts.download_artifacts(
            info.model_uri, tracking_uri=str(uri), dst_path=str(folder / "logged")
        )
    finally:
        mlflow.set_tracking_uri(before)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", path, "--env-manager", "local"]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # MLflow runs uvicorn by name
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with _running("mlflow models serve", command, folder, port, {"PATH": programs}):
        yield port


@contextmanager
def _running(name: str, command: list[str], folder: Path, port: int, environment: dict[str, str]) -> Iterator[None]:
    """A server in a process group of its own, ready for requests."""
    console().print(f"starting {name}")
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
                raise UserError(f"{name} does not start: {lines[-1]}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ready(port: int) -> bool:
    try:
        with _connection(port) as connection:
            connection.request("GET", "/ping")
            return connection.getresponse().status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
