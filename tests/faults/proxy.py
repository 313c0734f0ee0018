"""A reverse proxy in front of S3 that injects planned faults of networks and busy stores, and counts requests.

with FaultProxy("http://127.0.0.1:7480") as proxy:
    proxy.plan(ErrorAnswer("SlowDown", 503), times=3)                      # the next three requests
    proxy.plan(Reset(after=10_000), key="train-", probability=0.1, seed=1) # every tenth GET of such a key, for ever
    open_storage("s3://bucket/prefix", S3Config(endpoint_url=proxy.url)).read("key")
    assert proxy.faults["bucket/prefix/key"] == 3
"""

from __future__ import annotations

import fcntl
import http.client
import io
import random
import re
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

_PIECE = 2**16


@dataclass(frozen=True)
class ErrorAnswer:
    """An S3 error document instead of the answer; the store does not see the request."""

    code: str = "SlowDown"
    status: int = 503


@dataclass(frozen=True)
class Reset:
    """The connection is reset (RST) after `after` bytes of the body, or before the answer's first line if it is None.

    With `forward`, the store handles the request, and only its answer is lost. Otherwise it does not get the request.
    """

    after: int | None = None
    forward: bool = True


@dataclass(frozen=True)
class Stall:
    """After `after` bytes of the body (None: before the answer's first line), send nothing for a time, then close."""

    seconds: float
    after: int | None = None


@dataclass(frozen=True)
class Truncate:
    """The body ends after `after` bytes.

    'closed': the announced length is right, but the connection closes early. 'short': the announced length is that of
    the shorter body. 'chunked': a valid chunked answer without a length. 'chunk': chunked, closed within a chunk.
    """

    after: int
    how: Literal["closed", "short", "chunked", "chunk"] = "closed"


@dataclass(frozen=True)
class Flip:
    """Inverts all bits of one byte of the body. A negative position counts from the end."""

    at: int = 0


@dataclass(frozen=True)
class Trickle:
    """Sends the body at a number of bytes per second."""

    rate: float


@dataclass(frozen=True)
class Pass:
    """No fault. In a plan, it lets a request succeed."""


Fault = ErrorAnswer | Reset | Stall | Truncate | Flip | Trickle | Pass


@dataclass
class Exchange:
    """One request and its result."""

    method: str
    key: str
    """bucket/key, decoded."""
    query: str
    headers: dict[str, str]
    """Headers of the request, with names in lower case."""
    fault: Fault | None = None
    status: int = 0
    """Status of the answer; 0 if there was none."""
    sent: int = 0
    """Bytes of the body that were sent to the client."""

    @property
    def access_key(self) -> str:
        """Access key that the request was signed with; empty for unsigned requests."""
        found = re.search(r"Credential=([^/]+)/", self.headers.get("authorization", ""))
        return found[1] if found else ""


@dataclass
class Rule:
    """A planned fault. `struck` counts the requests that it has hit."""

    fault: Fault
    method: str | None
    key: str
    times: int | None
    skip: int
    probability: float
    seed: int
    when: Callable[[Exchange], bool] | None
    then: Callable[[], object] | None
    struck: int = 0
    _seen: Counter[tuple[str, ...]] = field(default_factory=Counter, init=False)

    def strikes(self, exchange: Exchange) -> bool:
        """Whether the rule hits this request."""
        if self.times is not None and self.struck >= self.times:
            return False
        if (self.method and self.method != exchange.method) or self.key not in exchange.key:
            return False
        if self.when and not self.when(exchange):
            return False
        if self.skip:
            self.skip -= 1
            return False
        # The random number depends only on the request and its count, so races of threads do not change the result.
        request = (exchange.method, exchange.key, exchange.query, exchange.headers.get("range", ""))
        self._seen[request] += 1
        if random.Random(repr((self.seed, request, self._seen[request]))).random() >= self.probability:
            return False
        self.struck += 1
        return True


class FaultProxy:
    """Serves `url` on a loopback port until the block ends, and forwards requests to an upstream address.

    The Host header reaches the store as the client signed it. Without a plan, all requests are forwarded unchanged.
    With a certificate (and its key, in one PEM file), clients connect with TLS.
    """

    def __init__(self, upstream: str, port: int = 0, certificate: Path | None = None) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._closing = threading.Event()
        self.exchanges: list[Exchange] = []
        """Every request since the start or the last clear(), in the order of arrival."""
        self.connections = 0
        """Connections that clients made since the start."""
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self  # type: ignore[attr-defined]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(  # the handshake is for the connection's own thread
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._server.server_port}"
        """Address of the proxy."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def plan(
        self,
        fault: Fault,
        *,
        method: str | None = "GET",
        key: str = "",
        times: int | None = None,
        skip: int = 0,
        probability: float = 1.0,
        seed: int = 0,
        when: Callable[[Exchange], bool] | None = None,
        then: Callable[[], object] | None = None,
    ) -> Rule:
        """Add a fault for requests of a method (None: any) whose bucket/key contains `key` and for which when() holds.

        The first rule that hits a request is applied. A rule lets the first `skip` such requests pass. Then it hits
        each with this probability, at most `times` times (None: no limit). then() is called when it hits: for Reset,
        Stall and Truncate after the bytes that are still sent, for the others before the answer.
        """
        rule = Rule(fault, method, key, times, skip, probability, seed, when, then)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget the plan and the exchanges so far."""
        with self._lock:
            self._rules.clear()
            self.exchanges = []

    @property
    def requests(self) -> Counter[str]:
        """Requests by bucket/key."""
        return Counter(exchange.key for exchange in list(self.exchanges))

    @property
    def faults(self) -> Counter[str]:
        """Faults by bucket/key."""
        return Counter(e.key for e in list(self.exchanges) if e.fault is not None and e.fault != Pass())

    @property
    def sent(self) -> Counter[str]:
        """Bytes of body that clients were sent, by bucket/key."""
        total: Counter[str] = Counter()
        for exchange in list(self.exchanges):
            total[exchange.key] += exchange.sent
        return total

    def arrived(self, exchange: Exchange) -> Rule | None:
        """Record a request; the rule that takes it."""
        with self._lock:
            self.exchanges.append(exchange)
            rule = next((rule for rule in self._rules if rule.strikes(exchange)), None)
            exchange.fault = rule.fault if rule else None
            return rule

    def connected(self) -> None:
        """Count a client's connection."""
        with self._lock:
            self.connections += 1

    def wait(self, seconds: float) -> None:
        """Sleep, but not longer than the proxy lives."""
        self._closing.wait(seconds)

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the store."""
        return http.client.HTTPConnection(*self._upstream, timeout=60)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        request.close()  # without shutdown(), whose FIN would come before a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # else a client that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.proxy.connected()  # type: ignore[attr-defined]

    def do(self) -> None:
        proxy: FaultProxy = self.server.proxy  # type: ignore[attr-defined]
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        exchange = Exchange(self.command, unquote(path).lstrip("/"), query, headers)
        rule = proxy.arrived(exchange)
        fault = rule.fault if rule else Pass()
        struck = (rule and rule.then) or (lambda: None)
        try:
            if isinstance(fault, ErrorAnswer):
                self._drain()
                struck()
                self._answer_error(fault, exchange)
            elif isinstance(fault, Reset) and not fault.forward:
                struck()
                self._reset()
            else:
                self._forward(proxy, fault, struck, exchange)
        except OSError:  # the client has gone, as it should when it waits no longer
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = do  # noqa: N815 - names that http.server looks for

    def _forward(self, proxy: FaultProxy, fault: Fault, struck: Callable[[], object], exchange: Exchange) -> None:
        upstream = proxy.connect()
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.putheader("Connection", "close")
            upstream.endheaders()
            for piece in self._pieces():
                upstream.send(piece)
            answer = upstream.getresponse()
            if isinstance(fault, Reset | Stall) and fault.after is None:
                answer.read()
                struck()
                if isinstance(fault, Stall):
                    proxy.wait(fault.seconds)
                self._reset()
                return
            self._pass_on(proxy, answer, fault, struck, exchange)
        finally:
            upstream.close()

    def _pass_on(
        self,
        proxy: FaultProxy,
        answer: http.client.HTTPResponse,
        fault: Fault,
        struck: Callable[[], object],
        exchange: Exchange,
    ) -> None:
        body: Any = answer
        length = answer.length
        if length is None:  # chunked
            content = answer.read()
            length, body = len(content), io.BytesIO(content)
        bodiless = self.command == "HEAD" or answer.status in (204, 304)
        announced = int(answer.headers.get("Content-Length") or length)
        after = length
        if isinstance(fault, Reset | Stall | Truncate) and fault.after is not None:
            after = min(length, fault.after)
        how = fault.how if isinstance(fault, Truncate) else "closed"
        chunked = how in ("chunked", "chunk") and not bodiless

        exchange.status = answer.status
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif answer.status != 204:
            self.send_header("Content-Length", str(after if how == "short" and not bodiless else announced))
        self.end_headers()
        if bodiless:
            return
        if isinstance(fault, Flip | Trickle):
            struck()
        if chunked and after:
            # of a chunk that is cut, the announced size is larger than what comes
            self.wfile.write(f"{after + (how == 'chunk'):x}\r\n".encode())
        place = fault.at % length if isinstance(fault, Flip) and length else None
        begun = time.monotonic()
        while exchange.sent < after:
            piece = bytearray(body.read(min(_PIECE, after - exchange.sent)))
            if not piece:
                raise ConnectionError
            if place is not None and 0 <= place - exchange.sent < len(piece):
                piece[place - exchange.sent] ^= 0xFF
            if isinstance(fault, Trickle):
                for i in range(len(piece)):
                    exchange.sent += 1
                    self.wfile.write(piece[i : i + 1])
                    proxy.wait(begun + exchange.sent / fault.rate - time.monotonic())
            else:
                exchange.sent += len(piece)  # before it arrives, for whoever compares then
                self.wfile.write(piece)
        if isinstance(fault, Reset | Stall | Truncate):
            struck()
        if isinstance(fault, Reset):
            self._reset()
        elif isinstance(fault, Stall):
            proxy.wait(fault.seconds)
            self.close_connection = True
        elif how == "chunked":
            self.wfile.write(b"\r\n0\r\n\r\n" if after else b"0\r\n\r\n")
        elif isinstance(fault, Truncate) and how != "short":
            self.close_connection = True

    def _answer_error(self, fault: ErrorAnswer, exchange: Exchange) -> None:
        document = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f"<Error><Code>{fault.code}</Code><Message>by plan</Message><RequestId>0</RequestId></Error>"
        ).encode()
        exchange.status = fault.status
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(document)))
        self.end_headers()
        if self.command != "HEAD":
            exchange.sent = len(document)
            self.wfile.write(document)

    def _drain(self) -> None:
        for _ in self._pieces():
            pass

    def _pieces(self) -> Iterator[bytes]:
        """The request's body as it comes over the wire, of one length or in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            size = 1
            while size:
                if not (line := self.rfile.readline()):
                    raise ConnectionError
                size = int(line.split(b";")[0], 16)
                yield line + self._exactly(size + 2)  # and the end of its line
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            yield self._exactly(min(left, _PIECE))
            left -= min(left, _PIECE)

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError
        return data

    def _reset(self) -> None:
        """Close with RST; what was sent arrives first, so that a plan's byte counts hold."""
        end = time.monotonic() + 5
        while time.monotonic() < end:
            waiting = struct.unpack("i", fcntl.ioctl(self.connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
            if not waiting:
                break
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
