"""Keeps lines of Ray and MLflow off the screen that a user cannot act on. Errors stay.

Nothing heavy is imported here: every Ray worker process runs `quiet_worker` when it starts.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Any, TextIO

# Ray's native code prints this line for each run; it is about an actor of Ray's own, which nobody restarts.
_DROPPED = re.compile(r"Actor with class name: 'PreemptionWatcher' and ID: .* constructor arguments")


def quiet_driver() -> None:
    """Quiet the libraries of this process, and the lines that Ray forwards to it. Call it before they are imported."""
    # "Token authentication is enabled for this Ray cluster."
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # "Creating initial MLflow database tables", and the like.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if not isinstance(sys.stderr, _WithoutDropped):
        sys.stderr = _WithoutDropped(sys.stderr)


def quiet_worker() -> None:
    """Quiet Ray Train's actors: its warnings are about its own actors. What fails for good is an error.

    A process of Ray also learns which Ray it belongs to: of several on one machine, Ray Train's actors would ask the
    newest about their controller.
    """
    import ray

    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


class _WithoutDropped:
    """A text stream that drops the lines that no one can act on. Ray writes a line, then its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drops_end = False

    def write(self, text: str) -> int:
        if _DROPPED.search(text):
            self._drops_end = not text.endswith("\n")
            return len(text)
        if self._drops_end and text == "\n":
            self._drops_end = False
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
