"""SIGTERM and Ctrl-C: first a wish to stop in good order, then an end."""

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
    """A run that was asked to stop has saved a checkpoint and stopped."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM and the first SIGINT are noted instead of ending the process; a second one is KeyboardInterrupt.

    Enter it after ray.init, which has handlers of its own. Does nothing outside of the main thread, where Python hears
    no signals.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
