"""Local folders as storage."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crate_ray.config import S3Config
from crate_ray.errors import UserError
from crate_ray.storage.interface import AlreadyExists, NotFound, ObjectInfo, Replaced, Storage, open_storage
from crate_ray.storage.node_folders import file_lock

_TEMPORARY_PREFIX = ".tmp-"


class LocalStorage(Storage):
    """A local folder. Writes go to a temporary file that is then renamed.

    Args:
        root: the folder; created at the first write.
        s3: S3 settings for the storages that `at` opens.
    """

    def __init__(self, root: Path, s3: S3Config | None = None) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)
        self._s3_config = s3 or S3Config()

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._errors("read", key), self.local_path(key).open("rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def read_version(self, key: str, start: int, length: int) -> tuple[bytes, str]:
        with self._errors("read", key), self.local_path(key).open("rb") as file:
            file.seek(start)
            data = file.read(length)
            status = os.fstat(file.fileno())  # of the open file, because its name may already belong to another file
            return data, f"{status.st_mtime_ns}-{status.st_size}"

    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False, if_match: str | None = None) -> None:
        path = self.local_path(key)
        temporary = path.with_name(f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        with self._errors("write", key):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 2**20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if if_absent:
                    path.hardlink_to(temporary)
                elif if_match is not None:
                    with file_lock(path.parent):
                        status = path.stat() if path.exists() else None
                        if status is None or f"{status.st_mtime_ns}-{status.st_size}" != if_match:
                            raise Replaced(f"{self.uri}/{key} was changed by another process")
                        temporary.replace(path)
                else:
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def download(self, key: str, path: Path) -> None:
        with self._errors("read", key), self.local_path(key).open("rb") as source:  # noqa: SIM117 - errors of source and target differ
            with arriving(path) as file, local_errors(path):
                shutil.copyfileobj(source, file, 2**20)
                file.flush()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = []
        with self._errors("list", prefix):
            for folder, folders, names in os.walk(self.root):
                base = Path(folder).relative_to(self.root).as_posix()
                base = "" if base == "." else base + "/"
                if not base.startswith(prefix) and not prefix.startswith(base):
                    folders.clear()
                    continue
                for name in names:
                    if (base + name).startswith(prefix) and not name.startswith(_TEMPORARY_PREFIX):
                        try:
                            status = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118 - a million files
                        except FileNotFoundError:  # just deleted
                            continue
                        found.append(ObjectInfo(base + name, status.st_size, f"{status.st_mtime_ns}-{status.st_size}"))
        found.sort(key=lambda info: info.key)
        yield from found

    def exists(self, key: str) -> bool:
        with self._errors("read", key):
            return self.local_path(key).is_file()

    def delete(self, key: str) -> None:
        with self._errors("delete", key):
            self.local_path(key).unlink(missing_ok=True)

    def under(self, prefix: str) -> LocalStorage:
        return LocalStorage(self.local_path(prefix), self._s3_config)

    def at(self, uri: str) -> Storage:
        return open_storage(uri, self._s3_config)

    def local_path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise UserError(f"name {key!r} leads out of {self.uri}; use relative names without '..'")
        return self.root / key

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
            raise UserError(f"cannot {action} {path}: {error.strerror or error}") from None


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
