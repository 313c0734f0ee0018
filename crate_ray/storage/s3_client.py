"""A boto3 client that retries requests. No other module retries them.

botocore's own retries are off, because they cover neither a body that breaks off nor renewed credentials.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import boto3.session
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    InvalidRegionError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from crate_ray.addresses import Address
from crate_ray.config import S3Config
from crate_ray.errors import UserError, address_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken"})
"""Error codes of expired credentials; renewed ones may arrive soon."""
REFUSED = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId", "UnrecognizedClientException"}
)
"""Error codes of invalid credentials. Credentials that were just rotated cause them too."""
_PASSING = frozenset(
    {
        "SlowDown", "ServiceUnavailable", "InternalError", "InternalFailure", "RequestTimeout",
        "RequestTimeoutException", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled",
        "RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded",
        "PriorRequestNotComplete", "OperationAborted", "ConditionalRequestConflict",
    }
)  # fmt: skip
_PASSING_STATUS = (429, 500, 502, 503, 504)

Failure = Literal["connection", "store", "expired", "refused", "credentials", "lasting"]
"""connection: the connection or a body broke. store: the store reports a temporary failure. expired: the credentials
have expired. refused: they are invalid. credentials: none were found. lasting: another attempt cannot succeed."""
_BROKEN_CONNECTION = (HTTPClientError, ConnectionError, HTTPError, IncompleteReadError, ResponseParserError)
_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    TokenRetrievalError,
    ProfileNotFound,
    ConfigParseError,
    SSOError,
)
_FAILURES = (ClientError, BotoCoreError, ResponseParserError, HTTPError)

_ENDPOINT = "s3.endpoint_url, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or endpoint_url in ~/.aws/config"
_AWS = re.compile(r"https://s3[\w.-]*\.amazonaws\.com(\.cn)?")

_DELAY = 0.1  # seconds; upper limit of the first wait; it doubles with each further wait
_LONGEST_DELAY = 20.0
_FIRST_CONTACT = 10.0  # seconds for an endpoint that has never answered: its address is probably wrong
_WARN_AFTER = 5.0
_SLOWEST = 1024  # bytes per second; a slower body counts as stalled


class Attempts:
    """Retry budget of one request: a number of attempts and of seconds without progress.

    Args:
        most: attempts without progress.
        seconds: without progress.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.count = 0
        """Number of failed attempts."""
        self._most, self._seconds = most, seconds
        self._begun = self._last_progress = time.monotonic()
        self._failed_since = 0
        self._warned = False
        self.renewed = False
        """Whether the credentials were read again because the store rejected them."""

    def progressed(self) -> None:
        """Reset the budget, because a large part of the response has arrived."""
        self._failed_since, self._last_progress = 0, time.monotonic()

    def failed(self) -> None:
        """Count a failed attempt."""
        self.count += 1
        self._failed_since += 1

    def wait(self, at_most: float | None = None) -> bool:
        """Sleep before the next attempt; returns False at once if the budget is used up.

        The last attempt is made after the full time, so every shorter outage is survived. There are always at least two
        attempts, even if the first one takes longer than that.
        """
        seconds = self._seconds if at_most is None else min(self._seconds, at_most)
        left = self._last_progress + seconds - time.monotonic()
        if self._failed_since >= self._most or seconds == 0 or (left <= 0 and self._failed_since >= 2):
            return False
        delay = random.uniform(0, min(_LONGEST_DELAY, _DELAY * 2 ** min(self._failed_since - 1, 30)))
        time.sleep(max(0.0, min(delay, left)))
        return True

    def warn(self, what: str, error: Exception) -> None:
        """Log a warning, once, if a request has been failing for a while."""
        if not self._warned and time.monotonic() - self._last_progress > _WARN_AFTER:
            self._warned = True
            logger.warning("cannot %s yet: %s, %s; retrying", what, cause(error), self)

    def __str__(self) -> str:
        plural = "s" if self.count != 1 else ""
        return f"{self.count} attempt{plural} in {time.monotonic() - self._begun:.0f} s"


class RequestFailed(Exception):  # noqa: N818 - s3.py turns it into a UserError
    """A request failed for good: its last error, and the attempts that were made."""

    def __init__(self, error: Exception, attempts: Attempts) -> None:
        super().__init__(cause(error))
        self.error, self.attempts = error, attempts


class _Login(NamedTuple):
    client: Any
    keys: Any  # access key, secret key and token when the client was created


class _Session(NamedTuple):
    core: Any  # botocore's, which knows ~/.aws/config
    boto: boto3.session.Session


class S3Client:
    """Connection to one endpoint, opened at the first request. Safe to use from several threads."""

    def __init__(self, config: S3Config) -> None:
        self.config = config
        self._login: _Login | None = None
        self._lock = threading.Lock()
        self.answered = False
        """Whether the endpoint has ever sent a valid S3 response."""

    def __repr__(self) -> str:
        return f"S3Client({self.where()})"

    def request(self, what: str, send: Callable[[Any, Attempts], T], *, once: bool = False) -> T:
        """Send a request, retrying after temporary failures until the budget is used up.

        Args:
            what: the request in words, such as 'read s3://...', for the log.
            send: called with a boto3 client and the attempts, to which it may report progress. Returns the result.
            once: do not retry.

        Raises:
            RequestFailed: the budget is used up, or the failure is not temporary.
            UserError: the endpoint or region is not valid.
        """
        attempts = Attempts(1 if once else self.config.max_attempts, self.config.retry_seconds)
        login = None
        while True:
            try:
                login = self._logged_in()
                return send(login.client, attempts)
            except _FAILURES as error:
                attempts.failed()
                if isinstance(error, ClientError) and not code(error).isdigit():  # a code that S3 itself sent
                    self.answered = True
                if not self._wait(error, login, attempts):
                    raise RequestFailed(error, attempts) from None
                attempts.warn(what, error)

    def _wait(self, error: Exception, login: _Login | None, attempts: Attempts) -> bool:
        """Wait before another attempt; returns False if another attempt is pointless."""
        failure = failure_of(error)
        if failure in ("connection", "store"):
            return attempts.wait(None if self.answered else _FIRST_CONTACT)
        if failure == "expired":
            if not attempts.wait():
                return False
            self._renew(login)
            return True
        if failure == "credentials":  # perhaps a file is being rewritten, or a metadata service is slow
            return self.answered and attempts.wait()
        if failure == "refused" and not attempts.renewed:
            attempts.renewed = True
            return self._renew(login) and attempts.wait()
        return False

    @property
    def endpoint(self) -> str:
        """Address of the endpoint, from the settings, the environment or ~/.aws/config; else that of AWS."""
        return Address(self._logged_in().client.meta.endpoint_url)

    def where(self) -> str:
        """The endpoint for messages: an address, or AWS."""
        try:
            endpoint = self.endpoint
        except _FAILURES:  # there is no such profile, for example
            return self.config.endpoint_url or "AWS"
        return "AWS" if _AWS.fullmatch(endpoint) else endpoint

    def _logged_in(self) -> _Login:
        with self._lock:
            if self._login is None:
                self._login = self._log_in(_new_session())
            return self._login

    def _renew(self, used: _Login | None) -> bool:
        """Read the credentials again, unless another thread has done so. Returns whether they have changed.

        A boto3 session caches ~/.aws forever, so this needs a new session.
        """
        with self._lock:
            if used is None or self._login is not used:
                return True
            try:
                session = _new_session()
                keys = _keys(session.boto)
            except _FAILURES:  # of reading the file, or of the metadata service
                return False
            if keys is None or keys == used.keys:
                return False
            self._login = self._log_in(session)
            return True

    def _log_in(self, session: _Session) -> _Login:
        """A client. Endpoint, region, certificates and addressing style come from the settings, else as in boto3.

        boto3 takes them from the environment, then from the profile in ~/.aws/config. It addresses a bucket of an
        endpoint other than AWS by path, unless the profile says otherwise.
        """
        region = self.config.region or os.environ.get("AWS_REGION") or session.boto.region_name or "us-east-1"
        config = Config(
            connect_timeout=self.config.connect_timeout,
            read_timeout=self.config.read_timeout,
            retries={"mode": "standard", "total_max_attempts": 1},
            # some stores other than AWS reject the checksums that newer SDKs send
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=64,
        )

        def connect(endpoint: str | None) -> Any:
            try:
                return session.boto.client("s3", endpoint_url=endpoint, region_name=region, config=config)
            except InvalidRegionError:
                raise UserError(f"{region!r} is not a region; set s3.region or AWS_REGION") from None
            except ValueError as error:
                shown = address_of(_ENDPOINT, endpoint or str(error).removeprefix("Invalid endpoint: "))
                raise UserError(
                    f"S3 endpoint {str(shown)!r} is not a valid address; write it as http://host:port ({_ENDPOINT})"
                ) from None

        client = connect(self.config.endpoint_url)
        found = client.meta.endpoint_url
        if (endpoint := address_of(_ENDPOINT, found)) != found:  # without user name and password
            client = connect(endpoint)
        if client.meta.endpoint_url.startswith("https:"):
            _check_certificates(session.core.get_config_variable("ca_bundle"))
        client.meta.events.register("before-parse.s3", _check_length)
        client.meta.events.register("after-call.s3", self._note_answer)
        return _Login(client, _keys(session.boto))

    def _note_answer(self, http_response: Any, **_: Any) -> None:
        if http_response.status_code < 300:
            self.answered = True


def _new_session() -> _Session:
    core = botocore.session.get_session()
    return _Session(core, boto3.session.Session(botocore_session=core))


def _check_certificates(bundle: str | None) -> None:
    """Raise UserError if the file of certificates cannot be read. botocore would report a failed connection."""
    bundle = bundle or os.environ.get("REQUESTS_CA_BUNDLE")
    try:
        ssl.create_default_context(cafile=bundle)
    except OSError:
        raise UserError(
            f"the certificates in {bundle} cannot be read; check AWS_CA_BUNDLE, or ca_bundle in ~/.aws/config"
        ) from None


def _keys(session: boto3.session.Session) -> Any:
    credentials = session.get_credentials()
    return credentials and credentials.get_frozen_credentials()


def _check_length(response_dict: dict[str, Any], operation_model: Any, **_: Any) -> None:
    """Raise an error if an XML response is incomplete. botocore would accept it, and half an error can be misread."""
    body, length = response_dict["body"], response_dict["headers"].get("content-length")
    if isinstance(body, bytes) and length and operation_model.http["method"] != "HEAD" and len(body) != int(length):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(length))


def whole(answer: dict[str, Any], field: str) -> dict[str, Any]:
    """Return a response if it has a field that every complete response has. botocore accepts empty responses as valid.

    Raises:
        IncompleteReadError: the field is missing.
    """
    if field not in answer:
        raise IncompleteReadError(actual_bytes=0, expected_bytes=1)
    return answer


def receive(body: Any, wanted: int, sink: io.BytesIO, read_timeout: float) -> None:
    """Append exactly `wanted` bytes of a boto3 streaming body to the sink. After a failure, it keeps what arrived.

    Raises:
        IncompleteReadError, ReadTimeoutError, or one of urllib3's errors: the body ended early, stalled or broke off.
    """
    got = since = 0
    begun = time.monotonic()
    with body as raw:
        while got < wanted:
            piece = raw.read1(min(wanted - got, 2**20))
            if not piece:
                raise IncompleteReadError(actual_bytes=got, expected_bytes=wanted)
            sink.write(piece)
            got += len(piece)
            now = time.monotonic()
            if now - begun > read_timeout:  # the socket's own timeout only notices a body that sends nothing
                if got - since < _SLOWEST * read_timeout and got < wanted:
                    raise ReadTimeoutError(endpoint_url="")
                begun, since = now, got


def code(error: ClientError) -> str:
    """Return S3's error code."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def status(error: ClientError) -> int:
    """Return the HTTP status, 0 if there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def cause(error: Exception) -> str:
    """Describe an error in a few words, without content of the request."""
    if isinstance(error, ClientError):
        return f"{code(error)} (HTTP {status(error)})"
    return type(error).__name__


def failure_of(error: Exception) -> Failure:
    """Classify an error."""
    if isinstance(error, ClientError):
        if code(error) in EXPIRED:
            return "expired"
        if code(error) in _PASSING or status(error) in _PASSING_STATUS:
            return "store"
        return "refused" if code(error) in REFUSED or status(error) == 403 else "lasting"
    if isinstance(error, _NO_CREDENTIALS):
        return "credentials"
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "lasting"
    return "connection" if isinstance(error, _BROKEN_CONNECTION) else "lasting"
