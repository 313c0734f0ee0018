"""Where workers leave what they tell, and find what they are asked: an actor on the driver's node.

Imports nothing that training needs, so that its process starts at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Sign(NamedTuple):
    """What a worker shows of itself."""

    group: str
    """Workers that were started together."""
    rank: int
    step: int
    phase: str
    """What it is doing: 'data', 'step', 'checkpoint', …"""
    place: str
    """Line of our code that its main thread is in."""


class Mailbox:
    """Events of the workers until the driver asks for them, and the driver's wish to stop."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, ...]] = []
        self._put = self._handled = 0
        self._stopping = False

    def stop(self) -> None:
        """Ask the workers to save a checkpoint and return."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether they were asked to."""
        return self._stopping

    def put(self, event: tuple[Any, ...]) -> None:
        """Add an event."""
        self._events.append(event)
        self._put += 1

    def drain(self) -> list[tuple[Any, ...]]:
        """All events since the last call, which the driver has handled before it calls again."""
        self._handled = self._put - len(self._events)
        events, self._events = self._events, []
        return events

    def arrived(self) -> int:
        """Number of the last event that was put."""
        return self._put

    def handled(self) -> int:
        """Number of the last event that the driver has handled."""
        return self._handled
