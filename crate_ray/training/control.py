"""What happens between the driver and the workers beside training: signs of life, stopping, notices of preemption.

Each worker has a thread that shows the driver where it is. Rank 0's also asks the driver whether to stop; what rank 0
knows, all ranks agree on before a step, by a collective that was begun a step earlier, so that nobody waits for it.
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
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from crate_ray.errors import UserError
from crate_ray.training.ray.mailbox import Sign

START, END = "start", "end"
"""Phases before the first step and after the last one."""
_POLL_SECONDS = 0.5
_PACKAGE = Path(__file__).parents[1].as_posix()


def beat_seconds(hang_seconds: float) -> float:
    """Time between two signs of life, so that some may be late."""
    return min(10.0, hang_seconds / 6)


class Agreed(NamedTuple):
    """What all ranks do before the next step."""

    stop: bool
    """Save a checkpoint and return."""
    look: bool
    """Ask Ray, all together, whether a node is going to be taken away."""


class WorkerControl:
    """A worker's side. Use it as a context manager around all that a worker does.

    Args:
        group: names the workers that were started together.
        rank, world_size: of this worker.
        show: tells the driver a sign of life; called from a thread.
        asked_to_stop: whether the driver wants the run to stop; called from rank 0's thread.
        beat_seconds: time between two signs of life.
        look_seconds: time between two looks for a notice of preemption; None for never.
    """

    def __init__(
        self,
        group: str,
        rank: int,
        world_size: int,
        show: Callable[[Sign], None],
        asked_to_stop: Callable[[], bool],
        *,
        beat_seconds: float,
        look_seconds: float | None,
    ) -> None:
        self._name, self._rank, self._show, self._asked = group, rank, show, asked_to_stop
        self._beat_seconds, self._look_seconds = beat_seconds, look_seconds
        # On the CPU, whatever trains: no device waits for it.
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._step, self._phase = 0, START
        self._stop_asked = False
        self._looked = time.monotonic()
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="signs of life", daemon=True)

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
        """Inside, this worker is doing what `name` says."""
        before, self._phase = self._phase, name
        yield
        self._phase = before

    def agree(self, step: int) -> Agreed:
        """What all ranks do before a step. All ranks call it before each step."""
        self._step, self._phase = step, "step"
        look = self._look_seconds is not None and time.monotonic() - self._looked >= self._look_seconds
        if look:
            self._looked = time.monotonic()
        if self._group is None:
            return Agreed(self._stop_asked, look)
        flags = torch.tensor([self._stop_asked, look and self._rank == 0], dtype=torch.uint8)
        pending, self._pending = self._pending, (dist.all_reduce(flags, dist.ReduceOp.MAX, self._group, True), flags)
        if pending is None:
            return Agreed(False, False)
        work, agreed = pending
        work.wait()
        return Agreed(*map(bool, agreed.tolist()))

    def finish(self) -> None:
        """Wait for the last agreement: all ranks have called `agree` equally often."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        self._phase = END

    def _beat(self) -> None:
        shown, phase = -self._beat_seconds, START
        while not self._end.wait(_POLL_SECONDS):
            if self._rank == 0 and not self._stop_asked:
                self._stop_asked = self._asked()
            if time.monotonic() - shown >= self._beat_seconds or (phase == START and self._phase != START):
                shown, phase = time.monotonic(), self._phase
                self._show(Sign(self._name, self._rank, self._step, self._phase, self._place()))

    def _place(self) -> str:
        """Innermost line of this package in the main thread."""
        frame = sys._current_frames().get(self._main)
        lines = [f for f in traceback.extract_stack(frame) if f.filename.startswith(_PACKAGE)] if frame else []
        if not lines:
            return "unknown"
        return f"{Path(lines[-1].filename).relative_to(_PACKAGE)}:{lines[-1].lineno} in {lines[-1].name}"


@dataclass
class Watchdog:
    """The driver's side: finds out that the workers hang, and which of them."""

    hang_seconds: float
    """A run that makes no step for so long hangs."""
    _group: str = ""
    _signs: dict[int, tuple[float, Sign]] = field(default_factory=dict)
    _furthest: int = -1
    _progress: float = 0.0
    """When the step was first seen that is the furthest."""

    def seen(self, sign: Sign, now: float) -> None:
        """Take a sign of life, at a time by the driver's clock."""
        if sign.group != self._group:  # the workers were started again, perhaps fewer of them
            self._group, self._signs, self._furthest, self._progress = sign.group, {}, -1, now
        self._signs[sign.rank] = (now, sign)
        if sign.phase != START and sign.step > self._furthest:
            self._furthest, self._progress = sign.step, now

    @property
    def has_begun(self) -> bool:
        """Whether the workers of now have come to their first step."""
        return self._furthest >= 0

    def silence(self, now: float) -> float:
        """Seconds since the last sign of life of any worker; infinite before the first."""
        return now - max((seen for seen, _ in self._signs.values()), default=-math.inf)

    def check(self, now: float) -> None:
        """Raise UserError, naming the rank, when nothing has moved for too long.

        Signs come from threads of their own: where none comes, no worker is there to hang, and Ray Train waits for a
        node. Before the first step only silence counts, as restoring and compiling take their time, and after the last
        one nothing does: the workers upload, and leave one by one.
        """
        if now - self._progress < self.hang_seconds or self.silence(now) > 3 * beat_seconds(self.hang_seconds):
            return
        if any(sign.phase == END for _, sign in self._signs.values()):
            return
        latest = max(seen for seen, _ in self._signs.values())
        silent = [sign for seen, sign in self._signs.values() if latest - seen > self.hang_seconds / 2]
        if silent:
            blamed, why = silent, "gives no sign of life"
        elif not self.has_begun:
            return
        else:
            least = min(sign.step for _, sign in self._signs.values())
            behind = [sign for _, sign in self._signs.values() if sign.step == least]
            places = [sign.place for sign in behind]
            rarest = min(places, key=places.count)
            blamed, why = [sign for sign in behind if sign.place == rarest], "does not go on"
        named = ", ".join(f"rank {s.rank} (step {s.step}, {s.phase}, {s.place})" for s in blamed)
        raise UserError(
            f"no step was made for {self.hang_seconds:.0f} s: {named} {why}; look at its node, then start the run "
            "again, which goes on from its newest checkpoint (or raise scaling.hang_seconds if steps take that long)"
        )
