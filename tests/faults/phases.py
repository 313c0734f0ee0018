"""Kill a worker in a chosen phase: it is suspended, its stacks are read, and it is killed if it is in the phase, else
resumed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.jobs import Job

PHASES = ("forward", "all-reduce", "checkpoint write", "upload")
"""Phases of training."""
SET_UP = "set-up"
"""Phase before training: the worker joins a process group."""
_SPY = Path(sys.executable).with_name("py-spy")


class Frame(NamedTuple):
    """One call of a stack."""

    file: str
    function: str


def stacks(worker: psutil.Process) -> list[list[Frame]]:
    """Python stacks of all threads of a suspended process."""
    dump = subprocess.run(
        [_SPY, "dump", "--nonblocking", "--json", "--pid", str(worker.pid)], capture_output=True, check=True, timeout=30
    )
    return [
        [Frame(frame["filename"], frame["name"]) for frame in thread["frames"]] for thread in json.loads(dump.stdout)
    ]


def phase_of(threads: list[list[Frame]]) -> set[str]:
    """Phases of PHASES that a worker is in: one of its training thread, one of its checkpoint thread."""
    found = set()
    for frames in threads:
        functions = {frame.function for frame in frames}
        if "train_step" in functions and any("backward" in name or "all_reduce" in name for name in functions):
            found.add("all-reduce")  # or on its way there
        elif "train_step" in functions and any(
            "crate_ray/models" in frame.file and frame.function.endswith("forward") for frame in frames
        ):
            found.add("forward")
        elif "upload_part" in functions:
            found.add("upload")
        elif "write_part" in functions:
            found.add("checkpoint write")
    return found


def kill_in(phase: str, job: Job, chance: random.Random, timeout: float = 60) -> bool:
    """SIGKILL a worker while it is in a phase. Returns False if the job ended before, or after the timeout (seconds).

    For an all-reduce another worker is suspended, so that the one that is killed only waits.
    """
    deadline = time.monotonic() + timeout
    while job.returncode is None and time.monotonic() < deadline:
        try:
            if _try(phase, job.workers(), chance):
                return True
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
        time.sleep(chance.uniform(0, 0.05))
    return False


def _try(phase: str, workers: list[psutil.Process], chance: random.Random) -> bool:
    if not workers:
        return False
    if phase == SET_UP:
        return _kill_where_set_up(workers)
    victim = chance.choice(workers)
    if phase == "forward":
        return _kill_if(victim, lambda: "forward" in phase_of(stacks(victim)))
    if phase == "all-reduce":
        others = [worker for worker in workers if worker != victim]
        if not others:
            return False
        other = chance.choice(others)
        other.suspend()
        try:
            time.sleep(0.3)
            before = sum(victim.cpu_times()[:2])
            time.sleep(0.3)
            if sum(victim.cpu_times()[:2]) - before > 0.1:
                return False
            return _kill_if(victim, lambda: "all-reduce" in phase_of(stacks(victim)))
        finally:
            other.resume()
    space = _process_folder(victim)
    deadline = time.monotonic() + 5
    while space and time.monotonic() < deadline:
        if any(space.glob("step-*")):
            if _kill_if(victim, lambda: phase in phase_of(stacks(victim))):
                return True
        else:
            time.sleep(0.0005)
    return False


def _kill_where_set_up(workers: list[psutil.Process]) -> bool:
    """Kill the first worker in which Ray Train runs a function, as it does to set up the process group."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for worker in workers:
            if " ".join(worker.cmdline()).startswith("ray::execute."):
                worker.kill()
                return True
        time.sleep(0.002)
    return False


def _kill_if(worker: psutil.Process, condition: Callable[[], bool]) -> bool:
    """Suspend a process; kill it if a condition holds, else resume it. Returns whether it was killed."""
    worker.suspend()
    if condition():
        worker.kill()
        return True
    worker.resume()
    return False


def _process_folder(worker: psutil.Process) -> Path | None:
    """The worker's folder on the local disk, in which it holds a lock; None before it has one."""
    for link in Path(f"/proc/{worker.pid}/fd").iterdir():
        try:
            target = link.readlink()
        except OSError:
            continue
        if target.name == "lock" and target.parent.parent.name == "processes":
            return target.parent
    return None
