"""Local folders and S3 behind one small interface: read, write, list and delete objects.

Every failure that a user can fix is a UserError of one sentence. No message contains credentials.
"""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crate_ray.addresses import has_secret
from crate_ray.bounded import MAX_JSON_BYTES
from crate_ray.config import S3Config
from crate_ray.config.identifiers import leads_out
from crate_ray.errors import UserError


class NotFound(UserError):  # noqa: N818 - named for what happened
    """The object does not exist."""


class AlreadyExists(UserError):  # noqa: N818
    """A write with if_absent found an object with that name."""


class Replaced(UserError):  # noqa: N818
    """The object was replaced by another one, or is gone."""


class CannotRead(UserError):  # noqa: N818
    """This object cannot be read, for example because of its permissions. Others perhaps can."""


class TooLarge(UserError):  # noqa: N818
    """The object is larger than it can be if nobody has tampered with it."""


@dataclass(frozen=True)
class ObjectInfo:
    """One entry of a listing."""

    key: str
    """Name relative to the storage, with '/' between folders."""
    size: int
    """Bytes."""
    etag: str
    """Changes with the content: S3's ETag, or modification time and size of a local file."""


class Storage(ABC):
    """Objects under one prefix. Picklable, and safe to use from several threads.

    Keys are names relative to the prefix, with '/' between folders. A key that is absolute or contains '..' is a
    UserError. Listings leave such keys out, with a warning.
    """

    uri: str
    """Local folder or s3://bucket/prefix, without a trailing slash."""

    @abstractmethod
    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Read bytes start .. start + length of an object, by default to its end; fewer if the object ends earlier.

        Raises:
            NotFound: there is no such object.
            Replaced: it was overwritten during the read.
        """

    def read_small(self, key: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Read an object that has at most `limit` bytes.

        Raises:
            NotFound, Replaced: as `read`.
            TooLarge: it has more.
        """
        data = self.read(key, 0, limit + 1)
        if len(data) > limit:
            raise TooLarge(f"{self.uri}/{key} has more than {limit} bytes, so it is damaged; restore or delete it")
        return data

    @abstractmethod
    def read_version(self, key: str, start: int, length: int) -> tuple[bytes, str]:
        """Read bytes start .. start + length of an object, fewer if it ends earlier; returns them and its ETag.

        The ETag (as in ObjectInfo) is that of the version that was read. If it differs between two reads, the object
        was replaced.

        Raises:
            NotFound: there is no such object.
            Replaced: it was overwritten during the read.
        """

    @abstractmethod
    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False, if_match: str | None = None) -> None:
        """Write an object atomically from bytes or a local file.

        Args:
            key: name of the object.
            data: its content, or the path of a local file with it.
            if_absent: fail if the object exists.
            if_match: fail unless the object has this ETag. Local folders guarantee this only among writers that use
                if_match.

        Raises:
            AlreadyExists: if_absent is set, and the object exists.
            Replaced: if_match is set, and the object has another ETag or is gone.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object atomically to a local file.

        Raises:
            NotFound: there is no such object.
            Replaced: it was overwritten during the download.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List the objects whose keys start with prefix, which need not be a folder's name, sorted by key."""

    def survey(self, prefix: str = "") -> tuple[builtins.list[ObjectInfo], dict[str, str]]:
        """List what can be read, as `list`. In local folders, this includes what is in folders behind symbolic links.

        Returns the objects, and the cause for each file or folder that cannot be listed, by key.
        """
        return [*self.list(prefix)], {}

    @abstractmethod
    def info(self, key: str) -> ObjectInfo:
        """Size and ETag of one object. Needs no permission to list.

        Raises:
            NotFound: there is no such object.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""

    @abstractmethod
    def under(self, prefix: str) -> Storage:
        """Return the storage of a sub-folder."""

    @abstractmethod
    def at(self, uri: str) -> Storage:
        """Return the storage of another address, with the same S3 settings.

        Raises:
            UserError: as open_storage.
        """

    def local_path(self, key: str) -> Path | None:
        """Return the path of the object's local file, for memory mapping; None if the storage is S3."""
        return None


def check_key(uri: str, key: str) -> str:
    """The key, if it stays in the storage at `uri`. Raises UserError if it does not."""
    if leads_out(key):
        raise UserError(f"name {key!r} leads out of {uri}; use relative names without '..'")
    return key


def open_storage(uri: str, s3: S3Config) -> Storage:
    """Open a local folder (a path or file:// address; it need not exist) or s3://bucket/prefix.

    Raises:
        UserError: the address has another scheme, no bucket or a secret, or boto3 is missing. Whether the bucket exists
            is only checked at the first use.
    """
    from crate_ray.storage.local import LocalStorage

    scheme, separator, rest = uri.partition("://")
    if not uri:
        raise UserError("the address of a dataset or folder is empty; give a local folder or s3://bucket/prefix")
    if separator and has_secret(uri):
        raise UserError(
            f"{uri!r} holds a user name, a password or a token; leave it out: S3 takes credentials from the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
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
