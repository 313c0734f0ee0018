"""Plain `.npy` arrays, read by many threads at once.

NumPy leaves the header of an array to Python's parser, and in some releases of CPython 3.11 and 3.12 (its issue
106905) threads that parse at the same moment make each other fail with SystemError, however sound the header. So
headers are parsed here, one at a time and each once, and such a failure is tried again.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import threading
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000
_TRIES = 100
_parsing = threading.Lock()


class Header(NamedTuple):
    """What a `.npy` file says of its array, and the byte at which its numbers begin."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int


def read_header(content: bytes | memoryview) -> Header:
    """Header of the `.npy` file that begins with `content`.

    Raises:
        ValueError: it is no such file, or its header is damaged.
    """
    start = bytes(content[:12])
    if len(start) < 12 or not start.startswith(MAGIC):
        raise ValueError("not a plain .npy array")
    offset = 10 + struct.unpack_from("<H", start, 8)[0] if start[6] == 1 else 12 + struct.unpack_from("<I", start, 8)[0]
    shape, fortran, dtype = _parse(bytes(content[: min(offset, _MAX_HEADER)]))
    return Header(shape, fortran, dtype, offset)


def read(content: bytes | memoryview) -> NDArray[Any]:
    """The array in a `.npy` file's content, which it keeps alive; read-only.

    Raises:
        ValueError: it is no such file, ends too early, or holds pickled objects, which are never read.
    """
    header = read_header(content)
    if header.dtype.hasobject:
        raise ValueError("the array holds pickled objects")
    flat = np.frombuffer(content, header.dtype, math.prod(header.shape), header.offset)
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def content_of(array: NDArray[Any]) -> bytes:
    """The content of a `.npy` file that holds an array. Raises ValueError for one of Python objects."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def map_file(file: Path | BinaryIO) -> NDArray[Any]:
    """The array in a `.npy` file, given by its path or opened, memory-mapped and read-only.

    Raises:
        ValueError: as `read`.
        OSError: the file cannot be opened.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return map_file(opened)
    file.seek(0)
    header = read_header(file.read(_MAX_HEADER))
    if header.dtype.hasobject:
        raise ValueError("the array holds pickled objects")
    array: NDArray[Any] = np.memmap(
        file, header.dtype, "r", header.offset, header.shape, "F" if header.fortran else "C"
    )
    return array


@functools.lru_cache(maxsize=256)
def _parse(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    for _ in range(_TRIES):
        file = io.BytesIO(header)
        try:
            read = np.lib.format.read_array_header_1_0
            if np.lib.format.read_magic(file) != (1, 0):
                read = np.lib.format.read_array_header_2_0
            with _parsing:
                shape, fortran, dtype = read(file)
            return shape, fortran, dtype
        except SystemError:
            continue
        except Exception as error:  # NumPy lets through whatever a damaged header does to Python's parser
            raise ValueError(str(error)) from None
    raise ValueError("Python's parser fails on its header")
