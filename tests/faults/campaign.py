"""Random faults, run after run: python -m tests.faults.campaign --runs 50

Each run trains on 1, 2 or 3 workers and writes to a folder or an S3 server. One to three faults hit it, at random
moments or in a chosen phase. A driver that has ended is started again. The final weights must be bitwise equal to those
of an undisturbed run with the same number of workers. If MLflow was unavailable, it must have all records in the end.
The first fault of the runs goes through all kinds in turn. The other faults are random kinds that suit the run. A run
takes half a minute, or more if MLflow is unavailable for long.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Literal, NamedTuple

import boto3.session
import psutil
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from crate_ray.config import S3Config
from crate_ray.runs.metrics import LOSS
from crate_ray.storage.interface import Storage, open_storage
from tests.faults.phases import PHASES, SET_UP, kill_in
from tests.faults.proxy import ErrorAnswer, FaultProxy, Reset
from tests.faults.runs import EVERY, STEPS, Undisturbed, pack_digits, pretrain, run_in
from tests.faults.services import full_disk, give_keys, mlflow_server
from tests.jobs import (
    Job,
    RayCluster,
    end,
    final_weights,
    finish,
    forkserver,
    free_port,
    kill_node,
    newest_commit,
    running_ray,
    start,
)
from tests.s3_gateway import S3Gateway, running_gateway

_MOST_SECONDS = 600.0
_SHARES = {"S3": 0.4, "MLflow": 0.3}
"""Shares of the runs that use S3 or MLflow even if their first fault does not need it."""


class Outcome(NamedTuple):
    """Result of a run."""

    number: int
    workers: int
    has: list[str]
    """Services that the run used: see Kind.needs."""
    first: str
    """The first planned fault, even if it could not strike."""
    faults: list[str]
    """The faults that struck."""
    starts: int
    seconds: float
    result: str


@dataclass
class Disturbed:
    """A run under faults. Its driver is started by start()."""

    first: str
    """The first planned fault."""
    num_workers: int
    has: set[str]
    """Services and resources of the run that faults need: see Kind.needs."""
    command: list[str]
    folder: Path
    cluster: RayCluster
    run: Storage
    chance: random.Random
    store: FaultProxy | None = None
    """Proxy in front of its storage, if that is S3."""
    tracking: FaultProxy | None = None
    """Proxy in front of its MLflow server, if it has one."""
    node_cpus: int = 0
    """CPUs of each of its workers' nodes, if the run has its own cluster."""
    faults: list[str] = field(default_factory=list)
    starts: int = 0
    job: Job = field(init=False)
    back: threading.Timer | None = None
    """Makes MLflow available again after a long outage."""
    _began: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Start the driver, or start it again after it has ended."""
        assert self.starts < 10, f"the driver ends again and again:\n{self.job.log[-3000:]}"
        self.job, self.starts = start(self.command, self.folder, self.cluster), self.starts + 1

    def hit(self, name: str, last: int) -> None:
        """Wait for a random step up to `last`, then for a random time, and cause a fault."""
        # A new run that MLflow cannot record does not train.
        step = self.chance.randrange(EVERY if KINDS[name].needs == "MLflow" else 0, last + 1, EVERY)
        while self.is_running and newest_commit(self.run) < step:
            time.sleep(0.05)
        time.sleep(self.chance.uniform(0, 1))
        if self.is_running:
            self.strike(name)

    def strike(self, name: str) -> None:
        """Cause a fault now."""
        if KINDS[name].strike(self):
            self.faults.append(name)

    @property
    def is_running(self) -> bool:
        """Whether the driver is running. Fails if the run takes too long."""
        assert time.monotonic() < self._began + _MOST_SECONDS, f"not finished:\n{self.job.log[-3000:]}"
        return self.job.returncode is None

    def go_on(self) -> bool:
        """Whether the run is not finished yet. If the driver has ended early, it is started again."""
        if self.job.returncode not in (None, 0):
            self.start()
        return self.is_running


# --- Faults: each says whether it could strike ----------------------------------------------------------------------


def kill_worker(it: Disturbed) -> bool:
    """SIGKILL to one worker, wherever it is."""
    return _to_worker(it, psutil.Process.kill)


def kill_worker_in(phase: str, it: Disturbed) -> bool:
    """SIGKILL to one worker in a phase of its work; where they are to be set up again, after another one."""
    if phase == SET_UP and not kill_worker(it):
        return False
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


def mlflow_away_long(seconds: tuple[float, float] | None, it: Disturbed) -> bool:
    """MLflow is not there for a time within these limits (None: as long as the run works); the run goes on."""
    assert it.tracking
    _plan(Reset(forward=False), 1.0, it.tracking)
    if seconds:
        it.back = threading.Timer(it.chance.uniform(*seconds), it.tracking.clear)
        it.back.start()
    return True


def kill_raylet(it: Disturbed) -> bool:
    """SIGKILL to the raylet of a node that has workers, which notice it or write on; then another node comes."""
    return _lose_node(it, psutil.Process.kill)


def switch_off_node(it: Disturbed) -> bool:
    """A node that has workers dies with all that runs on it; then another one comes."""
    return _lose_node(it, kill_node)


def take_node(it: Disturbed) -> bool:
    """A notice of preemption: the run saves a checkpoint in time; then the node leaves, and another one comes."""
    raylet, workers = _busy_node(it), it.job.workers()
    if not raylet:
        return False
    for worker in workers:  # else the run may be over before the notice has come
        with suppress(psutil.NoSuchProcess):
            worker.suspend()
    try:
        it.cluster.announce_loss(raylet, seconds=60)
        time.sleep(1)
        before = newest_commit(it.run)
    finally:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.resume()
    deadline = time.monotonic() + 50
    while it.job.workers() == workers and newest_commit(it.run) <= before < STEPS:
        assert time.monotonic() < deadline, f"no checkpoint after a notice of preemption:\n{it.job.log[-3000:]}"
        time.sleep(0.05)
    return _replace(it, raylet, kill_node)


class Kind(NamedTuple):
    """A kind of fault."""

    strike: Callable[[Disturbed], bool]
    """Causes the fault. Returns whether it could strike."""
    needs: Literal["", "two", "S3", "MLflow", "nodes"] = ""
    """What the fault needs: at least two workers, S3 as storage, an MLflow server, or nodes that may be lost."""
    place: Literal["any", "first"] = "any"
    """When it strikes: 'first' if it lasts while others strike."""


KINDS: dict[str, Kind] = {
    "worker killed": Kind(kill_worker),
    **{
        f"worker killed: {phase}": Kind(partial(kill_worker_in, phase), "two" if phase == "all-reduce" else "")
        for phase in (*PHASES, SET_UP)
    },
    "worker stalled": Kind(stall_worker),
    "disk full": Kind(fill_disk),
    "driver killed": Kind(partial(signal_driver, signal.SIGKILL)),
    "driver terminated": Kind(partial(signal_driver, signal.SIGTERM)),
    "driver interrupted": Kind(partial(signal_driver, signal.SIGINT)),
    "store slow down": Kind(store_slow_down, "S3"),
    "store resets": Kind(store_resets, "S3"),
    "store away": Kind(store_away, "S3"),
    "MLflow away": Kind(mlflow_away, "MLflow"),
    "MLflow away for a minute": Kind(partial(mlflow_away_long, (60, 70)), "MLflow", "first"),
    "MLflow away for good": Kind(partial(mlflow_away_long, None), "MLflow", "first"),
    "raylet killed": Kind(kill_raylet, "nodes"),
    "node switched off": Kind(switch_off_node, "nodes"),
    "node preempted": Kind(take_node, "nodes"),
}
FOR_EVER = {"MLflow away for good"}


def _workers(it: Disturbed) -> list[psutil.Process]:
    """Wait for the run's workers. Returns none if the driver ends before there are any."""
    while not (workers := it.job.workers()) and it.is_running:
        time.sleep(0.1)
    return workers


def _to_worker(it: Disturbed, fault: Callable[[psutil.Process], None]) -> bool:
    workers = _workers(it)
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


def _lose_node(it: Disturbed, kill: Callable[[psutil.Process], None]) -> bool:
    raylet = _busy_node(it)
    return raylet is not None and _replace(it, raylet, kill)


def _replace(it: Disturbed, raylet: psutil.Process, kill: Callable[[psutil.Process], None]) -> bool:
    """Take a node away and let another one come after a while."""
    struck = it.is_running
    kill(raylet)
    time.sleep(it.chance.uniform(0, 5))
    it.cluster.add_node(it.node_cpus)
    return struck


def _busy_node(it: Disturbed) -> psutil.Process | None:
    """Raylet of a node with workers. None if the driver ends before there are any."""
    workers = _workers(it)
    with suppress(psutil.NoSuchProcess):
        return it.chance.choice(workers).parent() if workers else None
    return None


# --- Runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """Data and services that all runs share."""

    root: Path
    digits: str
    undisturbed: dict[int, str]
    """Digest of the final weights by number of workers."""
    gateway: S3Gateway
    mlflow: str
    """Address of an MLflow server."""
    seed: int
    faults: list[str]
    """Kinds of faults, in the order in which runs get them as their first fault."""

    def run_all(self, numbers: Queue[int | None], outcomes: Queue[Outcome]) -> None:
        """Do runs on this process's own Ray, until there are no more numbers.

        Call it in a separate process, because nodes are started from the main thread, in a changed environment.
        """
        os.environ.update(self.gateway.environment)
        with running_ray(4) as cluster:
            for number in iter(numbers.get, None):
                outcomes.put(self.run(number, cluster))

    def run(self, number: int, cluster: RayCluster) -> Outcome:
        """One run under faults, which its number and the seed determine. If it loses nodes, it has its own cluster."""
        chance, began = random.Random(f"{self.seed}-{number}"), time.monotonic()
        first = self.faults[number % len(self.faults)]
        it, result = None, "FAILED"
        try:
            with ExitStack() as stack:
                it = self._set_up(stack, number, first, chance, cluster)
                self._disturb(it)
                assert final_weights(it.run) == self.undisturbed[it.num_workers], "other weights"
                if it.tracking:
                    self._check_delivered(it, number)
            result = "equal"
        except Exception as error:
            result = f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            print(f"--- run {number}\n{traceback.format_exc()[-6000:]}", file=sys.stderr, flush=True)
        workers, has, struck, starts = (it.num_workers, it.has, it.faults, it.starts) if it else (0, set(), [], 0)
        return Outcome(number, workers, sorted(has - {"two"}), first, struck, starts, time.monotonic() - began, result)

    def _set_up(
        self, stack: ExitStack, number: int, first: str, chance: random.Random, cluster: RayCluster
    ) -> Disturbed:
        """Set up everything that a run needs. The driver is not started yet."""
        folder = self.root / f"run-{number}"
        folder.mkdir()
        has: set[str] = {thing for thing, share in _SHARES.items() if chance.random() < share}
        if KINDS[first].needs:
            has.add(KINDS[first].needs)
        num_workers = chance.randint(2 if "two" in has else 1, 3)
        if num_workers > 1:
            has.add("two")
        settings: dict[str, object] = {"scaling__max_failures": 8}
        run, store, tracking, node_cpus = run_in(folder), None, None, 0
        if "nodes" in has:
            cluster = stack.enter_context(running_ray(0))  # the head has room for the driver only
            node_cpus = chance.choice([1, num_workers])
            for _ in range(num_workers // node_cpus):
                cluster.add_node(node_cpus)
            settings["scaling__preemption_seconds"] = 0.1
        give_keys(self.gateway, cluster)
        if "S3" in has:
            store = stack.enter_context(FaultProxy(self.gateway.endpoint))
            uri = f"s3://campaign/{self.seed}-{number}"
            settings |= {"storage": uri, "s3__endpoint_url": store.url}
            run = open_storage(uri, S3Config(endpoint_url=self.gateway.endpoint)).under("run")
        if "MLflow" in has:
            tracking = stack.enter_context(FaultProxy(self.mlflow))
            settings |= {"tracking__uri": tracking.url, "tracking__experiment": f"{self.seed}-{number}"}
        if first in FOR_EVER:
            settings["tracking__deliver_seconds"] = 3
        command = pretrain(self.digits, num_workers, **settings)
        return Disturbed(first, num_workers, has, command, folder, cluster, run, chance, store, tracking, node_cpus)

    def _disturb(self, it: Disturbed) -> None:
        """Start the driver and cause faults, and start it again until it succeeds."""
        first = KINDS[it.first]
        more = [
            name
            for name, kind in KINDS.items()
            if name in self.faults
            and kind.place == "any"
            and kind.needs in {*it.has, ""}
            and not (kind.needs == first.needs and first.place != "any")  # it would end the first fault, which lasts
        ]
        it.start()
        try:
            it.hit(it.first, STEPS // 2)
            for name in it.chance.choices(more, k=it.chance.randint(0, 2)) if more else []:
                if it.go_on():
                    it.hit(name, STEPS - 1)
            while it.go_on():
                time.sleep(0.1)
        finally:
            end(it.job)
            if it.back:
                it.back.cancel()

    def _check_delivered(self, it: Disturbed, number: int) -> None:
        """Check that MLflow has all records. If it stayed unavailable during the run, start the job again first."""
        assert it.tracking
        if it.first in FOR_EVER:
            told = "the rest is in" in it.job.log
            assert told or it.first not in it.faults, "the job did not report the undelivered records"
            it.tracking.clear()
            it.command += ["--tracking.deliver_seconds", "120"]
            it.start()
            finish(it.job)
        client, experiment = MlflowClient(self.mlflow), f"{self.seed}-{number}"
        found = client.get_experiment_by_name(experiment)
        assert found is not None, "MLflow has received nothing"
        (run,) = client.search_runs([found.experiment_id])
        steps = {point.step for point in client.get_metric_history(run.info.run_id, LOSS)}
        assert steps == set(range(10, STEPS + 1, 10)), f"MLflow has the steps {steps}"
        assert run.info.status == "FINISHED"


def main() -> None:
    """Run the campaign and print a table. The exit code is 1 unless every run ended with equal weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=1, help="number of the first run, to repeat one")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=[*KINDS], help="only these kinds", metavar="KIND")
    parser.add_argument("--json", type=Path, help="write the outcomes into this file, too", metavar="FILE")
    options = parser.parse_args()
    order = random.Random(options.seed).sample(options.faults, len(options.faults))
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        gateway = stack.enter_context(running_gateway())
        server = stack.enter_context(mlflow_server(root, free_port()))
        _make_bucket(gateway)
        digits = pack_digits(root)
        alone = Undisturbed(digits, root)
        campaign = Campaign(
            root, digits, {n: alone.weights(n) for n in (1, 2, 3)}, gateway, server, options.seed, order
        )
        outcomes = _run_in_processes(campaign, range(options.first, options.first + options.runs), options.parallel)
    struck = Counter(name for outcome in outcomes for name in outcome.faults)
    table = Table(title=f"{options.runs} runs of {STEPS} steps, a checkpoint every {EVERY}")
    for heading in ("run", "workers", "with", "faults", "driver starts", "seconds", "final weights"):
        table.add_column(heading)
    for outcome in outcomes:
        table.add_row(*_row(outcome))
    Console(width=180).print(table)
    print(", ".join(f"{name} {struck[name]}" for name in options.faults))
    equal = sum(outcome.result == "equal" for outcome in outcomes)
    if options.json:
        summary = {"seed": options.seed, "runs": options.runs, "equal": equal, "struck": struck}
        told = summary | {"outcomes": [outcome._asdict() for outcome in outcomes]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{equal} of {options.runs} ended equal")
    sys.exit(equal != options.runs)


def _run_in_processes(campaign: Campaign, numbers: range, parallel: int) -> list[Outcome]:
    context = forkserver()
    waiting: Queue[int | None] = context.Queue()
    ended: Queue[Outcome] = context.Queue()
    for number in [*numbers, *[None] * parallel]:
        waiting.put(number)
    processes = [context.Process(target=campaign.run_all, args=(waiting, ended)) for _ in range(parallel)]
    for process in processes:
        process.start()
    outcomes: list[Outcome] = []
    try:
        while len(outcomes) < len(numbers):
            alive = any(process.is_alive() for process in processes)
            try:
                outcomes.append(ended.get(timeout=1))
            except queue.Empty:
                if alive:
                    continue
                break  # outcomes are missing then, which are not equal
            print("  ".join(_row(outcomes[-1])), flush=True)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return sorted(outcomes)


def _row(outcome: Outcome) -> tuple[str, ...]:
    return (
        str(outcome.number),
        str(outcome.workers),
        ", ".join(outcome.has),
        ", ".join(outcome.faults),
        str(outcome.starts),
        f"{outcome.seconds:.0f}",
        outcome.result,
    )


def _make_bucket(gateway: S3Gateway) -> None:
    client = boto3.session.Session(gateway.access_key, gateway.secret_key).client(
        "s3", endpoint_url=gateway.endpoint, region_name="us-east-1"
    )
    client.create_bucket(Bucket="campaign")


if __name__ == "__main__":
    main()
