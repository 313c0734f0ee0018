"""Local folders as storage."""

from __future__ import annotations

import builtins
import errno
import fcntl
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crate_ray.bounded import open_regular
from crate_ray.config import S3Config
from crate_ray.errors import UserError, first_few
from crate_ray.storage.interface import (
    AlreadyExists,
    CannotRead,
    NotFound,
    ObjectInfo,
    Replaced,
    Storage,
    check_key,
    open_storage,
)

logger = logging.getLogger(__name__)

_TEMPORARY_PREFIX = ".tmp-"
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # failures of this process, not of one file
_IRREGULAR = "not a regular file"


class LocalStorage(Storage):
    """A local folder. Writes go to a temporary file that is then renamed.

    The folder itself may be a symbolic link. In it, reads follow links, so a dataset may consist of links to files.
    Writes and deletions never follow links: they replace or remove a link itself, and a link in the place of a folder
    is an error. So they stay in the folder that was opened, whatever links somebody has put there. Storages of
    sub-folders keep this promise for the folder that was opened first.

    Args:
        root: the folder; created at the first write.
        s3: S3 settings for the storages that `at` opens.
    """

    def __init__(self, root: Path, s3: S3Config | None = None) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)
        self._opened, self._below = self.root, ""  # the folder that was opened, and the path from there to the root
        self._s3_config = s3 or S3Config()

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._errors("read", key), open_regular(self.local_path(key)) as file:
            left = os.fstat(file.fileno()).st_size - start  # Python takes memory for all bytes that are asked for
            file.seek(start)
            return file.read() if length is None else file.read(max(0, min(length, left)))

    def read_version(self, key: str, start: int, length: int) -> tuple[bytes, str]:
        with self._errors("read", key), open_regular(self.local_path(key)) as file:
            left = os.fstat(file.fileno()).st_size - start
            file.seek(start)
            data = file.read(max(0, min(length, left)))
            status = os.fstat(file.fileno())  # of the open file, because its name may already belong to another file
            return data, f"{status.st_mtime_ns}-{status.st_size}"

    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False, if_match: str | None = None) -> None:
        name, temporary = key.rpartition("/")[2], f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        with self._errors("write", key), self._folder_of(key, create=True) as folder:
            at: Any = {"src_dir_fd": folder, "dst_dir_fd": folder}
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with open(os.open(temporary, flags, 0o666, dir_fd=folder), "wb") as file:  # noqa: PTH123
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 2**20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if if_absent:
                    os.link(temporary, name, **at)
                    return
                if if_match is not None:
                    fcntl.flock(folder, fcntl.LOCK_EX)  # until the folder is closed
                    if _version_at(name, folder) != if_match:
                        raise Replaced(f"{self.uri}/{key} was changed by another process")
                os.replace(temporary, name, **at)  # noqa: PTH105 - Path takes no descriptor
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)

    def download(self, key: str, path: Path) -> None:
        with self._errors("read", key), open_regular(self.local_path(key)) as source:  # noqa: SIM117 - errors of source and target differ
            with arriving(path) as file, local_errors(path):
                shutil.copyfileobj(source, file, 2**20)
                file.flush()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found, unlisted = self._walk(prefix, follow_links=False)
        if irregular := sorted(key for key, why in unlisted.items() if why == _IRREGULAR):
            logger.warning("%s: skipped what is not a regular file: %s", self.uri, first_few(irregular))
        yield from found

    def survey(self, prefix: str = "") -> tuple[builtins.list[ObjectInfo], dict[str, str]]:
        return self._walk(prefix, follow_links=True)

    def info(self, key: str) -> ObjectInfo:
        with self._errors("read", key):
            status = os.stat(self.local_path(key))  # noqa: PTH116 - as in listings
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"{self.uri}/{key} is not a regular file")
        return _object(key, status)

    def _walk(self, prefix: str, *, follow_links: bool) -> tuple[builtins.list[ObjectInfo], dict[str, str]]:
        """Files below the folder, and the cause for each file or folder that cannot be listed."""
        found: list[ObjectInfo] = []
        unlisted: dict[str, str] = {}

        def key_of(path: str) -> str:
            key = Path(path).relative_to(self.root).as_posix()
            return "" if key == "." else key

        def failed(error: OSError) -> None:
            if key := key_of(str(error.filename)):
                unlisted[key] = error.strerror or str(error)
            elif not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        above: dict[str, frozenset[tuple[int, int]]] = {}  # identities of a folder and those above it
        with self._errors("list", prefix):
            for folder, folders, names in os.walk(self.root, onerror=failed, followlinks=follow_links):
                base = key_of(folder)
                base = base and base + "/"
                if not base.startswith(prefix) and not prefix.startswith(base):
                    folders.clear()
                    continue
                if follow_links:
                    known = above.pop(folder, None) or frozenset({_identity(folder)})
                    for name in folders.copy():
                        path = os.path.join(folder, name)  # noqa: PTH118 - as below
                        try:
                            identity = _identity(path)
                        except OSError as error:
                            failed(error)
                            folders.remove(name)
                            continue
                        if identity in known:
                            unlisted[base + name] = "a link to a folder above it"
                            folders.remove(name)
                        else:
                            above[path] = known | {identity}
                for name in names:
                    if (base + name).startswith(prefix) and not name.startswith(_TEMPORARY_PREFIX):
                        path = os.path.join(folder, name)  # noqa: PTH118 - a million files
                        try:
                            status = os.stat(path)  # noqa: PTH116
                        except FileNotFoundError:
                            if os.path.lexists(path):  # else just deleted
                                unlisted[base + name] = "a link to nothing"
                            continue
                        except OSError as error:
                            failed(error)
                            continue
                        if not stat.S_ISREG(status.st_mode):
                            unlisted[base + name] = _IRREGULAR
                            continue
                        found.append(_object(base + name, status))
        found.sort(key=lambda info: info.key)
        return found, unlisted

    def exists(self, key: str) -> bool:
        with self._errors("read", key):
            return self.local_path(key).is_file()

    def delete(self, key: str) -> None:
        with self._errors("delete", key), suppress(FileNotFoundError), self._folder_of(key) as folder:
            os.unlink(key.rpartition("/")[2], dir_fd=folder)

    def under(self, prefix: str) -> LocalStorage:
        sub = LocalStorage(self.local_path(prefix), self._s3_config)
        sub._opened, sub._below = self._opened, f"{self._below}/{prefix}"
        return sub

    def at(self, uri: str) -> Storage:
        return open_storage(uri, self._s3_config)

    def local_path(self, key: str) -> Path:
        return self.root / check_key(self.uri, key)

    @contextmanager
    def _folder_of(self, key: str, *, create: bool = False) -> Iterator[int]:
        """A descriptor of an object's folder, reached from the opened folder without following links."""
        check_key(self.uri, key)
        if create:
            self._opened.mkdir(parents=True, exist_ok=True)
        path = self._opened
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in f"{self._below}/{key}".split("/")[:-1]:
                if name in ("", "."):
                    continue
                path = path / name
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=folder)
                try:
                    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP) and path.is_symlink():
                        raise UserError(
                            f"{path} is a symbolic link, and crate-ray neither writes nor deletes behind links in a "
                            "folder; put a folder in its place, or give the address that it links to"
                        ) from None
                    raise
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        path = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except FileNotFoundError:
            raise NotFound(f"{path} does not exist") from None
        except FileExistsError:
            raise AlreadyExists(f"{path} already exists") from None
        except OSError as error:
            kind = CannotRead if action == "read" and error.errno not in _EXHAUSTED else UserError
            raise kind(f"cannot {action} {path}: {error.strerror or error}") from None


def _object(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, f"{status.st_mtime_ns}-{status.st_size}")


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 - as in listings
    return status.st_dev, status.st_ino


def _version_at(name: str, folder: int) -> str | None:
    try:
        status = os.stat(name, dir_fd=folder)
    except FileNotFoundError:
        return None
    return f"{status.st_mtime_ns}-{status.st_size}"


@contextmanager
def arriving(path: Path) -> Iterator[Any]:
    """Open a temporary file for writing. It is renamed to `path` when the block ends without an error."""
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        with local_errors(path):
            file = temporary.open("wb")
        with file:
            yield file
        with local_errors(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing a local file into UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
