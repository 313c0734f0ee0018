"""Memory of processes, as Linux reports it in /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def peak_memory(other_pids: Iterable[int] = ()) -> int | None:
    """Sum of the peak resident sizes of this process and others, in bytes; None if the system does not report them."""
    return _from_status("VmHWM:", (os.getpid(), *other_pids))


def resident_memory() -> int | None:
    """Resident size of this process, in bytes; None if the system does not report it."""
    return _from_status("VmRSS:", (os.getpid(),))


def _from_status(field: str, pids: Iterable[int]) -> int | None:
    # Not getrusage: its maximum survives exec, so it may be the peak of the parent process.
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return None
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    return total
