"""The cache keeps its limit whoever is killed, and what several processes want at once is fetched once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from crate_ray.storage import cache as cache_module
from crate_ray.storage.cache import PartCache, fetched_once
from crate_ray.storage.local import LocalStorage

ROOT = Path(__file__).parents[2]
NAMES = [hashlib.sha256(bytes([i])).hexdigest() for i in range(32)]


def started(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A process with the cache's modules and the arguments at hand."""
    head = "import os, sys, time; from pathlib import Path; from crate_ray.storage.cache import PartCache\n"
    return subprocess.Popen([sys.executable, "-c", head + script, *map(str, arguments)], cwd=ROOT)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".usage")


def test_processes_that_want_the_same_part_fetch_it_once(tmp_path: Path) -> None:
    script = """
folder, name, number = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def fetch():
    (folder / f"fetched-{number}").touch()
    while len(list(folder.glob("ready-*"))) < 3:
        time.sleep(0.01)
    time.sleep(0.3)  # the others are waiting for it by now
    return b"content"

cache = PartCache(folder / "cache", 1000)
(folder / f"ready-{number}").touch()
assert cache.get(name, fetch, lambda data: None) == b"content"
"""
    processes = [started(script, tmp_path, NAMES[0], number) for number in range(3)]
    assert [process.wait(60) for process in processes] == [0] * 3
    assert len(list(tmp_path.glob("fetched-*"))) == 1


def test_parts_are_fetched_side_by_side(tmp_path: Path) -> None:
    cache, together = PartCache(tmp_path, 10_000), Barrier(len(NAMES), timeout=20)

    def fetch() -> bytes:
        together.wait()  # broken where one waits for another's lock
        return b"content"

    with ThreadPoolExecutor(len(NAMES)) as pool:
        assert set(pool.map(lambda name: cache.get(name, fetch, lambda data: None), NAMES)) == {b"content"}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_a_killed_writer_leaves_takes_no_room(tmp_path: Path, moment: str) -> None:
    """It dies just before or after its part gets its name."""
    script = """
import signal
replace = Path.replace

def dies(path, target):
    if sys.argv[3] == "after":
        replace(path, target)
    os.kill(os.getpid(), signal.SIGKILL)

Path.replace = dies
PartCache(Path(sys.argv[1]), 1000).get(sys.argv[2], lambda: b"x" * 300, lambda data: None)
"""
    cache = PartCache(tmp_path, 1000)

    def put(name: str) -> None:
        assert cache.get(name, lambda: b"y" * 300, lambda data: None)

    put(NAMES[0])
    for name in NAMES[1:3]:
        assert started(script, tmp_path, name, moment).wait(60) == -signal.SIGKILL
        assert size_of(tmp_path) <= 1000
    for name in NAMES[3:]:
        put(name)
        assert size_of(tmp_path) <= 1000
    assert size_of(tmp_path) == sum(path.stat().st_size for path in tmp_path.glob("??/*")) > 300


def test_what_is_left_of_a_broken_download_of_an_index_goes_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path))
    storage = LocalStorage(tmp_path / "data")
    storage.write("a", b"first")
    storage.write("b", b"second")
    path = fetched_once(storage, "a", hashlib.sha256(b"first").hexdigest())
    assert path.read_bytes() == b"first"
    days = {".tmp-dead": 0.1, ".tmp-alive": 0.01, "0" * 64: 8.0, "1" * 64: 6.0}
    for name, age in days.items():
        (path.parent / name).touch()
        os.utime(path.parent / name, (then := time.time() - age * 86400, then))
    fetched_once(storage, "b", hashlib.sha256(b"second").hexdigest())
    left = {entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".lock")}
    assert left == {path.name, hashlib.sha256(b"second").hexdigest(), ".tmp-alive", "1" * 64}
