"""One writer at a time: an object in the storage that says who works on something, renewed while they do.

Taken and handed on by conditional writes only. Clocks of machines are not compared: whoever finds the lease taken
watches it, and may take it over when its heartbeat has not moved for a while by the watcher's own clock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from crate_ray.errors import UserError
from crate_ray.storage.interface import AlreadyExists, NotFound, Replaced, Storage

logger = logging.getLogger(__name__)

_BEATS = 6  # heartbeats within lease_seconds, so that some may be late
_LOOKS = 4  # looks at a foreign lease between two of its heartbeats
_LARGEST = 2**16  # bytes; the record of a lease has some hundreds


class LeaseLost(UserError):  # noqa: N818 - named for what happened
    """Another process has taken the lease over, because this one gave no sign of life for too long."""


@dataclass(frozen=True)
class _Record:
    """What the object holds. The heartbeat makes each version of it, and so its ETag, another one."""

    id: str
    host: str
    pid: int
    since: str
    what: str
    seconds: float
    """Without a heartbeat for so long, it may be taken over."""
    beat: int

    def to_json(self) -> bytes:
        return (json.dumps(self.__dict__, indent=2) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> _Record | None:
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None


class Lease:
    """The right to work on something, for one process at a time. Use it as a context manager.

    Call `check` before whatever nobody else may do at the same time.

    Args:
        storage: where the lease is; an S3-compatible store must honour If-Match and If-None-Match.
        key: name of the lease's object.
        what: what the messages say is in use, such as "run 'x'".
        lease_seconds: without a heartbeat for so long, others may take this lease over, whatever theirs are.
    """

    def __init__(self, storage: Storage, key: str, what: str, *, lease_seconds: float = 30.0) -> None:
        self._storage, self._key, self._what = storage, key, what
        self._seconds = lease_seconds
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._mine = _Record(uuid.uuid4().hex, socket.gethostname(), os.getpid(), now, what, lease_seconds, 0)
        self._renewed = 0.0  # when the last renewal began
        self._lost: LeaseLost | None = None
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {key}", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease.

        A holder that is alive shows it within a sixth of its lease_seconds; one that is dead is waited for that long.

        Raises:
            UserError: another process holds it and is alive.
        """
        self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(UserError):  # it expires by itself
            if self._lost is None:
                self._renew()  # now it is certainly ours, and stays so for lease_seconds
                self._storage.delete(self._key)

    def check(self) -> None:
        """Make sure that the lease is still ours.

        Raises:
            LeaseLost: another process has taken it over.
            UserError: it needs to be renewed, and the storage cannot be reached.
        """
        if self._lost is None and time.monotonic() - self._renewed > self._seconds:
            self._renew()
        if self._lost is not None:
            raise self._lost

    def _acquire(self) -> None:
        seen, seen_at = "", 0.0  # ETag of what is watched, and since when
        while True:
            self._renewed = time.monotonic()
            try:
                self._storage.write(self._key, self._mine.to_json(), if_absent=True)
                return
            except AlreadyExists:
                pass
            looked_at = time.monotonic()
            try:
                data, etag = self._storage.read_version(self._key, 0, _LARGEST)
            except (NotFound, Replaced):
                continue
            holder = _Record.parse(data)
            seconds = holder.seconds if holder else self._seconds
            if not seen:
                seen, seen_at = etag, time.monotonic()
                logger.warning(
                    "%s: %s is waited for up to %.0f s, to see whether it is alive",
                    self._what,
                    _named(holder),
                    seconds,
                )
            elif etag != seen:
                raise UserError(
                    f"{self._what} is in use by {_named(holder)}, as {self._storage.uri}/{self._key} says; wait until "
                    "it ends, or stop it and start again"
                )
            elif looked_at - seen_at >= seconds:
                self._renewed = time.monotonic()
                try:
                    self._storage.write(self._key, self._mine.to_json(), if_match=etag)
                except Replaced:
                    continue  # it is alive after all, or another was faster
                logger.warning("%s: %s gave no sign of life, its lease is taken over", self._what, _named(holder))
                return
            time.sleep(seconds / _BEATS / _LOOKS)

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds / _BEATS):
            try:
                self._renew()
            except LeaseLost:
                return
            except UserError as error:
                logger.warning("the lease of %s cannot be renewed so far: %s", self._what, error)

    def _renew(self) -> None:
        """Move the heartbeat. Raises LeaseLost, or UserError when the storage fails."""
        with self._renewing:
            for attempt in range(3):
                begun = time.monotonic()
                try:
                    data, etag = self._storage.read_version(self._key, 0, _LARGEST)
                    holder = _Record.parse(data)
                    if holder is None or holder.id != self._mine.id:
                        raise self._lose(holder)
                    self._mine = _Record(**{**holder.__dict__, "beat": holder.beat + 1})
                    self._storage.write(self._key, self._mine.to_json(), if_match=etag)
                except NotFound:
                    raise self._lose(None) from None
                except Replaced:  # perhaps by an earlier heartbeat of ours that was late
                    if attempt == 2:
                        raise self._lose(None) from None
                    continue
                self._renewed = begun
                return

    def _lose(self, to: _Record | None) -> LeaseLost:
        self._lost = LeaseLost(
            f"{self._what} has been taken over by {_named(to)}, since this process gave no sign of life for more than "
            f"{self._seconds:g} s; let that one end, then start again"
        )
        return self._lost


def _named(holder: _Record | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder.pid} on {holder.host} (since {holder.since.replace('T', ' ').replace('+00:00', ' UTC')})"
