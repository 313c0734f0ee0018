"""Caches on a node keep their limits when processes are killed, and fetch an entry once for many processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from crate_ray.errors import UserError
from crate_ray.evaluation.feature_cache import FeatureCache, Writer
from crate_ray.storage.cache import PartCache, WrongDigest, fetch_once
from crate_ray.storage.interface import NotFound
from crate_ray.storage.local import LocalStorage

ROOT = Path(__file__).parents[2]
NAMES = [hashlib.sha256(bytes([i])).hexdigest() for i in range(32)]


def started(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A process with the cache's modules and the arguments at hand."""
    head = "import os, sys, time; from pathlib import Path; from crate_ray.storage.cache import PartCache\n"
    return subprocess.Popen([sys.executable, "-c", head + script, *map(str, arguments)], cwd=ROOT)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".usage")


def test_a_part_is_fetched_once_for_many_processes(tmp_path: Path) -> None:
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
def test_the_limit_holds_after_a_writer_was_killed(tmp_path: Path, moment: str) -> None:
    """It is killed just before or after its part gets its name."""
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


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, for this process."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_index_is_downloaded_once_and_leftovers_are_removed(tmp_path: Path, temporary: Path) -> None:
    storage = LocalStorage(tmp_path / "data")
    storage.write("a", b"first")
    storage.write("b", b"second")
    with fetch_once(storage, "a", digest(b"first")) as file:
        file.seek(0)
        assert file.read() == b"first"
    (path,) = (temporary / f"crate-ray-node-{os.getuid()}" / "index").glob("[0-9a-f]*")
    assert path.name == digest(b"first")
    days = {".tmp-dead": 0.1, ".tmp-alive": 0.01, "0" * 64: 8.0, "1" * 64: 6.0}
    for name, age in days.items():
        (path.parent / name).touch()
        os.utime(path.parent / name, (then := time.time() - age * 86400, then))
    inode = path.stat().st_ino
    fetch_once(storage, "b", digest(b"second")).close()
    left = {entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".lock")}
    assert left == {path.name, digest(b"second"), ".tmp-alive", "1" * 64}
    fetch_once(storage, "a", digest(b"first")).close()
    assert path.stat().st_ino == inode


def test_a_copy_that_is_damaged_or_vanishes_is_downloaded_again(tmp_path: Path, temporary: Path) -> None:
    """Also if another process removes files or folders, before fetching or between its steps."""
    storage, base = LocalStorage(tmp_path / "data"), temporary / f"crate-ray-node-{os.getuid()}"
    storage.write("a", b"content")

    def fetch() -> bytes:
        with fetch_once(storage, "a", digest(b"content")) as file:
            file.seek(0)
            return file.read()

    assert fetch() == b"content"
    (base / "index" / digest(b"content")).write_bytes(b"damaged")
    assert fetch() == b"content"
    shutil.rmtree(base)
    assert fetch() == b"content"

    class Swept(LocalStorage):
        """Around its first downloads, the temporary folder is removed."""

        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.moments = ["before", "after"]

        def download(self, key: str, path: Path) -> None:
            moment = self.moments.pop() if self.moments else ""
            if moment == "before":
                shutil.rmtree(base)
            super().download(key, path)
            if moment == "after":
                shutil.rmtree(base)

    shutil.rmtree(base)
    storage = swept = Swept(tmp_path / "data")
    assert fetch() == b"content" and swept.moments == []


def test_a_folder_that_is_always_cleaned_and_a_wrong_object_have_a_sentence_each(
    tmp_path: Path, temporary: Path
) -> None:
    class AlwaysSwept(LocalStorage):
        def download(self, key: str, path: Path) -> None:
            super().download(key, path)
            shutil.rmtree(path.parent)

    storage = LocalStorage(tmp_path / "data")
    storage.write("a", b"content")
    with pytest.raises(UserError, match=r"files vanish from \S+/index while they are used; set TMPDIR"):
        fetch_once(AlwaysSwept(tmp_path / "data"), "a", digest(b"content"))
    with pytest.raises(WrongDigest, match=r"data/a does not have the SHA-256 0{64}"):
        fetch_once(storage, "a", "0" * 64)
    with pytest.raises(NotFound, match=r"data/b does not exist"):
        fetch_once(storage, "b", "1" * 64)
    names = {path.name for path in (temporary / f"crate-ray-node-{os.getuid()}" / "index").iterdir()}
    assert all(name.startswith(".lock") for name in names)


def test_a_removed_cache_folder_is_created_again(tmp_path: Path) -> None:
    cache = PartCache(tmp_path / "cache", 1000)
    for _ in range(2):
        assert cache.get(NAMES[0], lambda: b"content", lambda data: None) == b"content"
        assert (tmp_path / "cache" / NAMES[0][:2] / NAMES[0]).exists()
        shutil.rmtree(tmp_path / "cache")


def test_features_that_are_being_computed_are_not_evicted(tmp_path: Path) -> None:
    """Those of a killed process are removed; a live one's entry, older than all others, is not."""
    head = "import os; from pathlib import Path; from crate_ray.evaluation.feature_cache import FeatureCache\n"
    dies = "with FeatureCache(Path(sys.argv[1]), 10_000).write([sys.argv[2]], 10, [4]): os._exit(3)"
    dead, slow_key, *keys = NAMES[:5]
    assert started(head + dies, tmp_path, dead).wait(60) == 3
    assert [path.name for path in (tmp_path / ".partial").glob(f"*/{dead}")] == [dead]
    cache, numbers = FeatureCache(tmp_path, 10_000), np.arange(100)

    def fill(writer: Writer) -> None:
        writer.put(numbers, [np.ones((100, 4), np.float32)], numbers, numbers)

    with cache.write([slow_key], 100, [4]) as slow:
        assert not list((tmp_path / ".partial").glob(f"*/{dead}"))
        for key in keys:
            with cache.write([key], 100, [4]) as writer:
                fill(writer)
        assert cache.get(keys[0]) is None and cache.get(keys[2]) is not None
        fill(slow)
    found = cache.get(slow_key)
    assert found is not None and (found.features == 1).all()
