"""Scratch memory that each thread reuses: page faults on fresh memory cost more than decoding a small image.

An array is valid until its thread asks for the same name again.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_MAX_BYTES = 2**24
"""Larger arrays are rare and not reused."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.of_name: dict[str, NDArray[np.uint8]] = {}


_buffers = _Buffers()


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of this thread with undefined content."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > _MAX_BYTES:
        return np.empty(shape, dtype)
    buffer = _buffers.of_name.get(name)
    if buffer is None or len(buffer) < size:
        buffer = _buffers.of_name[name] = np.empty(size, np.uint8)
    return buffer[:size].view(dtype).reshape(shape)
