"""Run the real jobs as processes of their own, watch their checkpoints, and kill parts of them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def environment(folder: Path) -> dict[str, str]:
    """Environment of a job that uses a Ray of its own and leaves nothing outside a folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    return env | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "XDG_CACHE_HOME": (folder / "cache").as_posix()}


def job(name: str, *arguments: str) -> list[str]:
    """Command line of jobs/<name>.py."""
    return [sys.executable, (ROOT / "jobs" / f"{name}.py").as_posix(), *arguments]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a job; its output goes to a file in the folder."""
    with (folder / "job.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT, text=True
        )


def finish(process: subprocess.Popen[str], folder: Path, timeout: float = 240) -> None:
    """Wait for a job and require that it succeeded."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"the job hangs:\n{(folder / 'job.log').read_text()[-5000:]}") from None
    assert code == 0, (folder / "job.log").read_text()[-5000:]


def end(process: subprocess.Popen[str]) -> None:
    """Kill a job and everything that it started."""
    family = [process.pid, *[p.pid for p in psutil.Process(process.pid).children(recursive=True)]]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(30)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The Ray Train workers of a job that started its own Ray."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_for_commit(run: Path, step: int, process: subprocess.Popen[str], timeout: float = 180) -> None:
    """Wait until a run has committed a checkpoint of at least so many steps."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if any(int(path.name.split("-")[1]) >= step for path in run.glob("commits/step-*.json")):
            return
        assert process.poll() is None, "the job ended before its checkpoint"
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step} within {timeout} s")


def final_weights(run: Path) -> str:
    """Digest of the model that a finished run left."""
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
