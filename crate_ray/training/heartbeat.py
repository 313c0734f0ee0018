"""The message that shows that a worker is alive. This module imports nothing heavy, so the mailbox starts at once."""

from __future__ import annotations

from typing import NamedTuple


class Heartbeat(NamedTuple):
    """Where a worker is in its run."""

    group: str
    """Id of the worker group: the workers that were started together."""
    rank: int
    step: int
    phase: str
    """What the worker is doing: 'data', 'step', 'checkpoint', 'validation', 'start' or 'end'."""
    line: str
    """Line of this package that the worker's main thread executes."""
