"""A lock on a registered model, held in MLflow itself, which is all that the drivers of two promotions share.

MLflow cannot set an alias on a condition, but it creates a registered model of a name only once. So whoever creates
`<name> (being promoted)` holds the lock, and deletes it when done, within a second or so.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from crate_ray.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_OWNER = "crate_ray.owner"
_LONGEST_NAME = 256
_SUFFIX = " (being promoted)"
_POLL_SECONDS = 0.1


@contextmanager
def locked(client: MlflowClient, name: str, stale_seconds: float = 30.0) -> Iterator[Callable[[], None]]:
    """Hold the lock on a registered model. Yields a function that checks that this process still holds it.

    Args:
        client: MLflow.
        name: name of the registered model.
        stale_seconds: a lock that another process has held for so long is taken over; its process was killed.

    Raises:
        UserError: another process has taken the lock over.
    """
    lock = name[: _LONGEST_NAME - len(_SUFFIX)] + _SUFFIX
    mine = f"{uuid.uuid4().hex} process {os.getpid()} on {socket.gethostname()}"[:200]
    _take(client, lock, mine, stale_seconds)

    def check() -> None:
        if _owner(client, lock) != mine:
            raise UserError(f"another process has taken over the promotion of {name}; run the command again")

    try:
        yield check
    finally:
        if _owner(client, lock) == mine:
            _delete(client, lock)


def _take(client: MlflowClient, lock: str, mine: str, stale_seconds: float) -> None:
    from mlflow.exceptions import MlflowException

    seen, since = None, time.monotonic()
    while True:
        try:
            client.create_registered_model(lock, tags={_OWNER: mine}, description="A promotion is under way.")
            return
        except MlflowException as error:
            # MLflow reads the model that is there for its error; it may be gone by then.
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        owner = _owner(client, lock)
        if owner != seen:
            seen, since = owner, time.monotonic()
        elif owner is not None and time.monotonic() - since > stale_seconds:
            logger.warning("%s: took over the lock of %s, which has held it too long", lock, owner.partition(" ")[2])
            _delete(client, lock)
            continue
        time.sleep(_POLL_SECONDS)


def _owner(client: MlflowClient, lock: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_registered_model(lock).tags.get(_OWNER, ""))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _delete(client: MlflowClient, lock: str) -> None:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # it is gone already
        client.delete_registered_model(lock)
