"""Leases: an object in the storage names the one process that may work on something.

A lease changes hands by conditional writes only. Its holder renews it with heartbeats. A process that finds it taken
watches the heartbeat, and takes the lease over if the heartbeat does not change for a while. Each process measures time
by its own clock, so clocks need not agree.
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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Annotated, Self

from pydantic import Field, TypeAdapter, ValidationError

from crate_ray.bounded import MAX_LEASE_SECONDS
from crate_ray.errors import UserError
from crate_ray.storage.interface import AlreadyExists, NotFound, Replaced, Storage

logger = logging.getLogger(__name__)

_BEATS = 6  # heartbeats within lease_seconds, so that some may be late
_POLLS = 4  # reads of another process's lease between two of its heartbeats
_LARGEST = 2**16  # bytes; a record has a few hundred


_Text = Annotated[str, Field(max_length=300)]


class LeaseLost(UserError):  # noqa: N818 - named for what happened
    """Another process has taken over the lease, because this process sent no heartbeat for too long."""


@dataclass(frozen=True)
class _Record:
    """Content of the object. The heartbeat counter makes the ETags of all versions differ."""

    id: _Text
    host: _Text
    pid: Annotated[int, Field(ge=0, lt=2**63)]
    since: _Text
    what: Annotated[str, Field(max_length=5000)]
    seconds: Annotated[float, Field(gt=0, le=MAX_LEASE_SECONDS)]
    """Seconds without a heartbeat after which other processes may take over the lease."""
    beat: Annotated[int, Field(ge=0, lt=2**63)]

    def to_json(self) -> bytes:
        return (json.dumps(self.__dict__, indent=2) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> _Record | None:
        try:
            return _RECORD.validate_json(data)
        except ValidationError:
            return None


_RECORD = TypeAdapter(_Record)


class Lease:
    """The right to work on something, for one process at a time. Use it as a context manager.

    Call `check` before every action that only the holder may do.

    Args:
        storage: where the lease is stored. An S3-compatible store must support If-Match and If-None-Match.
        key: name of the lease's object.
        what: what is leased, for messages, such as "run 'x'".
        lease_seconds: seconds without a heartbeat after which other processes may take over this lease.
    """

    def __init__(self, storage: Storage, key: str, what: str, *, lease_seconds: float = 30.0) -> None:
        self._storage, self._key, self._what = storage, key, what
        self._seconds = lease_seconds
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._mine = _Record(uuid.uuid4().hex, socket.gethostname(), os.getpid(), now, what, lease_seconds, 0)
        self._renewed = 0.0  # start of the last successful renewal
        self._lost: LeaseLost | None = None
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {key}", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease. If another process holds it, wait until it sends a heartbeat or its lease expires.

        A holder that is alive sends a heartbeat every sixth of its lease_seconds.

        Raises:
            UserError: another process holds the lease and is alive.
        """
        self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(UserError):  # otherwise it expires by itself
            if self._lost is None:
                self._renew()  # make sure that the lease is still ours, and stays ours while it is deleted
                self._storage.delete(self._key)

    def check(self) -> None:
        """Check that this process still holds the lease.

        Raises:
            LeaseLost: another process has taken it over.
            UserError: the lease must be renewed now, but the storage cannot be reached.
        """
        if self._lost is None and time.monotonic() - self._renewed > self._seconds:
            self._renew()
        if self._lost is not None:
            raise self._lost

    def _acquire(self) -> None:
        seen, seen_at = "", 0.0  # ETag of the lease that is watched, and since when
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
                    "%s is in use by %s; waiting up to %.0f s to see whether that process is alive",
                    self._what,
                    _named(holder),
                    seconds,
                )
            elif etag != seen:
                raise UserError(
                    f"{self._what} is in use by {_named(holder)} (lease {self._storage.uri}/{self._key}); wait until "
                    "that process ends, or stop it and start again"
                )
            elif looked_at - seen_at >= seconds:
                self._renewed = time.monotonic()
                try:
                    self._storage.write(self._key, self._mine.to_json(), if_match=etag)
                except Replaced:
                    continue  # its holder is alive after all, or a third process was faster
                logger.warning("%s: took over the lease of %s, which sent no heartbeat", self._what, _named(holder))
                return
            time.sleep(seconds / _BEATS / _POLLS)

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds / _BEATS):
            try:
                self._renew()
            except LeaseLost:
                return
            except UserError as error:
                logger.warning("cannot renew the lease of %s yet: %s", self._what, error)

    def _renew(self) -> None:
        """Send a heartbeat. Raises LeaseLost, or UserError if the storage fails."""
        with self._renewing:
            for attempt in range(3):
                begun = time.monotonic()
                try:
                    data, etag = self._storage.read_version(self._key, 0, _LARGEST)
                    holder = _Record.parse(data)
                    if holder is None or holder.id != self._mine.id:
                        raise self._lose(holder)
                    renewed = replace(holder, beat=holder.beat + 1)
                    self._storage.write(self._key, renewed.to_json(), if_match=etag)
                except NotFound:
                    raise self._lose(None) from None
                except Replaced:  # perhaps by a delayed heartbeat of our own
                    if attempt == 2:
                        raise self._lose(None) from None
                    continue
                self._renewed = begun
                return

    def _lose(self, to: _Record | None) -> LeaseLost:
        self._lost = LeaseLost(
            f"{self._what} has been taken over by {_named(to)}, because this process sent no heartbeat for more than "
            f"{self._seconds:g} s; wait until that process ends, then start again"
        )
        return self._lost


def _named(holder: _Record | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder.pid} on {holder.host} (since {holder.since.replace('T', ' ').replace('+00:00', ' UTC')})"
