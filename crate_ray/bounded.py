"""Bounds on what is read from outside: sizes that files may have, and regular files only. Tests hold what they promise.

Whoever can write to a folder or bucket can put anything there. So a size is checked before memory is taken for it.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

MAX_JSON_BYTES = 16 * 2**20
"""Largest JSON object that is read: a manifest, a record, a model's description. Real ones have at most a few MiB."""

MAX_YAML_BYTES = 2**16
"""Largest YAML file that is read."""

MAX_YAML_VALUES = 10_000
"""Most values in a YAML file; an alias counts as often as it repeats."""

MAX_MEMBER_BYTES = 2**28
"""Largest image, grid or other file of a sample. A sample with a larger one is a bad sample."""

MAX_NAME = 1024
"""Most bytes in the name of a shard's member, as in S3. Members with longer names belong to no sample."""

MAX_CLASSES = 2**20
"""Class numbers are below this; a sample with a larger one is a bad sample."""

MAX_LEASE_SECONDS = 3600.0
"""Longest time without a heartbeat that a lease may ask for."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Anything else would block (a named pipe) or never end (a device).

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    file = open(path, "rb", opener=_at_once)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def read_small(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a regular file that has at most `limit` bytes.

    Raises:
        OSError: it is larger, is not a regular file, or cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes")
    return data


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a named pipe. Regular files do not heed the flag."""
    return os.open(path, flags | os.O_NONBLOCK)
