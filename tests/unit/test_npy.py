"""Plain .npy arrays: as NumPy reads them, by many threads at once."""

from __future__ import annotations

import ast
import gc
import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from crate_ray.data.format import npy

ARRAYS: list[NDArray[Any]] = [
    np.arange(24, dtype="<f4").reshape(2, 3, 4),
    np.asfortranarray(np.arange(24, dtype=">i2").reshape(4, 6)),
    np.array(3.5),
    np.zeros((0, 5), np.uint8),
    np.array([(1, b"a" * 32, [1, 2])], [("samples", "<u4"), ("sha256", "V32"), ("it's", "<u8", (2,))]),
]


def saved(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_reads_what_numpy_writes(tmp_path: Path, array: NDArray[Any], version: tuple[int, int]) -> None:
    path = tmp_path / "array.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version)
    whole = npy.read(path.read_bytes())
    for found in [whole] + ([npy.map_file(path)] if array.size else []):
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.flags.f_contiguous == array.flags.f_contiguous and not found.flags.writeable
        np.testing.assert_array_equal(found, array)


def test_what_is_no_plain_array_is_refused(tmp_path: Path) -> None:
    content = saved(ARRAYS[0])
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    for damaged in (b"", content[:9], content[:40], content[:-1], content.replace(b"(2,", b"(((("), pickled.getvalue()):
        (tmp_path / "damaged.npy").write_bytes(damaged)
        for read in (lambda: npy.read(damaged), lambda: npy.map_file(tmp_path / "damaged.npy")):  # noqa: B023
            with pytest.raises(ValueError):
                read()


@pytest.fixture
def restless() -> Iterator[None]:
    """The interpreter changes threads, and collects garbage, as often as it can."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)


class Garbage:
    """Is collected in the middle of what a thread does, and lets another one run."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        for _ in range(3):
            len([1])


def test_threads_that_parse_at_once_do_not_disturb_each_other(restless: None) -> None:
    header = saved(ARRAYS[0])[:128]
    failed: list[Exception] = []

    def deep(depth: int, run: Callable[[], None]) -> None:
        run() if not depth else deep(depth - 1, run)

    def parse() -> None:
        for _ in range(5000):
            Garbage()
            try:
                npy._parse.__wrapped__(header)
            except Exception as error:
                failed.append(error)

    def others() -> None:  # code of other libraries, which takes no lock of ours
        for _ in range(5000):
            Garbage()
            with suppress(SystemError):
                ast.literal_eval("{'shape': (3, 4)}")

    threads = [threading.Thread(target=deep, args=(3 * n, run)) for n, run in enumerate((parse, parse, others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
