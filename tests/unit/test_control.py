"""Workers agree on what to do next, and the error of a run that hangs names the rank that hangs."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from crate_ray.errors import UserError
from crate_ray.training.control import Watchdog, WorkerControl
from crate_ray.training.heartbeat import Heartbeat


def _decide(rank: int, world: int, port: int, out: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    asked = threading.Event()
    heartbeats: list[Heartbeat] = []
    control = WorkerControl(
        "a", rank, world, heartbeats.append, asked.is_set, heartbeat_seconds=0.5, preemption_seconds=1
    )
    stopped = None
    checks = []
    with control:
        time.sleep(0.6)
        for step in range(400):
            decision = control.decide(step)
            if decision.check_preemption:
                checks.append(step)
            if decision.stop:
                stopped = step
                break
            if step == 100 and rank == 0:
                asked.set()
            time.sleep(0.01 * (1 + rank % 2))
        control.finish()
        time.sleep(0.6)
    out.put((rank, stopped, checks, [beat.phase for beat in heartbeats]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_stop_and_check_for_preemption_at_the_same_step() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    processes = [context.Process(target=_decide, args=(rank, 3, port, out)) for rank in range(3)]
    for process in processes:
        process.start()
    found = sorted(out.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    assert len({(stopped, tuple(checks)) for _, stopped, checks, _ in found}) == 1
    _, stopped, checks, phases = found[0]
    assert stopped is not None and 100 < stopped < 400 and checks
    assert phases[0] == "start" and phases[-1] == "end" and set(phases[1:-1]) == {"step"}


def heartbeat(rank: int, step: int, phase: str = "step", group: str = "a") -> Heartbeat:
    return Heartbeat(group, rank, step, phase, "training/step.py:9 in train_step")


def test_the_silent_rank_is_named() -> None:
    dog = Watchdog(60)
    dog.check(1000)  # nothing has started
    for now in range(0, 200, 10):
        for rank in range(3):
            if rank != 1 or now < 50:
                dog.seen(heartbeat(rank, min(now, 50)), now)
        if now < 100:
            dog.check(now)
    with pytest.raises(UserError, match=r"no step was made for 60 s: rank 1 \(step 40.*has sent no heartbeat"):
        dog.check(200)


def test_the_rank_at_another_line_is_named() -> None:
    dog = Watchdog(60)
    for now in range(0, 100, 10):
        dog.seen(heartbeat(0, 7), now)
        dog.seen(Heartbeat("a", 1, 7, "data", "data/loader.py:1 in __iter__"), now)
        dog.seen(heartbeat(2, 7), now)
    with pytest.raises(UserError, match=r"rank 1 \(step 7, data, data/loader.py:1 in __iter__\) makes no progress"):
        dog.check(95)
    # A group that restarts at an earlier step is not behind.
    dog.seen(heartbeat(0, 2, group="b"), 100)
    dog.check(150)


def test_workers_that_wait_for_a_node_do_not_hang() -> None:
    dog = Watchdog(60)
    for now in range(0, 100, 10):  # then one rank is lost, and Ray Train ends the others
        for rank in range(3):
            dog.seen(heartbeat(rank, now), now)
    for now in range(100, 1000):
        dog.check(now)
    # Two workers restart at the step of the newest checkpoint; the lost rank is not blamed afterwards.
    for now in range(1000, 1200, 10):
        for rank in range(2):
            dog.seen(heartbeat(rank, min(90 + now - 1000, 150), group="b"), now)
        if now < 1120:
            dog.check(now)
    with pytest.raises(UserError, match=r"s: rank 0 [^,]*,[^,]*,[^,]*, rank 1 [^,]*,[^,]*,[^,]* makes no progress"):
        dog.check(1200)


def test_a_slow_start_and_a_slow_end_are_not_a_hang_but_a_silent_start_is() -> None:
    dog = Watchdog(60)
    for now in range(0, 500, 10):
        for rank in range(2):
            dog.seen(heartbeat(rank, 0, "start"), now)
        dog.check(now)
    assert not dog.has_begun
    for now in range(500, 550, 10):
        for rank in range(2):
            dog.seen(heartbeat(rank, 40), now)
        dog.check(now)
    assert dog.has_begun
    for now in range(550, 900, 10):  # rank 1 has uploaded and is gone
        dog.seen(heartbeat(0, 41, "end"), now)
        dog.check(now)
    for now in range(1000, 1100, 10):
        dog.seen(heartbeat(0, 0, "start", "b"), now)
        if now < 1020:
            dog.seen(heartbeat(1, 0, "start", "b"), now)
    with pytest.raises(UserError, match=r"rank 1 \(step 0, start, .* has sent no heartbeat"):
        dog.check(1100)
