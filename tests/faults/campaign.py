"""Random faults, run after run: python -m tests.faults.campaign --runs 50

Each run trains on 1, 2 or 3 workers, into a folder or an S3 server; one to three faults hit it at random moments or in
a chosen phase of its work; a driver that is gone is started again. Its final weights must be bitwise those of an
undisturbed run on as many workers, and where MLflow was away it must have everything in the end. Half a minute a run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import boto3.session
import psutil
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from crate_ray.config import S3Config
from crate_ray.data.storage import Storage, open_storage
from tests.faults.phases import PHASES, kill_in
from tests.faults.proxy import ErrorAnswer, FaultProxy, Reset
from tests.faults.runs import EVERY, STEPS, Undisturbed, pack_digits, pretrain, run_in
from tests.faults.services import full_disk, give_keys, mlflow_server
from tests.jobs import Job, RayCluster, end, final_weights, free_port, newest_commit, running_ray, start
from tests.s3_gateway import S3Gateway, running_gateway

_MOST_SECONDS = 600.0


class Outcome(NamedTuple):
    """How a run went."""

    workers: int
    faults: list[str]
    starts: int
    seconds: float
    result: str


@dataclass
class Disturbed:
    """A run under faults."""

    command: list[str]
    folder: Path
    cluster: RayCluster
    run: Storage
    chance: random.Random
    store: FaultProxy | None = None
    """In front of its storage, where that is S3."""
    tracking: FaultProxy | None = None
    """In front of its MLflow server, where it has one."""
    faults: list[str] = field(default_factory=list)
    starts: int = 0
    job: Job = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the driver, again where it has ended."""
        assert self.starts < 10, f"the driver ends again and again:\n{self.job.log[-3000:]}"
        self.job, self.starts = start(self.command, self.folder, self.cluster), self.starts + 1

    def hit(self) -> None:
        """One fault at a random moment."""
        step = self.chance.randrange(0, STEPS, EVERY)
        while self.job.returncode is None and newest_commit(self.run) < step:
            time.sleep(0.05)
        time.sleep(self.chance.uniform(0, 1))
        kinds = dict(FAULTS)
        if self.store is None:
            del kinds["store slow down"], kinds["store resets"], kinds["store away"]
        if self.tracking is None:
            del kinds["MLflow away"]
        name = self.chance.choice([*kinds])
        if self.job.returncode is None and kinds[name](self):
            self.faults.append(name)

    def go_on(self) -> bool:
        """Whether it goes on, after a driver that has ended early was started again."""
        if self.job.returncode not in (None, 0):
            self.start()
        return self.job.returncode is None


# --- Faults: each says whether it could strike ----------------------------------------------------------------------


def kill_worker(it: Disturbed) -> bool:
    """SIGKILL to one worker, wherever it is."""
    return _to_worker(it, psutil.Process.kill)


def kill_worker_in(phase: str, it: Disturbed) -> bool:
    """SIGKILL to one worker in a phase of its work."""
    return kill_in(phase, it.job, it.chance, timeout=20)


def stall_worker(it: Disturbed) -> bool:
    """A worker that does nothing for a few seconds."""

    def stall(worker: psutil.Process) -> None:
        worker.suspend()
        time.sleep(it.chance.uniform(0.5, 4))
        worker.resume()

    return _to_worker(it, stall)


def fill_disk(it: Disturbed) -> bool:
    """No file of one worker can grow any more, for a few seconds."""

    def fill(worker: psutil.Process) -> None:
        with full_disk(worker):
            time.sleep(it.chance.uniform(0.5, 5))

    return _to_worker(it, fill)


def signal_driver(number: signal.Signals, it: Disturbed) -> bool:
    """SIGKILL (its workers write on for a while), SIGTERM (of a cluster that takes a machine away), SIGINT (Ctrl-C)."""
    it.job.send_signal(number)
    it.job.wait(90)
    return True


def store_slow_down(it: Disturbed) -> bool:
    """The store asks to slow down, one time in three."""
    return _for_a_while(it.store, it.chance, partial(_plan, ErrorAnswer("SlowDown", 503), 0.3))


def store_resets(it: Disturbed) -> bool:
    """Connections are reset, before the store sees a request or after it has done what was asked."""

    def plan(proxy: FaultProxy) -> None:
        _plan(Reset(forward=False), 0.2, proxy)
        _plan(Reset(), 0.2, proxy)

    return _for_a_while(it.store, it.chance, plan)


def store_away(it: Disturbed) -> bool:
    """No request comes through."""
    return _for_a_while(it.store, it.chance, partial(_plan, Reset(forward=False), 1.0))


def mlflow_away(it: Disturbed) -> bool:
    """MLflow is not there for a few seconds."""
    return _for_a_while(it.tracking, it.chance, partial(_plan, Reset(forward=False), 1.0))


FAULTS: dict[str, Callable[[Disturbed], bool]] = {
    "worker killed": kill_worker,
    **{f"worker killed: {phase}": partial(kill_worker_in, phase) for phase in PHASES},
    "worker stalled": stall_worker,
    "disk full": fill_disk,
    "driver killed": partial(signal_driver, signal.SIGKILL),
    "driver terminated": partial(signal_driver, signal.SIGTERM),
    "driver interrupted": partial(signal_driver, signal.SIGINT),
    "store slow down": store_slow_down,
    "store resets": store_resets,
    "store away": store_away,
    "MLflow away": mlflow_away,
}


def _to_worker(it: Disturbed, fault: Callable[[psutil.Process], None]) -> bool:
    workers = it.job.workers()
    if not workers:
        return False
    with suppress(psutil.NoSuchProcess):
        fault(it.chance.choice(workers))
    return True


def _plan(fault: ErrorAnswer | Reset, probability: float, proxy: FaultProxy) -> None:
    proxy.plan(fault, method=None, probability=probability, seed=int(time.time()))


def _for_a_while(proxy: FaultProxy | None, chance: random.Random, plan: Callable[[FaultProxy], None]) -> bool:
    assert proxy
    plan(proxy)
    time.sleep(chance.uniform(1, 8))
    proxy.clear()
    return True


# --- Runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """What all runs share."""

    root: Path
    digits: str
    cluster: RayCluster
    undisturbed: Undisturbed
    gateway: S3Gateway
    mlflow: str
    """Address of an MLflow server."""

    def run(self, number: int, seed: int) -> Outcome:
        """One run under faults that its number and the seed decide."""
        chance, began = random.Random(f"{seed}-{number}"), time.monotonic()
        folder = self.root / f"run-{number}"
        folder.mkdir()
        num_workers, it, result = chance.randint(1, 3), None, "FAILED"
        on_s3, on_server = chance.random() < 0.4, chance.random() < 0.3
        settings: dict[str, object] = {"scaling__max_failures": 8}
        run = run_in(folder)
        try:
            with ExitStack() as stack:
                store = stack.enter_context(FaultProxy(self.gateway.endpoint)) if on_s3 else None
                tracking = stack.enter_context(FaultProxy(self.mlflow)) if on_server else None
                if store:
                    uri = f"s3://campaign/{seed}-{number}"
                    settings |= {"storage": uri, "s3__endpoint_url": store.url}
                    run = open_storage(uri, S3Config(endpoint_url=self.gateway.endpoint)).under("run")
                if tracking:
                    settings |= {"tracking__uri": tracking.url, "tracking__experiment": f"{seed}-{number}"}
                command = pretrain(self.digits, num_workers, **settings)
                it = Disturbed(command, folder, self.cluster, run, chance, store, tracking)
                try:
                    for _ in range(chance.randint(1, 3)):
                        if it.go_on():
                            it.hit()
                    while it.go_on():
                        assert time.monotonic() < began + _MOST_SECONDS, f"not finished:\n{it.job.log[-3000:]}"
                        time.sleep(0.1)
                finally:
                    end(it.job)
            assert final_weights(run) == self.undisturbed.weights(num_workers), "other weights"
            if on_server:
                self._delivered(f"{seed}-{number}")
            result = "equal"
        except Exception as error:
            result = f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            print(f"--- run {number}\n{traceback.format_exc()[-6000:]}", file=sys.stderr, flush=True)
        faults, starts = (it.faults, it.starts) if it else ([], 0)
        return Outcome(num_workers, faults, starts, time.monotonic() - began, result)

    def _delivered(self, experiment: str) -> None:
        client = MlflowClient(self.mlflow)
        found = client.get_experiment_by_name(experiment)
        assert found is not None, "MLflow was told nothing"
        (run,) = client.search_runs([found.experiment_id])
        steps = {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")}
        assert steps == set(range(10, STEPS + 1, 10)), f"MLflow has the steps {steps}"
        assert run.info.status == "FINISHED"


def main() -> None:
    """Run the campaign and print a table; exit 1 unless every run ended equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=1, help="number of the first run, to repeat one")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    table = Table(title=f"{options.runs} runs of {STEPS} steps, a checkpoint every {EVERY}")
    for heading in ("run", "workers", "faults", "driver starts", "seconds", "final weights"):
        table.add_column(heading)
    outcomes: Counter[str] = Counter()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        cluster = stack.enter_context(running_ray(4 * options.parallel))
        gateway = stack.enter_context(running_gateway())
        server = stack.enter_context(mlflow_server(root, free_port()))
        _use(gateway, cluster)
        digits = pack_digits(root)
        campaign = Campaign(root, digits, cluster, Undisturbed(digits, root), gateway, server)
        pool = stack.enter_context(ThreadPoolExecutor(options.parallel))
        numbers = range(options.first, options.first + options.runs)
        running = {pool.submit(campaign.run, number, options.seed): number for number in numbers}
        for done in as_completed(running):
            outcome = done.result()
            outcomes[outcome.result.split(":")[0]] += 1
            row = (
                str(running[done]),
                str(outcome.workers),
                ", ".join(outcome.faults),
                str(outcome.starts),
                f"{outcome.seconds:.0f}",
                outcome.result,
            )
            print("  ".join(row), flush=True)
            table.add_row(*row)
    Console(width=160).print(table)
    print(f"{outcomes['equal']} of {options.runs} ended equal")
    sys.exit(outcomes["equal"] != options.runs)


def _use(gateway: S3Gateway, cluster: RayCluster) -> None:
    """To all that runs on the cluster, and to this process; with a bucket for the runs."""
    give_keys(gateway, cluster)
    os.environ.update(gateway.environment)
    client = boto3.session.Session().client("s3", endpoint_url=gateway.endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="campaign")


if __name__ == "__main__":
    main()
