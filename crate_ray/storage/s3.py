"""Storage on S3: AWS or a compatible store."""

from __future__ import annotations

import io
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from botocore.exceptions import ClientError, IncompleteReadError, ParamValidationError, SSLError

from crate_ray.config import S3Config
from crate_ray.config.identifiers import leads_out
from crate_ray.errors import UserError, first_few
from crate_ray.storage.credentials import only_on_driver
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
from crate_ray.storage.local import arriving, local_errors
from crate_ray.storage.s3_client import (
    REFUSED,
    Attempts,
    RequestFailed,
    S3Client,
    cause,
    code,
    failure_of,
    receive,
    status,
    whole,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

_CREDENTIAL_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws or an instance role"
_PART_BYTES = 16 * 2**20  # size of a part in downloads and multipart uploads
_PARALLEL_PARTS = 8
_MULTIPART_BYTES = 32 * 2**20  # larger objects are uploaded in parts
_SINGLE_PUT_BYTES = 5 * 2**30  # S3's limit for one PUT
_MAX_PARTS = 10_000  # S3's limit
_WRITER = "crate-ray-writer"  # object metadata that identifies the write() call that made the object
_PROGRESS_BYTES = 64 * 2**10  # bytes of a body that count as progress


class _Range(NamedTuple):
    data: bytes
    etag: str
    size: int  # of the whole object


@dataclass
class S3Storage(Storage):
    """Objects under s3://bucket/prefix, on AWS or an S3-compatible store."""

    bucket: str
    prefix: str
    config: S3Config
    uri: str = field(init=False)

    def __post_init__(self) -> None:
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._s3 = S3Client(self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length is not None and length <= 0:
            return b""
        return self._fetch(key, start, length).data

    def read_version(self, key: str, start: int, length: int) -> tuple[bytes, str]:
        found = self._fetch(key, start, max(1, length))
        return found.data[: max(0, length)], found.etag

    def write(self, key: str, data: bytes | Path, *, if_absent: bool = False, if_match: str | None = None) -> None:
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        # Some stores (Ceph 16, for example) ignore conditions on multipart uploads, but not on single PUTs.
        if if_match is not None:
            self._put_in_place(key, data, if_match)
        elif size > (_SINGLE_PUT_BYTES if if_absent else _MULTIPART_BYTES):
            self._put_parts(key, data, size, if_absent)
        else:
            self._put(key, data, {"IfNoneMatch": "*"} if if_absent else {})

    def download(self, key: str, path: Path) -> None:
        with arriving(path) as file:
            first = self._fetch(key, 0, _PART_BYTES)

            def copy(start: int) -> None:
                data = self._fetch(key, start, _PART_BYTES, first.etag).data if start else first.data
                with local_errors(path):
                    os.pwrite(file.fileno(), data, start)

            _in_parallel(copy, range(0, first.size, _PART_BYTES))
            if (written := os.fstat(file.fileno()).st_size) != first.size:
                raise UserError(f"{path} has {written} of the {first.size} bytes of {self.uri}/{key}; try again")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        base = f"{self.prefix}/" if self.prefix else ""
        unusable: list[str] = []
        more: dict[str, str] | None = {}
        while more is not None:

            def send(client: Any, attempts: Attempts, more: dict[str, str] = more) -> dict[str, Any]:
                return whole(client.list_objects_v2(Bucket=self.bucket, Prefix=base + prefix, **more), "IsTruncated")

            page = self._request("list", prefix, send)
            for entry in page.get("Contents", []):
                key = entry["Key"].removeprefix(base)
                if not entry["Key"].startswith(base + prefix) or leads_out(key):
                    unusable.append(entry["Key"])
                elif key and not key.endswith("/"):  # S3 consoles create empty objects as folders
                    yield ObjectInfo(key, entry["Size"], _etag(entry))
            more = {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else None
        if unusable:
            logger.warning("%s: left out objects with absolute names or '..': %s", self.uri, first_few(unusable))

    def info(self, key: str) -> ObjectInfo:
        found = self._fetch(key, 0, 1)
        return ObjectInfo(key, found.size, found.etag)

    def exists(self, key: str) -> bool:
        def send(client: Any, _: Attempts) -> None:  # not a HEAD, whose errors do not state a cause
            try:
                client.get_object(Bucket=self.bucket, Key=self._name(key), Range="bytes=0-0")["Body"].read()
            except ClientError as error:
                if status(error) != 416:  # an empty object has no first byte
                    raise

        try:
            self._request("read", key, send)
        except NotFound:
            return False
        return True

    def delete(self, key: str) -> None:
        self._request("delete", key, lambda client, _: client.delete_object(Bucket=self.bucket, Key=self._name(key)))

    def under(self, prefix: str) -> S3Storage:
        sub = S3Storage(self.bucket, self._name(prefix).strip("/"), self.config)
        sub._s3 = self._s3
        return sub

    def at(self, uri: str) -> Storage:
        other = open_storage(uri, self.config)
        if isinstance(other, S3Storage):
            other._s3 = self._s3
        return other

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{check_key(self.uri, key)}" if self.prefix else check_key(self.uri, key)

    def _fetch(self, key: str, start: int, length: int | None, etag: str = "") -> _Range:
        """Read a range of an object, or of its version with a given ETag. If the body breaks off, it is resumed."""
        address = {"Bucket": self.bucket, "Key": self._name(key)}
        stop = "" if length is None else start + length - 1
        sink = io.BytesIO()  # getvalue() does not copy

        def send(client: Any, attempts: Attempts) -> _Range:
            nonlocal etag
            if not etag:
                sink.seek(0)  # read again: without an ETag, the rest could belong to another version
                sink.truncate()
            came = sink.tell()
            condition = {"IfMatch": f'"{etag}"'} if etag else {}
            try:
                answer = client.get_object(**address, Range=f"bytes={start + came}-{stop}", **condition)
            except ClientError as error:
                if status(error) != 416:
                    raise
                if condition:
                    raise self._replaced(key) from None
                answer = client.get_object(**address)
                answer["Body"].close()
                size = answer.get("ContentLength")
                if size is None or size > start:  # unknown, or the object has changed
                    raise IncompleteReadError(actual_bytes=0, expected_bytes=1) from None
                return _Range(b"", _etag(answer), size)
            if etag and _etag(answer) != etag:
                answer["Body"].close()
                raise self._replaced(key)
            etag = _etag(answer)
            size = self._size(answer, start + came)
            wanted = (size if length is None else min(size, start + length)) - start - came
            try:
                receive(answer["Body"], wanted, sink, self.config.read_timeout)
            finally:
                if etag and sink.tell() - came >= _PROGRESS_BYTES:
                    attempts.progressed()
            return _Range(sink.getvalue(), etag, size)

        return self._request("read", key, send)

    def _size(self, answer: dict[str, Any], start: int) -> int:
        """Size of the whole object, from the response to a read that begins at `start`."""
        unit, _, rest = answer.get("ContentRange", "").partition(" ")
        extent, _, size = rest.partition("/")
        if unit == "bytes" and size.isdigit() and extent.startswith(f"{start}-"):
            return int(size)
        if not unit and not start and "ContentLength" in answer:  # the whole object, as HTTP allows
            return int(answer["ContentLength"])
        answer["Body"].close()
        raise UserError(f"the store at {self._s3.where()} does not support ranged reads; use one that does")

    def _put(self, key: str, data: bytes | Path, condition: dict[str, str]) -> None:
        writer = uuid.uuid4().hex
        options: dict[str, Any] = {**condition, "Metadata": {_WRITER: writer}} if condition else {}

        def send(client: Any, attempts: Attempts) -> None:
            try:
                with _opened(data) as body:
                    client.put_object(Bucket=self.bucket, Key=self._name(key), Body=body, **options)
            except ClientError as error:
                if not (status(error) == 412 and attempts.count and self._is_by(key, writer)):
                    raise

        self._request("write", key, send)

    def _put_in_place(self, key: str, data: bytes | Path, etag: str) -> None:
        # HTTP quotes ETags. Some stores (Ceph 16, for example) compare a PUT's condition literally.
        for condition in (f'"{etag}"', etag):
            try:
                self._put(key, data, {"IfMatch": condition})
                return
            except (AlreadyExists, NotFound):
                try:
                    if self.read_version(key, 0, 1)[1] != etag:
                        break
                except NotFound:
                    break
        raise Replaced(f"{self.uri}/{key} was changed by another process")

    def _put_parts(self, key: str, data: bytes | Path, size: int, if_absent: bool) -> None:
        address = {"Bucket": self.bucket, "Key": self._name(key)}
        part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
        writer = uuid.uuid4().hex

        def check_absent() -> None:  # some stores ignore the condition of `complete`
            if if_absent and self.exists(key):
                raise AlreadyExists(f"{self.uri}/{key} already exists")

        def create(client: Any, _: Attempts) -> str:
            answer = client.create_multipart_upload(**address, Metadata={_WRITER: writer})
            return str(whole(answer, "UploadId")["UploadId"])

        def put_part(start: int) -> dict[str, Any]:
            body = _part(data, start, part_bytes)
            number = start // part_bytes + 1

            def send(client: Any, _: Attempts) -> dict[str, Any]:
                answer = client.upload_part(**address, UploadId=upload, PartNumber=number, Body=body)
                return {"PartNumber": number, "ETag": answer["ETag"]}

            return self._request("write", key, send)

        def complete(client: Any, attempts: Attempts) -> None:
            condition = {"IfNoneMatch": "*"} if if_absent else {}
            try:
                answer = client.complete_multipart_upload(
                    **address, UploadId=upload, MultipartUpload={"Parts": parts}, **condition
                )
                whole(answer, "ETag")
            except ClientError as error:  # perhaps an earlier attempt succeeded, but its response was lost
                if not (status(error) in (404, 412) and attempts.count and self._is_by(key, writer)):
                    raise

        check_absent()
        upload = self._request("write", key, create)
        try:
            parts = _in_parallel(put_part, range(0, size, part_bytes))
            check_absent()
            self._request("write", key, complete)
        except BaseException:
            with suppress(UserError, RequestFailed):
                self._s3.request(
                    "abort a write",
                    lambda client, _: client.abort_multipart_upload(**address, UploadId=upload),
                    once=True,
                )
            raise

    def _is_by(self, key: str, writer: str) -> bool:
        """Whether an object was made by a certain write() call whose response was lost."""

        def send(client: Any, _: Attempts) -> bool:
            answer = client.get_object(Bucket=self.bucket, Key=self._name(key))
            answer["Body"].close()
            return bool(answer["Metadata"].get(_WRITER) == writer)

        try:
            return self._request("read", key, send)
        except NotFound:
            return False

    def _request(self, action: str, key: str, send: Callable[[Any, Attempts], T]) -> T:
        try:
            return self._s3.request(f"{action} {self.uri}/{key}", send)
        except RequestFailed as failed:  # not chained: boto's errors may contain secrets
            raise self._explained(failed, action, key) from None

    def _explained(self, failed: RequestFailed, action: str, key: str) -> UserError:
        """The sentence for the user about a request that failed for good."""
        error, where, address = failed.error, self._s3.where(), f"{self.uri}/{key}"
        effort = f", {failed.attempts}" if failed.attempts.count > 1 else ""
        what = cause(error) + effort
        failure = failure_of(error)
        if isinstance(error, ClientError) and failure in ("lasting", "refused"):
            return self._refusal(error, action, key)
        if isinstance(error, ClientError) and failure == "expired":
            return UserError(
                f"cannot {action} {address}: the AWS credentials have expired ({code(error)}{effort}); renew them and "
                "start again, or use credentials that renew themselves, such as an instance role"
            )
        if failure == "credentials":
            hint = only_on_driver() or _CREDENTIAL_HINT
            return UserError(f"no usable AWS credentials for {self.uri} ({what}); {hint}")
        if failure == "store":
            return UserError(
                f"cannot {action} {address} at {where}: {what}; the store is overloaded or failing: start again later, "
                "or raise s3.retry_seconds"
            )
        if failure == "connection" and self._s3.answered:
            return UserError(
                f"cannot {action} {address}: the connection to {where} failed ({what}); check the network and the "
                "server and start again, or raise s3.retry_seconds"
            )
        if failure == "connection":
            return UserError(
                f"cannot reach the S3 endpoint {where} to {action} {address} ({what}); check s3.endpoint_url, and that "
                "the server is up"
            )
        if isinstance(error, SSLError):
            return UserError(
                f"the TLS certificate of {where} is not trusted; set AWS_CA_BUNDLE to the file of its CA certificate"
            )
        if isinstance(error, ParamValidationError):
            return UserError(f"{address} is not a valid S3 address: check the bucket's name")
        return UserError(f"cannot {action} {address} at {where}: {what}")

    def _refusal(self, error: ClientError, action: str, key: str) -> UserError:
        where, address = self._s3.where(), f"{self.uri}/{key}"
        if code(error) == "NoSuchBucket":
            return UserError(f"bucket {self.bucket!r} does not exist at {where}; create it or check the name")
        if code(error) in ("NoSuchKey", "404", "NotFound"):
            return NotFound(f"{address} does not exist at {where}")
        if status(error) == 412:
            return self._replaced(key) if action == "read" else AlreadyExists(f"{address} already exists")
        if code(error) == "RequestTimeTooSkewed":
            return UserError(f"{where} rejects requests because this machine's clock is wrong; set the clock")
        if code(error) in REFUSED:
            return UserError(f"{where} rejects the AWS credentials ({code(error)}); {_CREDENTIAL_HINT}")
        if status(error) == 403:
            return (CannotRead if action == "read" else UserError)(
                f"access denied: these AWS credentials may not {action} {address} at {where}; "
                "request that permission or use other credentials"
            )
        if status(error) == 301 or code(error) in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            return UserError(f"bucket {self.bucket!r} is in another region; set s3.region")
        kind = CannotRead if action == "read" else UserError  # for example an archived object
        return kind(f"cannot {action} {address} at {where}: {cause(error)}")

    def _replaced(self, key: str) -> Replaced:
        return Replaced(f"{self.uri}/{key} was replaced while it was being read; start again when nothing writes to it")


def _etag(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


@contextmanager
def _opened(data: bytes | Path) -> Iterator[Any]:
    if isinstance(data, bytes):
        yield data
    else:
        with data.open("rb") as file:
            yield file


def _part(data: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(data, bytes):
        return data[start : start + length]
    with data.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _in_parallel(function: Callable[[int], T], starts: Iterable[int]) -> list[T]:
    """Call a function from several threads. Returns the results in order. After an error, no further call starts."""
    with ThreadPoolExecutor(_PARALLEL_PARTS, "part") as pool:
        return list(pool.map(function, starts))
