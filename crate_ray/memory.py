"""How much memory processes took, by the kernel's own records."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def peak_memory(other_pids: Iterable[int] = ()) -> int | None:
    """Largest resident size of this process plus those of others, in bytes; None where the system does not tell."""
    return _from_status("VmHWM:", (os.getpid(), *other_pids))


def resident_memory() -> int | None:
    """Resident size of this process, in bytes; None where the system does not tell."""
    return _from_status("VmRSS:", (os.getpid(),))


def _from_status(field: str, pids: Iterable[int]) -> int | None:
    # Not getrusage: its maximum survives exec, and so is the parent's where that was larger.
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return None
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    return total
