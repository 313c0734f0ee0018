"""Random faults, run after run: python -m tests.faults.campaign --runs 50

Each run trains on 1, 2 or 3 workers; one to three faults hit it at random moments; a driver that is gone is started
again. Its final weights must be bitwise those of an undisturbed run on as many workers. Half a minute a run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from crate_ray.config import PrepareConfig
from crate_ray.data.builtin import digits_source
from crate_ray.data.packing import pack
from crate_ray.data.storage import open_storage
from tests.faults.runs import EVERY, STEPS, pretrain
from tests.jobs import end, final_weights, finish, start, workers

Job = subprocess.Popen[str]
_MOST_SECONDS = 300.0


def kill_worker(job: Job, chance: random.Random) -> str:
    """SIGKILL to one worker, wherever it is: forward, all-reduce, checkpoint."""
    if found := workers(job):
        _signal(chance.choice(found).pid, signal.SIGKILL)
    return "worker killed"


def kill_driver(job: Job, chance: random.Random) -> str:
    """SIGKILL to the driver; its workers write on for a while."""
    _signal(job.pid, signal.SIGKILL)
    return "driver killed"


def terminate_driver(job: Job, chance: random.Random) -> str:
    """SIGTERM to the driver: what a cluster sends before it takes a machine away."""
    _signal(job.pid, signal.SIGTERM)
    return "driver terminated"


def interrupt_driver(job: Job, chance: random.Random) -> str:
    """What Ctrl-C sends."""
    _signal(job.pid, signal.SIGINT)
    return "driver interrupted"


def stall_worker(job: Job, chance: random.Random) -> str:
    """A worker that does nothing for a few seconds."""
    if found := workers(job):
        victim = chance.choice(found).pid
        _signal(victim, signal.SIGSTOP)
        time.sleep(chance.uniform(0.5, 4))
        _signal(victim, signal.SIGCONT)
    return "worker stalled"


FAULTS: list[Callable[[Job, random.Random], str]] = [
    kill_worker,
    kill_driver,
    terminate_driver,
    interrupt_driver,
    stall_worker,
]


def disturbed(data: str, folder: Path, num_workers: int, chance: random.Random) -> tuple[list[str], int, float]:
    """A run under faults: what hit it, how often the driver was started, and seconds."""
    command, began = pretrain(data, num_workers), time.monotonic()
    job, starts, hit = start(command, folder), 1, []
    try:
        for _ in range(chance.randint(1, 3)):
            committed = chance.randrange(0, STEPS, EVERY)
            while job.poll() is None and _committed(folder) < committed:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 2))
            if job.poll() is None:
                hit.append(chance.choice(FAULTS)(job, chance))
            deadline = time.monotonic() + 30
            while hit and "driver" in hit[-1] and job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if job.poll() not in (None, 0):
                job, starts = start(command, folder), starts + 1
        while job.poll() is None or job.returncode != 0:
            if time.monotonic() > began + _MOST_SECONDS:
                raise AssertionError(f"not finished after {_MOST_SECONDS:.0f} s")
            if job.poll() is None:
                time.sleep(0.1)
            elif (folder / "runs" / "run" / "model").exists():
                break
            else:
                assert starts < 10, "the driver ends again and again"
                job, starts = start(command, folder), starts + 1
    finally:
        if job.poll() is None:
            end(job)
    return hit, starts, time.monotonic() - began


def _committed(folder: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(p.name.split("-")[1]) for p in folder.glob("runs/run/commits/step-*.json")), default=0)


def _signal(pid: int, number: signal.Signals) -> None:
    if psutil.pid_exists(pid):
        os.kill(pid, number)


def main() -> None:
    """Run the campaign and print a table; exit 1 unless every run ended equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    table = Table(title=f"{options.runs} runs of {STEPS} steps, a checkpoint every {EVERY}")
    for heading in ("run", "workers", "faults", "driver starts", "seconds", "final weights"):
        table.add_column(heading)
    expected: dict[int, str] = {}
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        config = PrepareConfig(source="digits", split="test", output=f"{root}/digits")
        pack(digits_source("test"), open_storage(config.output, config.s3), config)
        for number in range(options.runs):
            num_workers = chance.randint(1, 3)
            if num_workers not in expected:
                folder = Path(root) / f"undisturbed-{num_workers}"
                folder.mkdir()
                finish(start(pretrain(config.output, num_workers), folder), folder)
                expected[num_workers] = final_weights(folder / "runs" / "run")
            folder = Path(root) / f"run-{number}"
            folder.mkdir()
            hit, starts, seconds = [], 0, 0.0
            try:
                hit, starts, seconds = disturbed(config.output, folder, num_workers, chance)
                same = final_weights(folder / "runs" / "run") == expected[num_workers]
                outcome = "equal" if same else "DIFFERENT"
            except AssertionError as error:
                outcome = f"FAILED: {error}"
            outcomes[outcome.split(":")[0]] += 1
            if outcome != "equal":
                Console(stderr=True).print((folder / "job.log").read_text()[-3000:], markup=False)
            row = str(number + 1), str(num_workers), ", ".join(hit), str(starts), f"{seconds:.0f}", outcome
            print("  ".join(row), flush=True)
            table.add_row(*row)
    Console().print(table)
    print(f"{outcomes['equal']} of {options.runs} ended equal")
    sys.exit(outcomes["equal"] != options.runs)


if __name__ == "__main__":
    main()
