"""Temporary folders of drivers and workers on a node's disk; those of the dead are removed by the next that start."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LOCK = "lock"


@contextmanager
def local_space(name: str, parent: Path | None = None) -> Iterator[Path]:
    """An empty folder of this process on the local disk, gone at the end.

    Parameters: its name, unlike that of all other processes of this machine; and where such folders are, by default
    below the system's temporary folder (TMPDIR). Folders there whose process has died are removed first: each process
    holds a lock in its own.
    """
    parent = parent or Path(tempfile.gettempdir()) / f"crate-ray-{os.getuid()}"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(parent / _LOCK):  # nobody else removes a folder that has no lock in it yet
        for folder in parent.iterdir():
            if folder.is_dir() and not _in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)
        own = parent / name
        own.mkdir(mode=0o700)
        lock = _open_locked(own / _LOCK)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        lock.close()


def _in_use(folder: Path) -> bool:
    try:
        _open_locked(folder / _LOCK, wait=False).close()
    except BlockingIOError:
        return True
    except FileNotFoundError:  # it is just going
        return False
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with _open_locked(path):
        yield


def _open_locked(path: Path, *, wait: bool = True) -> IO[str]:
    """A file with an exclusive lock, which goes with the process."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
