"""Local copies of what object storage holds, shared by the processes of a node: index files, and parts of shards.

Writers of one entry take turns under a file lock and rename it into place; readers check its digest. Anything here may
be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage

_STRIPES = 4096  # locks of a cache, empty files: two of some dozens of threads seldom wait for each other's fetch
_INDEX_SECONDS = 7 * 86400
_BROKEN_SECONDS = 3600  # a download that has written nothing for so long is dead
_KEEP = 0.9  # eviction frees this much more than it must, so that it runs rarely


def fetched_once(storage: Storage, key: str, sha256: str) -> Path:
    """Local copy of an object, fetched once per node and kept for a week after its last use; for memory mapping.

    The caller checks its digest. Raises NotFound where there is no such object.
    """
    folder = _private_folder(Path(tempfile.gettempdir()) / f"crate-ray-{os.getuid()}" / "index")
    path = folder / sha256
    with _locked(folder / f".lock-{int(sha256[:8], 16) % _STRIPES}"):
        if path.exists() and _sha256(path) == sha256:
            path.touch()
            return path
        for old in folder.iterdir():
            if not old.name.startswith(".lock"):
                kept = _BROKEN_SECONDS if old.name.startswith(".") else _INDEX_SECONDS
                with suppress(FileNotFoundError):  # others clean too
                    if old.stat().st_mtime < time.time() - kept:
                        old.unlink()
        storage.download(key, path)
    return path


class PartCache:
    """Parts of shards in a local folder of limited size, least recently used ones dropped first.

    Picklable; several processes and threads may use one folder, and only one of them fetches a part that all want.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = _private_folder(folder)
        self.max_bytes = max_bytes

    def get(self, name: str, fetch: Callable[[], bytes], check: Callable[[bytes], None]) -> bytes:
        """The entry of that name, from the folder if it is there and passes the check, else fetched and kept.

        Args:
            name: a hexadecimal digest of what the entry is.
            fetch: gets the bytes.
            check: raises an exception when bytes are not the right ones; fetched ones are checked before they are kept.
        """
        path = self.folder / name[:2] / name
        if (data := self._read(path, check)) is not None:
            return data
        with _locked(self.folder / f".lock-{int(name[:8], 16) % _STRIPES}"):
            if (data := self._read(path, check)) is not None:  # another worker was faster
                return data
            data = fetch()
            check(data)
            if len(data) <= self.max_bytes:
                self._write(path, data)
            return data

    def _read(self, path: Path, check: Callable[[bytes], None]) -> bytes | None:
        try:
            data = path.read_bytes()
            check(data)
            os.utime(path)
        except FileNotFoundError:
            return None
        except UserError:
            self._remove(path)
            return None
        return data

    def _remove(self, path: Path) -> None:
        with self._usage() as usage:
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                return
            usage[0] -= size

    def _write(self, path: Path, data: bytes) -> None:
        temporary = self.folder / ".new"  # the same for all: one overwrites what a killed one has left
        # A full disk is no reason to stop: the part is used without being kept.
        # Locked until it is written: who makes room must see all that takes room.
        with suppress(OSError), self._usage() as usage:
            if usage[0] + len(data) > self.max_bytes:
                usage[0] = self._evict(int(self.max_bytes * _KEEP) - len(data))
            try:
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(path)
                usage[0] += len(data)
            except OSError:
                temporary.unlink(missing_ok=True)

    def _evict(self, target: int) -> int:
        """Remove the entries used longest ago until what is left is at most target bytes; returns what is left."""
        entries = []
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if left <= max(target, 0):
                break
            path.unlink(missing_ok=True)
            left -= size
        return left

    @contextmanager
    def _usage(self) -> Iterator[list[int]]:
        """Bytes in the folder, as one number that is read and written back under a lock."""
        path = self.folder / ".usage"
        with _locked(self.folder / ".lock-usage"):
            try:
                usage = [int(path.read_text())]
                path.unlink()  # the next one counts anew if this one is killed
            except (FileNotFoundError, ValueError):
                usage = [sum(entry.stat().st_size for entry in self.folder.glob("??/*"))]
            yield usage
            path.write_text(str(usage[0]))


def _private_folder(path: Path) -> Path:
    """The folder, made for this user alone. Raises UserError where it belongs to somebody else or cannot be made."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache folder {path}: {error.strerror}; choose another one") from None
    if path.stat().st_uid != os.getuid():
        raise UserError(f"the cache folder {path} belongs to another user; choose another one")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, among processes and threads."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
