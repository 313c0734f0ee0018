"""Read plain `.npy` arrays from many threads.

NumPy parses array headers with Python's own parser. In some releases of CPython 3.11 and 3.12 (issue 106905), threads
that parse at the same time can fail with SystemError on a valid header. So headers are parsed here under a lock,
cached, and retried after such a failure.
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
_MAX_BYTES = 2**62
_TRIES = 100
_parsing = threading.Lock()


class Header(NamedTuple):
    """The header of a `.npy` file, and the offset of its data in bytes."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int


def read_header(content: bytes | memoryview) -> Header:
    """The header of the `.npy` file that begins with `content`.

    Raises:
        ValueError: it is not a `.npy` file, or its header is damaged, or holds a shape that no array has.
    """
    start = bytes(content[:12])
    if len(start) < 12 or not start.startswith(MAGIC):
        raise ValueError("not a plain .npy array")
    offset = 10 + struct.unpack_from("<H", start, 8)[0] if start[6] == 1 else 12 + struct.unpack_from("<I", start, 8)[0]
    shape, fortran, dtype = _parse(bytes(content[: min(offset, _MAX_HEADER)]))
    return Header(shape, fortran, dtype, offset)


def read(content: bytes | memoryview) -> NDArray[Any]:
    """The array in the content of a `.npy` file, as a read-only view.

    Raises:
        ValueError: it is not a `.npy` file, is truncated, or holds pickled objects, which are never loaded.
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
    """Memory-map the array in a `.npy` file, given as a path or an open file; read-only.

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
            sides = [max(side, 1) for side in shape if type(side) is int and side >= 0]
            if len(sides) != len(shape) or math.prod(sides) * max(dtype.itemsize, 1) > _MAX_BYTES:
                raise ValueError(f"its shape is {shape}"[:100])
            return shape, fortran, dtype
        except SystemError:
            continue
        except Exception as error:  # for a damaged header, Python's parser can raise any exception
            raise ValueError(str(error)) from None
    raise ValueError("Python's parser fails on its header")
