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
a reboot: checkpoints that are being uploaded, and memory-mapped indexes. XDG_RUNTIME_DIR is too small for them: it is
in memory. XDG_CACHE_HOME (~/.cache by default) is for files that should survive a reboot; it may be on a network disk.

The first two folders are private to one user. Their names can be guessed, so another user could make them first, or
make one of their parents. Each component of their paths is checked without following links. A component that another
user could have made, or could replace, is refused. CRATE_RAY_ONE_USER=1 says that nobody else can log in, as in a
container, whose volumes are usually open to all. Then parents may be open to all.

`data.cache_dir` is where the user wants it, so only the folder itself is checked. What is removed from it has a name
that the cache gave, and is not reached through a link.
"""

from __future__ import annotations

import fcntl
import getpass
import grp
import hashlib
import os
import pwd
import re
import shutil
import stat
import tempfile
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from crate_ray.config.identifiers import RunKey
from crate_ray.errors import UserError

_LOCK = "lock"
_MOST_LINKS = 40  # in one path, as in Linux
_ONE_USER = "CRATE_RAY_ONE_USER"
_SUBMITTED = re.compile(r"/runtime_resources/working_dir_files/")
_RUN_KEY = TypeAdapter(RunKey)

# --- Folders --------------------------------------------------------------------------------------------------------


def index_folder() -> Path:
    """Folder of the datasets' indexes, created if missing. Raises UserError as `private_folder`."""
    return _node_folder("index")


def feature_folder() -> Path:
    """Folder of evaluated models' features, created if missing. Raises UserError as `private_folder`."""
    return _cache_folder("features")


def spool_folder(run_key: str) -> Path:
    """Folder of a run's undelivered MLflow records. Its parent is created if missing, the folder itself is not.

    Raises UserError as `private_folder`, or if the key does not have a key's form.
    """
    try:
        return _cache_folder("spool") / _RUN_KEY.validate_python(run_key)
    except ValidationError:
        raise UserError(f"{run_key!r} is not a run's key, which has 32 hexadecimal digits; restore run.json") from None


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

    `parent` is a private folder, and may hold nothing except such folders. The process that made a folder holds a
    lock in it. All folders whose lock is not held are removed.
    """
    with file_lock(parent / _LOCK):  # so that no other process sees a folder before its lock is held
        for folder in parent.iterdir():
            if folder.is_dir() and not folder.is_symlink() and not _in_use(folder):
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
        path: the folder; missing parents are created, also for this user alone.
        advice: what to do if it cannot be used, for the error message.

    Raises:
        UserError: it cannot be created, is a symbolic link or a file, belongs to another user, or others may write to
            it. Or another user could replace one of its parents.
    """
    path = path.absolute()
    try:
        _check_parents(path, advice)
        return _own_folder(path, advice)
    except OSError as error:
        raise _not_created(path, error, advice) from None


def private_subfolder(folder: Path, name: str, advice: str) -> Path:
    """Create a private folder in one that was checked before, or check the existing one. Raises as `private_folder`."""
    try:
        return _own_folder(folder / name, advice)
    except OSError as error:
        raise _not_created(folder / name, error, advice) from None


def chosen_folder(path: Path, advice: str) -> Path:
    """Create a folder that the user chose, or check the existing one. It may be a symbolic link.

    Args:
        path: the folder; missing parents are created.
        advice: what to do if it cannot be used, for the error message.

    Raises:
        UserError: it cannot be created, belongs to another user, or others may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _problem(path.stat(), {os.getuid()})
    except OSError as error:
        raise _not_created(path, error, advice) from None
    if problem is not None:
        raise UserError(f"the folder {path} {problem}; {advice}")
    return path


def _not_created(path: Path, error: OSError, advice: str) -> UserError:
    return UserError(f"cannot create the folder {path}: {error.strerror}; {advice}")


def _own_folder(path: Path, advice: str) -> Path:
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    problem = "is a symbolic link" if stat.S_ISLNK(found.st_mode) else _problem(found, {os.getuid()})
    if problem is not None:
        raise UserError(f"the folder {path} {problem}; remove it, or {advice}")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


def _check_parents(path: Path, advice: str) -> None:
    """Check that no other user could have made or could replace a parent of a path. Creates missing parents.

    Links are followed by hand, so that the folders on their way are checked too. In a folder with the sticky bit, such
    as /tmp, only the owner of an entry can replace it.
    """
    trusted = {0, os.getuid(), Path("/").stat().st_uid}  # root may have another number in a container
    here, left, links = Path("/"), list(reversed(path.parent.parts[1:])), 0
    while left:
        name = left.pop()
        if name == "..":
            here = here.parent
            continue
        step = here / name
        try:
            found = step.lstat()
        except FileNotFoundError:
            with suppress(FileExistsError):
                step.mkdir(mode=0o700)
            found = step.lstat()
        if stat.S_ISLNK(found.st_mode):
            links += 1
            problem = None if found.st_uid in trusted else "is a symbolic link of another user"
            problem = "is one of too many symbolic links" if links > _MOST_LINKS else problem
        else:
            problem = _problem(found, trusted, is_parent=True)
        if problem is not None:
            raise UserError(
                f"the folder {path} is not safe from other users, because {step} {problem}; {advice}, or set "
                f"{_ONE_USER}=1 if nobody else can log in to this machine or container"
            )
        if stat.S_ISLNK(found.st_mode):
            target = step.readlink()
            here = Path("/") if target.is_absolute() else here
            left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            here = step


def _node_folder(kind: str) -> Path:
    # Not crate-ray-<uid>, because earlier versions of crate-ray clean up that whole folder.
    base, advice = Path(tempfile.gettempdir()) / f"crate-ray-node-{os.getuid()}", "set TMPDIR to a folder of your own"
    return private_subfolder(private_folder(base, advice), kind, advice)


def _cache_folder(kind: str) -> Path:
    advice = "set XDG_CACHE_HOME to a folder of your own"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crate-ray"
    except RuntimeError:
        raise UserError(
            f"there is no folder for caches: HOME is not set, and user {os.getuid()} has none; {advice}"
        ) from None
    return private_subfolder(private_folder(base, advice), kind, advice)


def _problem(found: os.stat_result, owners: Container[int], *, is_parent: bool = False) -> str | None:
    """Why other users may change what is in a folder; None if they may not."""
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid not in owners:
        return "belongs to another user"
    writers = found.st_mode & (0o002 if _is_own_group(found.st_gid) else 0o022)
    closed = is_parent and (found.st_mode & stat.S_ISVTX or os.environ.get(_ONE_USER) == "1")
    if writers and not closed:
        return "may be written to by other users"
    return None


def _is_own_group(gid: int) -> bool:
    """Whether a group is this user's private one, as many Linux distributions make one for each user."""
    if gid == 0:  # in containers, any user may be in it
        return False
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _in_use(folder: Path) -> bool:
    try:
        os.close(take_lock(folder / _LOCK, wait=False))
    except BlockingIOError:
        return True
    except FileNotFoundError:  # its process is removing it now
        return False
    return False


def user_name() -> str:
    """Name of the user that runs this process; in a container, whose user may have none, its number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def check_kept(folder: str, setting: str) -> None:
    """Raise UserError if a local folder is in the working directory of a submitted job, which Ray deletes.

    Args:
        folder: address of the folder.
        setting: name of the setting that it comes from.
    """
    if _SUBMITTED.search(folder):
        raise UserError(
            f"{setting} {folder} is in the copy of the working directory that ray job submit made, which Ray deletes "
            f"after the job; set {setting} to s3://bucket/prefix, or to a folder that all nodes share"
        )


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
            found.append((entry.lstat().st_mtime_ns, _size(entry), entry))
    left = sum(size for _, size, _ in found)
    for _, size, entry in sorted(found):
        if left <= max_bytes:
            break
        if entry in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        left -= size
    return left


def _size(entry: Path) -> int:
    try:
        if entry.is_symlink() or not entry.is_dir():
            return entry.lstat().st_size
        return total_size(entry.iterdir())
    except FileNotFoundError:
        return 0
