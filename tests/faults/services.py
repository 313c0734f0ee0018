"""Resources of runs that tests take away: disk space, an S3 server, an MLflow server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.jobs import RayCluster
from tests.s3_gateway import S3Gateway


@contextmanager
def full_disk(worker: psutil.Process) -> Iterator[None]:
    """Inside, no file of a process can grow beyond one kilobyte."""
    _, most = worker.rlimit(psutil.RLIMIT_FSIZE)
    worker.rlimit(psutil.RLIMIT_FSIZE, (1024, most))
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            worker.rlimit(psutil.RLIMIT_FSIZE, (most, most))


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Address of an MLflow server that keeps everything in a folder; it is killed at the end of the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        for _ in range(300):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def give_keys(gateway: S3Gateway, cluster: RayCluster) -> None:
    """To all that runs on the cluster."""
    keys = "".join(f"{name.lower()} = {value}\n" for name, value in gateway.environment.items())
    cluster.credentials.write_text(f"[default]\n{keys}")
