"""SIGTERM and Ctrl-C: the first one asks the run to save a checkpoint and stop, a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether the process was asked to stop."""

    signal: int = 0
    """Number of the signal; 0 for none."""


class Stopped(KeyboardInterrupt):
    """A signal has stopped a run, after it has saved a checkpoint.

    Args:
        number: of the signal.
        step: of the newest checkpoint; 0 if there is none.
    """

    def __init__(self, number: int, step: int = 0) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal, self.step = number, step
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, int]]:
        """Another process can raise it again."""
        return Stopped, (self.signal, self.step)


@contextmanager
def stop_signals(*, by_parent: bool = False) -> Iterator[StopRequest]:
    """Context manager that records the first SIGTERM or SIGINT. A second one raises KeyboardInterrupt.

    With `by_parent`, the parent process decides: Ctrl-C, which reaches both, is ignored, and so is a second SIGTERM.
    Many schedulers send SIGTERM to all processes of a job, and then the parent sends another one.

    Enter it after ray.init, which sets handlers of its own. It does nothing outside the main thread, where Python
    receives no signals.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def record(number: int, frame: FrameType | None) -> None:
        if request.signal and not by_parent:
            raise KeyboardInterrupt
        request.signal = number

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, record),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN if by_parent else record),
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
