"""Where the work on shards is done: as Ray tasks over a cluster, one a shard, or by threads of this process.

The work is the same function either way; what it returns and writes does not depend on the place.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

from crate_ray.errors import UserError

J = TypeVar("J")
R = TypeVar("R")

Report = Callable[[int, int], None]
"""Called by a task now and then with the good and bad samples that it has done so far; may raise to end the task."""

_LOOK_SECONDS = 0.2
_REPORT_SECONDS = 0.5
_SMALL_SAMPLES = 20_000
_SMALL_BYTES = 2**29


def wants_cluster(shards: int, samples: int, size: int) -> bool:
    """Whether work is for Ray: it runs already, or RAY_ADDRESS names a cluster, or starting it pays for so much work.

    That is the case with several shards that have more than 20,000 samples or 512 MiB together; less is done by threads
    before Ray has started.

    Args:
        shards: number of tasks.
        samples: of all of them; 0 if not known.
        size: bytes to read and write, about.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local" and not address.startswith("http"):  # that is where jobs are submitted to, not a cluster
        return True
    import ray  # takes a second

    if ray.is_initialized():
        return True
    return shards > 1 and (samples > _SMALL_SAMPLES or size > _SMALL_BYTES)


def run_tasks(
    function: Callable[[J, Report], R],
    jobs: Iterable[J],
    show: Callable[[int, int], None],
    *,
    on_cluster: bool,
    threads: int,
) -> Iterator[tuple[int, R]]:
    """Results of function(job, report) with the jobs' numbers, as they come.

    Args:
        function: a module's function, whose jobs and results can be sent to another machine.
        jobs: taken one by one, not many more than run at a time.
        show: called several times a second with the good and bad samples that all tasks have reported; what it raises
            ends all tasks.
        on_cluster: run Ray tasks of one CPU each.
        threads: jobs that run at a time where that is not so.

    Raises:
        UserError: of a task; or there is no cluster, or it lost a task several times.
    """
    return (_on_cluster if on_cluster else _in_threads)(function, jobs, show, threads)


class _Stopped(Exception):  # noqa: N818
    """Ends a task whose result nobody waits for."""


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
                finished, _ = wait(running, _LOOK_SECONDS, FIRST_COMPLETED)
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
            finished, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS)
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
            f"{str(error).strip().splitlines()[0]}); start again to go on with what is left"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=False)
        ray.kill(tally)


class _Tally:
    """Actor that adds up what the tasks report."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[int, int]] = {}
        self._total = [0, 0]

    def note(self, number: int, good: int, bad: int) -> None:
        before = self._done.get(number, (0, 0))
        self._done[number] = good, bad
        self._total = [self._total[0] + good - before[0], self._total[1] + bad - before[1]]

    def total(self) -> list[int]:
        return self._total


def _reporting(function: Callable[[J, Report], R], job: J, tally: Any, number: int) -> R:
    """A task: the function, with reports that are sent on now and then."""
    latest, sent_at = (0, 0), 0.0

    def report(good: int, bad: int) -> None:
        nonlocal latest, sent_at
        latest = good, bad
        now = time.monotonic()
        if now - sent_at > _REPORT_SECONDS:
            sent_at = now
            tally.note.remote(number, good, bad)

    result = function(job, report)
    tally.note.remote(number, *latest)
    return result
