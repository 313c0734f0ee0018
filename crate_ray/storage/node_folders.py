"""The folders that crate-ray uses on a node's own disk, and how they are cleaned up. Also locks, digests and eviction.

    <TMPDIR>/crate-ray-node-<uid>/  processes/<name>/  temporary files of one driver or worker. Each process holds a
                                                       lock in its folder; the next one that starts removes folders
                                                       of dead processes, here and nowhere else
                                    index/<sha256>     indexes of datasets in object storage (cache.fetch_once), shared
                                                       by all processes; removed a week after their last use
    <XDG_CACHE_HOME>/crate-ray/     features/<key>/    features of evaluated models (evaluation.feature_cache); least
                                                       recently used ones are evicted
                                    spool/<run key>/   records that MLflow does not have yet (tracking.spool); removed
                                                       when it has them
    <data.cache_dir>/               parts of shards (cache.PartCache); least recently used ones are evicted

TMPDIR (/tmp by default) is for files that may take gigabytes, must be on the node's own disk, and are not needed after
a reboot: checkpoints that are being uploaded, and memory-mapped indexes. XDG_CACHE_HOME (~/.cache by default) is for
files that should survive a reboot. Both folders are private to one user. A folder that belongs to another user, or that
others can write to, is refused, because they could replace the files in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from crate_ray.errors import UserError

_LOCK = "lock"

# --- Folders --------------------------------------------------------------------------------------------------------


def index_folder() -> Path:
    """Folder of the datasets' indexes, created if missing. Raises UserError as `private_folder`."""
    return _node_folder("index")


def feature_folder() -> Path:
    """Folder of evaluated models' features, created if missing. Raises UserError as `private_folder`."""
    return _cache_folder("features")


def spool_folder(run_key: str) -> Path:
    """Folder of a run's undelivered MLflow records. Its parent is created if missing, the folder itself is not.

    Raises UserError as `private_folder`.
    """
    return _cache_folder("spool") / run_key


@contextmanager
def process_folder(name: str) -> Iterator[Path]:
    """An empty temporary folder of this process, removed at the end; folders of dead processes are removed first.

    The name must be unique on this node. Raises UserError as `private_folder`.
    """
    with temporary_folder(_node_folder("processes"), name) as folder:
        yield folder


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder below `parent`, removed at the end or, if this process dies, by the next caller.

    `parent` is created if missing, and may hold nothing except such folders. The process that made a folder holds a
    lock in it. All folders whose lock is not held are removed.
    """
    parent.mkdir(mode=0o700, exist_ok=True)
    with file_lock(parent / _LOCK):  # so that no other process sees a folder before its lock is held
        for folder in parent.iterdir():
            if folder.is_dir() and not _in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)
        own = parent / name
        own.mkdir(mode=0o700)
        descriptor = take_lock(own / _LOCK)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(descriptor)


def private_folder(path: Path, advice: str) -> Path:
    """Create a folder that only this user can access, or check the existing one.

    If other users may read the folder, their access is removed.

    Args:
        path: the folder; missing parents are created.
        advice: what to do if it cannot be used, for the error message.

    Raises:
        UserError: it cannot be created, is a symbolic link or a file, belongs to another user, or others may write to
            it.
    """
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700, parents=True)
        found = path.lstat()
        problem = _problem(found)
        if problem is None and found.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; {advice}") from None
    if problem is not None:
        raise UserError(f"the folder {path} {problem}; remove it, or {advice}")
    return path


def chosen_folder(path: Path, advice: str) -> Path:
    """Create a folder that the user chose, or check the existing one. It may be a symbolic link.

    Args:
        path: the folder; missing parents are created.
        advice: what to do if it cannot be used, for the error message.

    Raises:
        UserError: it cannot be created, or belongs to another user.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; {advice}") from None
    if owner != os.getuid():
        raise UserError(f"the folder {path} belongs to another user; {advice}")
    return path


def _node_folder(kind: str) -> Path:
    # Not crate-ray-<uid>, because earlier versions of crate-ray clean up that whole folder.
    base, advice = Path(tempfile.gettempdir()) / f"crate-ray-node-{os.getuid()}", "set TMPDIR to a folder of your own"
    return private_folder(private_folder(base, advice) / kind, advice)


def _cache_folder(kind: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crate-ray"
    advice = "set XDG_CACHE_HOME to a folder of your own"
    return private_folder(private_folder(base, advice) / kind, advice)


def _problem(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.getuid():
        return "belongs to another user"
    return "may be written to by other users" if found.st_mode & 0o022 else None


def _in_use(folder: Path) -> bool:
    try:
        os.close(take_lock(folder / _LOCK, wait=False))
    except BlockingIOError:
        return True
    except FileNotFoundError:  # its process is removing it now
        return False
    return False


# --- Locks, digests, eviction ---------------------------------------------------------------------------------------


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, created if missing, or on a folder. Excludes other threads and processes."""
    descriptor = take_lock(path)
    try:
        yield
    finally:
        os.close(descriptor)


def take_lock(path: Path, *, wait: bool = True) -> int:
    """Take an exclusive lock on a file, created if missing, or on a folder.

    Returns the file descriptor that holds the lock until it is closed or the process ends.

    Raises:
        BlockingIOError: another thread or process holds it, and `wait` is false.
        OSError: the file cannot be created.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def file_digest(file: Path | BufferedReader) -> str:
    """SHA-256 of a file's whole content, in hexadecimal. An open file is left at its end."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return file_digest(opened)
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def total_size(entries: Iterable[Path]) -> int:
    """Bytes in files and folders. Entries that are removed meanwhile do not count."""
    return sum(_size(entry) for entry in entries)


def evict(entries: Iterable[Path], max_bytes: int, keep: Container[Path] = ()) -> int:
    """Remove the files and folders with the oldest modification times until the rest has at most max_bytes.

    Args:
        entries: files and folders that may be removed. Every use of an entry updates its modification time (os.utime).
        max_bytes: limit for all entries together.
        keep: entries that are not removed.

    Returns:
        Bytes in the remaining entries.
    """
    found = []
    for entry in entries:
        with suppress(FileNotFoundError):  # other processes evict too
            found.append((entry.stat().st_mtime_ns, _size(entry), entry))
    left = sum(size for _, size, _ in found)
    for _, size, entry in sorted(found):
        if left <= max_bytes:
            break
        if entry in keep:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        left -= size
    return left


def _size(entry: Path) -> int:
    try:
        if not entry.is_dir():
            return entry.stat().st_size
        return total_size(entry.iterdir())
    except FileNotFoundError:
        return 0
