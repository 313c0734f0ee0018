"""Hides messages of Ray and MLflow that a user cannot act on. Errors stay visible.

This module imports nothing heavy, because every process that Ray starts runs `set_up_ray_process` first.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Any, TextIO

# Ray's native code prints the first line in each run, about a restarted actor of Ray Train, and the second one in each
# sweep with several trials at the same time.
_DROPPED = re.compile(
    r"Actor with class name: 'PreemptionWatcher' and ID: .* constructor arguments"
    r"|\d+ PYTHON worker processes have been started on node"
)


def quiet_driver() -> None:
    """Quiet the libraries in this process, and the lines that Ray forwards to it. Call it before importing them."""
    # "Token authentication is enabled for this Ray cluster."
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # "Creating initial MLflow database tables", and the like.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if not isinstance(sys.stderr, _WithoutDropped):
        sys.stderr = _WithoutDropped(sys.stderr)


def set_up_ray_process() -> None:
    """Set up a process that Ray has started for a job (runtime_env's worker_process_setup_hook).

    The process logs only errors of Ray Train, because Ray Train's warnings are about its own actors. RAY_ADDRESS is set
    to the address of the process's own Ray. Otherwise, if several Rays run on one machine, the Ray Train actor that
    watches a controller would ask the newest Ray about it, and take the controller for dead.

    MLflow does not print the address of each trial of a sweep.
    """
    import ray

    from crate_ray.output import guard_output

    guard_output()  # Ray keeps the output of its processes in log files
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # the driver's may be "local" or "auto"
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("ray.train").setLevel(logging.ERROR)


class _WithoutDropped:
    """A text stream that drops some lines. It expects the line and the newline in two calls, as print writes them."""

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
