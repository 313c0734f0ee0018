"""Control messages between the driver and the workers: heartbeats, requests to stop, notices of preemption.

Each worker has a thread that sends the worker's position to the driver. Rank 0's thread also asks the driver whether to
stop. Before each step, an all-reduce shares rank 0's answer with all ranks. It was started one step earlier, so that no
rank waits for it.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from crate_ray.errors import UserError
from crate_ray.training.heartbeat import Heartbeat
from crate_ray.training.worker import StepDecision

START, END = "start", "end"
"""Phases before the first step and after the last one."""
_POLL_SECONDS = 0.5
_PACKAGE = Path(__file__).parents[1].as_posix()


def heartbeat_seconds(hang_seconds: float) -> float:
    """Time between two heartbeats. It is short enough that several may be late before a run counts as hanging."""
    return min(10.0, hang_seconds / 6)


class WorkerControl:
    """The worker's side. Use it as a context manager around all of the worker's work.

    Args:
        group: id of the worker group.
        rank, world_size: this worker, and the number of workers.
        send: sends a heartbeat to the driver; called from a thread.
        stop_requested: whether the driver wants the run to stop; called from rank 0's thread.
        heartbeat_seconds: time between two heartbeats.
        preemption_seconds: time between two checks for a notice of preemption; None for no checks.
    """

    def __init__(
        self,
        group: str,
        rank: int,
        world_size: int,
        send: Callable[[Heartbeat], None],
        stop_requested: Callable[[], bool],
        *,
        heartbeat_seconds: float,
        preemption_seconds: float | None,
    ) -> None:
        self._group_id, self._rank, self._send, self._stop_requested = group, rank, send, stop_requested
        self._heartbeat_seconds, self._preemption_seconds = heartbeat_seconds, preemption_seconds
        # Gloo on every device, so that no GPU waits for it.
        self._process_group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._step, self._phase = 0, START
        self._stop = False
        self._checked = time.monotonic()
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager that sets the phase in this worker's heartbeats."""
        before, self._phase = self._phase, name
        yield
        self._phase = before

    def decide(self, step: int) -> StepDecision:
        """Decide what all ranks do before a step. All ranks call it before each step."""
        self._step, self._phase = step, "step"
        check = self._preemption_seconds is not None and time.monotonic() - self._checked >= self._preemption_seconds
        if check:
            self._checked = time.monotonic()
        if self._process_group is None:
            return StepDecision(self._stop, check)
        flags = torch.tensor([self._stop, check and self._rank == 0], dtype=torch.uint8)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, self._process_group, True)
        pending, self._pending = self._pending, (work, flags)
        if pending is None:
            return StepDecision(False, False)
        earlier_work, agreed = pending
        earlier_work.wait()
        return StepDecision(*map(bool, agreed.tolist()))

    def finish(self) -> None:
        """Wait for the last all-reduce. All ranks have called `decide` the same number of times."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        self._phase = END

    def _send_heartbeats(self) -> None:
        sent, phase = -self._heartbeat_seconds, START
        while not self._end.wait(_POLL_SECONDS):
            if self._rank == 0 and not self._stop:
                self._stop = self._stop_requested()
            if time.monotonic() - sent >= self._heartbeat_seconds or (phase == START and self._phase != START):
                sent, phase = time.monotonic(), self._phase
                self._send(Heartbeat(self._group_id, self._rank, self._step, self._phase, self._current_line()))

    def _current_line(self) -> str:
        """Innermost line of this package in the main thread."""
        frame = sys._current_frames().get(self._main)
        lines = [f for f in traceback.extract_stack(frame) if f.filename.startswith(_PACKAGE)] if frame else []
        if not lines:
            return "unknown"
        return f"{Path(lines[-1].filename).relative_to(_PACKAGE)}:{lines[-1].lineno} in {lines[-1].name}"


@dataclass
class Watchdog:
    """The driver's side: detects whether the workers hang, and which of them."""

    hang_seconds: float
    """A run hangs when it makes no step for this long."""
    _group: str = ""
    _heartbeats: dict[int, tuple[float, Heartbeat]] = field(default_factory=dict)
    _furthest: int = -1
    _progress: float = 0.0
    """Time at which the furthest step was first reported."""

    def seen(self, heartbeat: Heartbeat, now: float) -> None:
        """Record a heartbeat and the time on the driver's clock."""
        if heartbeat.group != self._group:  # the workers were restarted, perhaps with another number
            self._group, self._heartbeats, self._furthest, self._progress = heartbeat.group, {}, -1, now
        self._heartbeats[heartbeat.rank] = (now, heartbeat)
        if heartbeat.phase != START and heartbeat.step > self._furthest:
            self._furthest, self._progress = heartbeat.step, now

    @property
    def has_begun(self) -> bool:
        """Whether the current workers have reached their first step."""
        return self._furthest >= 0

    def silence(self, now: float) -> float:
        """Seconds since the last heartbeat of any worker; infinite before the first."""
        return now - max((seen for seen, _ in self._heartbeats.values()), default=-math.inf)

    def check(self, now: float) -> None:
        """Raise UserError, with the rank to blame, if no step was made for too long.

        Heartbeats come from separate threads. If there are none at all, there are no workers, and Ray Train waits for
        a node: this is not a hang. Before the first step, only a rank without heartbeats counts as hanging, because
        restoring and compiling take long. After the last step nothing counts as hanging, because the workers upload
        their last checkpoint and end one by one.
        """
        if now - self._progress < self.hang_seconds or self.silence(now) > 3 * heartbeat_seconds(self.hang_seconds):
            return
        if any(heartbeat.phase == END for _, heartbeat in self._heartbeats.values()):
            return
        latest = max(seen for seen, _ in self._heartbeats.values())
        silent = [beat for seen, beat in self._heartbeats.values() if latest - seen > self.hang_seconds / 2]
        if silent:
            blamed, why = silent, "has sent no heartbeat"
        elif not self.has_begun:
            return
        else:
            least = min(beat.step for _, beat in self._heartbeats.values())
            behind = [beat for _, beat in self._heartbeats.values() if beat.step == least]
            lines = [beat.line for beat in behind]
            rarest = min(lines, key=lines.count)
            blamed, why = [beat for beat in behind if beat.line == rarest], "makes no progress"
        named = ", ".join(f"rank {b.rank} (step {b.step}, {b.phase}, {b.line})" for b in blamed)
        raise UserError(
            f"no step was made for {self.hang_seconds:.0f} s: {named} {why}; check its node, then run the same command "
            "again, which resumes from the newest checkpoint (or raise scaling.hang_seconds if steps take that long)"
        )
