"""Run the work on shards as Ray tasks on a cluster, one per shard, or in threads of this process.

The same function does the work, with the same results.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from itertools import islice
from typing import Any, TypeVar

from crate_ray.errors import UserError

J = TypeVar("J")
R = TypeVar("R")

Report = Callable[[int, int], None]
"""A task calls this regularly with its numbers of good and bad samples. An exception in it ends the task."""

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 0.5
_SMALL_SAMPLES = 20_000
_SMALL_BYTES = 2**29


def wants_cluster(shards: int, samples: int, size: int) -> bool:
    """Whether to use Ray: if it already runs, if RAY_ADDRESS names a cluster, or if there is enough work to start it.

    Enough means several shards with more than 20,000 samples or 512 MiB in total. With less than that, threads finish
    before Ray has started. Where Ray is not installed, threads do all work.

    Args:
        shards: number of shards.
        samples: number of samples; 0 if unknown.
        size: approximate number of bytes to read and write.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local" and not address.startswith("http"):  # http addresses are for submitting jobs
        return True
    ray = sys.modules.get("ray")  # importing it takes a second
    if ray is not None and ray.is_initialized():
        return True
    much = shards > 1 and (samples > _SMALL_SAMPLES or size > _SMALL_BYTES)
    return much and find_spec("ray") is not None


def run_tasks(
    function: Callable[[J, Report], R],
    jobs: Iterable[J],
    show: Callable[[int, int], None],
    *,
    on_cluster: bool,
    threads: int,
) -> Iterator[tuple[int, R]]:
    """Results of function(job, report) with the jobs' numbers, in the order in which they finish.

    Args:
        function: a module-level function whose jobs and results can be pickled.
        jobs: read lazily, only a few more than run at a time.
        show: called several times a second with the good and bad samples reported by all tasks; if it raises, all
            tasks end.
        on_cluster: run Ray tasks of one CPU each, instead of threads.
        threads: number of jobs at a time in threads.

    Raises:
        UserError: a task raised it, there is no cluster, or the cluster lost a task several times.
    """
    return (_on_cluster if on_cluster else _in_threads)(function, jobs, show, threads)


class _Stopped(Exception):  # noqa: N818
    """Ends a task whose result is no longer needed."""


def _in_threads(
    function: Callable[[J, Report], R], jobs: Iterable[J], show: Callable[[int, int], None], threads: int
) -> Iterator[tuple[int, R]]:
    done: dict[int, tuple[int, int]] = {}
    stopped = threading.Event()

    def reporter(number: int) -> Report:
        def report(good: int, bad: int) -> None:
            if stopped.is_set():
                raise _Stopped
            done[number] = good, bad

        return report

    waiting = enumerate(jobs)
    running: dict[Future[R], int] = {}
    with ThreadPoolExecutor(threads, "shard") as pool:
        try:
            while True:
                for number, job in islice(waiting, threads - len(running)):
                    running[pool.submit(function, job, reporter(number))] = number
                if not running:
                    return
                finished, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
                counts = list(done.values())
                show(sum(good for good, _ in counts), sum(bad for _, bad in counts))
                for future in finished:
                    yield running.pop(future), future.result()
        finally:
            stopped.set()


def _on_cluster(
    function: Callable[[J, Report], R], jobs: Iterable[J], show: Callable[[int, int], None], threads: int
) -> Iterator[tuple[int, R]]:
    import ray
    import ray.exceptions

    from crate_ray.ray_cluster import start_ray

    start_ray()
    tally = ray.remote(num_cpus=0)(_Tally).remote()
    task = ray.remote(_reporting).options(num_cpus=1, scheduling_strategy="SPREAD")
    waiting = enumerate(jobs)
    running: dict[Any, int] = {}
    counted = tally.total.remote()
    try:
        while True:
            room = max(2, 2 * int(ray.cluster_resources().get("CPU", 1))) - len(running)
            for number, job in islice(waiting, max(0, room)):
                running[task.remote(function, job, tally, number)] = number
            if not running:
                return
            finished, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS)
            if ray.wait([counted], timeout=0)[0]:
                show(*ray.get(counted))
                counted = tally.total.remote()
            for reference in finished:
                yield running.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"the Ray cluster lost a task that worked on a shard ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}); run the command again to continue"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=False)
        ray.kill(tally)


class _Tally:
    """Actor that sums the tasks' reports."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[int, int]] = {}
        self._total = [0, 0]

    def add(self, number: int, good: int, bad: int) -> None:
        before = self._done.get(number, (0, 0))
        self._done[number] = good, bad
        self._total = [self._total[0] + good - before[0], self._total[1] + bad - before[1]]

    def total(self) -> list[int]:
        return self._total


def _reporting(function: Callable[[J, Report], R], job: J, tally: Any, number: int) -> R:
    """Ray task that runs the function. It sends reports to the tally at most twice a second."""
    latest, sent_at = (0, 0), 0.0

    def report(good: int, bad: int) -> None:
        nonlocal latest, sent_at
        latest = good, bad
        now = time.monotonic()
        if now - sent_at > _REPORT_SECONDS:
            sent_at = now
            tally.add.remote(number, good, bad)

    result = function(job, report)
    tally.add.remote(number, *latest)
    return result
