"""S3 (boto3) and local folders behind one small interface: whole objects, ranges of them, and listings.

Every failure that a user can mend is a UserError of one sentence; no message holds a credential.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import boto3.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from crate_ray.config import S3Config
from crate_ray.errors import UserError

_TEMPORARY_PREFIX = ".tmp-"
_TRANSFER = TransferConfig(multipart_threshold=32 * 2**20, multipart_chunksize=32 * 2**20, max_concurrency=8)
_CREDENTIAL_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws or an instance role"
_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_UNREACHABLE = (EndpointConnectionError, ConnectTimeoutError, ReadTimeoutError, ConnectionClosedError, HTTPClientError)
_CUT_OFF = (ReadTimeoutError, IncompleteReadError, ResponseStreamingError, ConnectionClosedError)


class NotFound(UserError):  # noqa: N818 - named for what happened, as FileExistsError's kin are
    """The object does not exist."""


class AlreadyExists(UserError):  # noqa: N818
    """A write with if_absent found an object of that name."""


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
        """

    @abstractmethod
    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        """Write an object from bytes or from a local file; it appears whole or not at all.

        Raises:
            AlreadyExists: if_absent, and the object exists.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file.

        Raises:
            NotFound: there is no such object.
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

    def local_path(self, key: str) -> Path | None:
        """Where the object is a local file, its path (for memory mapping); None for S3."""
        return None


def open_storage(uri: str, s3: S3Config) -> Storage:
    """Storage of a local folder (a path or file:// address; need not exist) or of s3://bucket/prefix.

    Raises:
        UserError: the address has another scheme, or no bucket. Whether the bucket exists shows at the first use.
    """
    scheme, separator, rest = uri.partition("://")
    if not uri:
        raise UserError("the address of a dataset or folder is empty; give a local folder or s3://bucket/prefix")
    if not separator:
        return LocalStorage(Path(uri).expanduser())
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError(f"{uri!r} is not a file address; write file:///absolute/path or a plain path")
        return LocalStorage(Path(rest))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UserError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        return S3Storage(bucket, prefix.strip("/"), s3)
    raise UserError(
        f"storage address {uri!r} has the unknown scheme {scheme!r}; use a local folder or s3://bucket/prefix"
    )


class LocalStorage(Storage):
    """A local folder. Writes go to a temporary file that is then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._errors("read", key), self.local_path(key).open("rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> None:
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
                else:
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def download(self, key: str, path: Path) -> None:
        with self._errors("read", key):
            shutil.copyfile(self.local_path(key), path)

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
                        status = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118 - a million files
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
        return LocalStorage(self.local_path(prefix))

    def local_path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise UserError(f"name {key!r} leads out of {self.uri}; names are relative and may not hold '..'")
        return self.root / key

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        path = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except FileNotFoundError:
            raise NotFound(f"{path} does not exist") from None
        except FileExistsError:
            raise AlreadyExists(f"{path} exists already") from None
        except OSError as error:
            raise UserError(f"cannot {action} {path}: {error.strerror or error}") from None


@dataclass
class S3Storage(Storage):
    """Objects under s3://bucket/prefix, on AWS or an S3-compatible store."""

    bucket: str
    prefix: str
    config: S3Config
    uri: str = field(init=False)

    def __post_init__(self) -> None:
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._client: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length is not None and length <= 0:
            return b""
        arguments: dict[str, Any] = {"Bucket": self.bucket, "Key": self._name(key)}
        if start or length is not None:
            arguments["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        for attempt in range(1, self.config.max_attempts + 1):
            with self._errors("read", key):
                try:
                    body = self._connect().get_object(**arguments)["Body"]
                except ClientError as error:
                    if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                        return b""
                    raise
                try:
                    data: bytes = body.read()
                    return data
                except _CUT_OFF:  # botocore retries requests, but not a body that stops in the middle
                    if attempt == self.config.max_attempts:
                        raise
            time.sleep(random.uniform(0, min(20.0, 0.1 * 2**attempt)))
        raise AssertionError("unreachable")

    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        name = self._name(key)
        with self._errors("write", key):
            if isinstance(data, bytes):
                condition: Any = {"IfNoneMatch": "*"} if if_absent else {}
                self._connect().put_object(Bucket=self.bucket, Key=name, Body=data, **condition)
                return
            with data.open("rb") as file:
                if if_absent:
                    self._connect().put_object(Bucket=self.bucket, Key=name, Body=file, IfNoneMatch="*")
                else:
                    self._connect().upload_fileobj(file, self.bucket, name, Config=_TRANSFER)

    def download(self, key: str, path: Path) -> None:
        with self._errors("read", key), path.open("wb") as file:
            self._connect().download_fileobj(self.bucket, self._name(key), file, Config=_TRANSFER)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        base = f"{self.prefix}/" if self.prefix else ""
        with self._errors("list", prefix):
            pages = self._connect().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
            for page in pages:
                for entry in page.get("Contents", []):
                    key = entry["Key"].removeprefix(base)
                    if key and not key.endswith("/"):  # consoles make empty objects as folders
                        yield ObjectInfo(key, entry["Size"], entry["ETag"].strip('"'))

    def exists(self, key: str) -> bool:
        try:
            with self._errors("read", key):
                self._connect().head_object(Bucket=self.bucket, Key=self._name(key))
        except NotFound:
            return False
        return True

    def delete(self, key: str) -> None:
        with self._errors("delete", key):
            self._connect().delete_object(Bucket=self.bucket, Key=self._name(key))

    def under(self, prefix: str) -> S3Storage:
        sub = S3Storage(self.bucket, self._name(prefix).strip("/"), self.config)
        sub._client = self._client
        return sub

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @property
    def _endpoint(self) -> str | None:
        named = (self.config.endpoint_url, os.environ.get("AWS_ENDPOINT_URL_S3"), os.environ.get("AWS_ENDPOINT_URL"))
        return next(filter(None, named), None)

    def _connect(self) -> Any:
        with self._lock:
            if self._client is None:
                try:
                    session = boto3.session.Session()
                    region = self.config.region or session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
                    self._client = session.client(
                        "s3",
                        endpoint_url=self._endpoint,
                        region_name=region,
                        config=Config(
                            connect_timeout=self.config.connect_timeout,
                            read_timeout=self.config.read_timeout,
                            retries={"mode": "standard", "total_max_attempts": self.config.max_attempts},
                            # stores other than AWS refuse or garble the checksums that newer SDKs send
                            request_checksum_calculation="when_required",
                            response_checksum_validation="when_required",
                            max_pool_connections=32,
                            s3={"addressing_style": "path"} if self._endpoint else {},
                        ),
                    )
                except ValueError:
                    raise UserError(
                        f"S3 endpoint {self._where()!r} is not a valid address; write it as http://host:port"
                    ) from None
            return self._client

    def _where(self) -> str:
        """The endpoint for messages, without a user name and password that might be in it."""
        if not self._endpoint:
            return "AWS"
        parts = urlsplit(self._endpoint)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        """Turn boto's exceptions into UserErrors; not chained, as theirs may quote what we must not print."""
        try:
            yield
        except ClientError as error:
            self._raise_client_error(error, action, key)
        except _NO_CREDENTIALS as error:
            raise UserError(
                f"no usable AWS credentials for {self.uri} ({type(error).__name__}); {_CREDENTIAL_HINT}"
            ) from None
        except ParamValidationError:
            raise UserError(f"{self.uri}/{key} is not a valid S3 address: check the bucket's name") from None
        except _UNREACHABLE as error:
            raise UserError(
                f"cannot reach the S3 endpoint {self._where()} to {action} {self.uri}/{key} ({type(error).__name__}); "
                "check s3.endpoint_url, and that the server is up"
            ) from None
        except BotoCoreError as error:
            raise UserError(f"cannot {action} {self.uri}/{key} at {self._where()}: {type(error).__name__}") from None

    def _raise_client_error(self, error: ClientError, action: str, key: str) -> NoReturn:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        address = f"{self.uri}/{key}"
        if code == "NoSuchBucket" or (code in ("404", "NotFound") and not self._bucket_exists()):
            raise UserError(
                f"bucket {self.bucket!r} does not exist at {self._where()}; create it or check the name"
            ) from None
        if code in ("NoSuchKey", "404", "NotFound"):
            raise NotFound(f"{address} does not exist at {self._where()}") from None
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
            raise AlreadyExists(f"{address} exists already") from None
        if code in _REFUSED:
            raise UserError(f"{self._where()} refuses the AWS credentials ({code}); {_CREDENTIAL_HINT}") from None
        if status == 403 or code in ("AccessDenied", "403"):
            raise UserError(
                f"access denied: these AWS credentials may not {action} {address} at {self._where()}; "
                "ask for that permission or use other credentials"
            ) from None
        if status == 301 or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            raise UserError(f"bucket {self.bucket!r} is in another region; set s3.region") from None
        raise UserError(f"cannot {action} {address} at {self._where()}: {code} (HTTP {status})") from None

    def _bucket_exists(self) -> bool:
        """Whether the bucket is there; a HEAD of an object has no body that would tell. True where we may not look."""
        try:
            self._connect().head_bucket(Bucket=self.bucket)
        except ClientError as error:
            return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404
        except BotoCoreError:
            return True
        return True
