"""Local folders and S3 behind one small interface: whole objects, ranges of them, and listings.

Every failure that a user can mend is a UserError of one sentence; no message holds a credential.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crate_ray.config import S3Config
from crate_ray.errors import UserError


class NotFound(UserError):  # noqa: N818 - named for what happened, as FileExistsError's kin are
    """The object does not exist."""


class AlreadyExists(UserError):  # noqa: N818
    """A write with if_absent found an object of that name."""


class Replaced(UserError):  # noqa: N818
    """Another object has, or has taken, the name of the one that was meant."""


@dataclass(frozen=True)
class ObjectInfo:
    """One entry of a listing."""

    key: str
    """Name relative to the storage, '/'-separated."""
    size: int
    """Bytes."""
    etag: str
    """Changes when the content does (S3's ETag; time and size of a local file)."""


class Storage(ABC):
    """Objects under one prefix. Picklable and safe to use from several threads. Keys are relative and '/'-separated."""

    uri: str
    """Local folder or s3://bucket/prefix, without a slash at the end."""

    @abstractmethod
    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes start .. start + length of an object (to its end by default); fewer where the object ends before.

        Raises:
            NotFound: there is no such object.
            Replaced: it was overwritten meanwhile.
        """

    @abstractmethod
    def read_version(self, key: str, start: int, length: int) -> tuple[bytes, str]:
        """Bytes start .. start + length of an object (fewer where it ends before), and its ETag.

        The ETag is that of the very bytes (S3's ETag; time and size of a local file), as in ObjectInfo: a caller who
        compares it between two reads notices that the object was replaced.

        Raises:
            NotFound: there is no such object.
            Replaced: it was overwritten meanwhile.
        """

    @abstractmethod
    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False, if_match: str | None = None) -> None:
        """Write an object from bytes or from a local file; it appears whole or not at all.

        Args:
            key: its name.
            data: its content.
            if_absent: only where there is no such object.
            if_match: only in the place of the object that has this ETag. In a local folder that holds among those who
                write with if_match.

        Raises:
            AlreadyExists: if_absent, and the object exists.
            Replaced: if_match, and the object has another ETag or is gone.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all.

        Raises:
            NotFound: there is no such object.
            Replaced: it was overwritten meanwhile.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose keys begin with prefix (a string, not a folder), in all sub-folders, sorted by key."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""

    @abstractmethod
    def under(self, prefix: str) -> Storage:
        """The storage of a sub-folder."""

    @abstractmethod
    def at(self, uri: str) -> Storage:
        """The storage of another address, reached with the same settings.

        Raises:
            UserError: as open_storage.
        """

    def local_path(self, key: str) -> Path | None:
        """Where the object is a local file, its path (for memory mapping); None for S3."""
        return None


def open_storage(uri: str, s3: S3Config) -> Storage:
    """Storage of a local folder (a path or file:// address; need not exist) or of s3://bucket/prefix.

    Raises:
        UserError: the address has another scheme, or no bucket. Whether the bucket exists shows at the first use.
    """
    from crate_ray.storage.local import LocalStorage

    scheme, separator, rest = uri.partition("://")
    if not uri:
        raise UserError("the address of a dataset or folder is empty; give a local folder or s3://bucket/prefix")
    if not separator:
        return LocalStorage(Path(uri).expanduser(), s3)
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError(f"{uri!r} is not a file address; write file:///absolute/path or a plain path")
        return LocalStorage(Path(rest), s3)
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UserError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        try:  # local folders need no boto3
            from crate_ray.storage.s3 import S3Storage
        except ImportError as error:
            raise UserError(f"{uri} cannot be opened: {error}; install boto3 in this environment") from None

        return S3Storage(bucket, prefix.strip("/"), s3)
    raise UserError(
        f"storage address {uri!r} has the unknown scheme {scheme!r}; use a local folder or s3://bucket/prefix"
    )
