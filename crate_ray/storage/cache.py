"""Local copies of indexes and of parts of shards from object storage. The processes of a node share them.

Processes that want the same entry take turns under a file lock. An entry is written to a temporary file and renamed, so
it is always complete. Every reader checks the content. Entries and folders may be deleted at any time: they are fetched
again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage
from crate_ray.storage.node_folders import chosen_folder, evict, file_digest, file_lock, index_folder, total_size

_STRIPES = 4096  # number of (empty) lock files: with so many, threads rarely share a lock and wait for each other
_INDEX_SECONDS = 7 * 86400
_PARTIAL_SECONDS = 3600  # a download that has written nothing for this long is dead
_ATTEMPTS = 5
_KEEP = 0.9  # evict down to this share of the limit, so that eviction runs rarely
_ADVICE = "choose another data.cache_dir"
_ENTRY = re.compile(r"[0-9a-f]{64}")


class WrongDigest(UserError):  # noqa: N818 - named for what happened
    """An object's content does not have the digest that it should have."""


def fetch_once(storage: Storage, key: str, sha256: str) -> BufferedReader:
    """Open the local copy of an object. It is downloaded once per node, and removed a week after its last use.

    The open file can be read and memory-mapped even if its name is removed or replaced.

    Raises:
        NotFound: there is no such object.
        WrongDigest: its content does not have this SHA-256.
        UserError: the copy cannot be written, or is removed again and again while it is being opened.
    """
    for _ in range(_ATTEMPTS):
        folder = index_folder()
        try:
            with file_lock(_lock_path(folder, sha256)):
                return _open_copy(storage, key, sha256, folder)
        except FileNotFoundError:
            continue
        except UserError:
            if folder.exists():
                raise
    raise UserError(f"files vanish from {folder} while they are used; set TMPDIR to a folder that nothing else cleans")


def _open_copy(storage: Storage, key: str, sha256: str, folder: Path) -> BufferedReader:
    """Raises FileNotFoundError if another process removes the copy or the folder meanwhile."""
    path = folder / sha256
    with suppress(FileNotFoundError), ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if file_digest(file) == sha256:
            os.utime(path)
            stack.pop_all()
            return file
    _remove_old(folder)
    storage.download(key, path)
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if file_digest(file) != sha256:
            path.unlink(missing_ok=True)
            raise WrongDigest(f"{storage.uri}/{key} does not have the SHA-256 {sha256}")
        stack.pop_all()
        return file


def _remove_old(folder: Path) -> None:
    """Remove indexes that were not used for a week, and the files of interrupted downloads."""
    for path in folder.iterdir():
        if path.name.startswith(".lock"):
            continue
        seconds = _PARTIAL_SECONDS if path.name.startswith(".") else _INDEX_SECONDS
        with suppress(FileNotFoundError):  # other processes clean up too
            if path.stat().st_mtime < time.time() - seconds:
                path.unlink()


def _lock_path(folder: Path, name: str) -> Path:
    return folder / f".lock-{int(name[:8], 16) % _STRIPES}"


class PartCache:
    """Parts of shards in a local folder of limited size; the least recently used ones are evicted.

    Picklable. Several processes and threads may use one folder; a part that several of them want is fetched once.

    Args:
        folder: created if missing.
        max_bytes: limit of all parts together.

    Raises:
        UserError: the folder cannot be created, or belongs to another user.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = chosen_folder(folder, _ADVICE)
        self.max_bytes = max_bytes

    def get(self, name: str, fetch: Callable[[], bytes], check: Callable[[bytes], None]) -> bytes:
        """Return an entry from the folder if it is there and passes the check; otherwise fetch, check and store it.

        Args:
            name: hexadecimal digest that identifies the entry.
            fetch: gets the entry's bytes.
            check: raises UserError for wrong bytes. If fetched bytes are wrong, the error is passed on.
        """
        path = self.folder / name[:2] / name
        if (data := self._read(path, check)) is not None:
            return data
        with self._locked(name):
            if (data := self._read(path, check)) is not None:  # another worker was faster
                return data
            data = fetch()
            check(data)
            if len(data) <= self.max_bytes:
                self._write(path, data)
            return data

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of an entry. If the disk has no room for the lock file, continue without a lock."""
        with ExitStack() as stack:
            with suppress(OSError):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(file_lock(_lock_path(self.folder, name)))
            yield

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
        with suppress(OSError), self._usage() as usage:
            size = path.stat().st_size
            path.unlink()
            usage[0] -= size

    def _write(self, path: Path, data: bytes) -> None:
        temporary = self.folder / ".new"  # one name for all writers, so the next one overwrites a killed one's file
        # If the disk is full, the part is used without being stored.
        # Keep the lock until the part is written, so that eviction counts every part.
        with suppress(OSError), self._usage() as usage:
            if usage[0] + len(data) > self.max_bytes:
                usage[0] = evict(self._entries(), max(0, int(self.max_bytes * _KEEP) - len(data)))
            try:
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(path)
                usage[0] += len(data)
            except OSError:
                temporary.unlink(missing_ok=True)

    def _entries(self) -> Iterator[Path]:
        """The stored parts. The user chose the folder, so it may also hold files of theirs, which are left alone."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            if folder.is_dir() and not folder.is_symlink():
                yield from (path for path in folder.glob(f"{folder.name}*") if _ENTRY.fullmatch(path.name))

    @contextmanager
    def _usage(self) -> Iterator[list[int]]:
        """Read the number of bytes in the folder under a lock, and write it back at the end."""
        path = self.folder / ".usage"
        with file_lock(self.folder / ".lock-usage"):
            try:
                usage = [int(path.read_text())]
                path.unlink()  # if this process is killed, the next one counts the files again
            except (FileNotFoundError, ValueError):
                usage = [total_size(self._entries())]
            yield usage
            path.write_text(str(usage[0]))
