"""Memory for pixels that all threads of a process share. Threads wait for room, so a very large image is decoded alone.

Without it, many threads that each decode a large image would take many times the memory of one image.
"""

from __future__ import annotations

import threading
from types import TracebackType

ROOM_BYTES = 2**30
"""Memory for the images that a process decodes at a time. One that needs more is decoded when no other one is."""

_SMALL_BYTES = 2**20
"""Images that need less do not wait, and do not count."""


class _Room:
    def __init__(self, size: int) -> None:
        self._size, self._taken = size, 0
        self._turn = threading.Lock()  # so that small images do not overtake a large one for ever
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._taken + size <= self._size or not self._taken)
            self._taken += size

    def give_back(self, size: int) -> None:
        with self._changed:
            self._taken -= size
            self._changed.notify_all()


_room = _Room(ROOM_BYTES)


class room_for:  # noqa: N801 - used as a function
    """Context in which a thread may take this many bytes for an image. It must not be nested."""

    __slots__ = ("_bytes",)

    def __init__(self, size: int) -> None:
        self._bytes = size if size >= _SMALL_BYTES else 0

    def __enter__(self) -> None:
        if self._bytes:
            _room.take(self._bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bytes:
            _room.give_back(self._bytes)
