"""Counts JPEGs that libjpeg-turbo refuses and Pillow decodes: odd headers, padding, rare sampling factors."""

from __future__ import annotations

import logging
import threading

from crate_ray.data.decode.errors import Refused

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_count = 0


def count_refused(error: Refused) -> None:
    """Count one, and log the 1st, 10th, 100th, … of this process."""
    global _count
    with _lock:
        _count += 1
        count = _count
    if str(count).rstrip("0") == "1":
        what = "1 JPEG was" if count == 1 else f"{count:,} JPEGs were"
        logger.warning("%s decoded by Pillow, which is slower, because libjpeg-turbo refuses: %s", what, error)


def num_refused() -> int:
    """How many this process has decoded."""
    return _count
