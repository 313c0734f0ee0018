"""An actor on the driver's node. Workers put events into it, and the driver takes them out and puts requests in.

This module imports nothing that training needs, so its process starts at once.
"""

from __future__ import annotations

from typing import Any


class Mailbox:
    """Holds the workers' events for the driver, the driver's request to stop, and Ray Train's controller."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, ...]] = []
        self._put = self._handled = 0
        self._stop = False
        self._controller: list[Any] = []

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and return."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether the driver has asked the workers to stop."""
        return self._stop

    def set_controller(self, controller: list[Any]) -> None:
        """Keep the handle of Ray Train's controller, in a list."""
        self._controller = controller

    def controller(self) -> list[Any]:
        """The handle of Ray Train's controller, in a list; an empty list before it has started."""
        return self._controller

    def put(self, event: tuple[Any, ...]) -> None:
        """Add an event."""
        self._events.append(event)
        self._put += 1

    def drain(self) -> list[tuple[Any, ...]]:
        """All events since the last call. When the driver calls this, it has handled the events of the last call."""
        self._handled = self._put - len(self._events)
        events, self._events = self._events, []
        return events

    def num_put(self) -> int:
        """Number of events put so far."""
        return self._put

    def num_handled(self) -> int:
        """Number of events that the driver has handled."""
        return self._handled
