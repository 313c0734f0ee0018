"""Checks what the environment says about Ray before Ray is asked, which would wait for minutes or raise a traceback."""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from crate_ray.errors import UserError, address_of

LOCAL = ("", "local")
_HOST_PORT = re.compile(r"(?:ray://)?(\[[0-9a-fA-F:.%\w]+\]|[^\s/:\[\]]+):([0-9]{1,5})")
_PATIENCE_SECONDS = 15.0  # for a head that is starting
_CONNECT_SECONDS = 5.0
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # a client's first bytes in gRPC
_SETTINGS = 4  # the type of a server's first frame, at byte 3
# What Ray puts behind its temporary folder: a session, and in it the longest name of a socket.
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_LONGEST_SOCKET = 107  # bytes, in Linux


def checked_address(environment: dict[str, str] | os._Environ[str] = os.environ) -> str:
    """The address of the cluster to use, HOST:PORT, after it has answered; 'local' or '' to start Ray here.

    Raises:
        UserError: RAY_ADDRESS is not an address of a cluster, nothing answers there, or the temporary folder of a Ray
            that starts here has a name that is too long.
    """
    given = environment.get("RAY_ADDRESS", "").strip()
    address = address_of("RAY_ADDRESS", given)
    if address != address.full:
        raise UserError(
            f"RAY_ADDRESS holds a user name, a password or a token; set it to {address}, and give Ray's token in "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS is {address}, which is for submitting: ray job submit --working-dir . -- python jobs/…; "
            "to run the job here on a Ray of its own, set RAY_ADDRESS=local"
        )
    if given in LOCAL or given == "auto":
        last = "" if given == "local" else _last_cluster(environment)
        if last and not _answers(last, patience=0.0):
            raise UserError(
                f"the Ray cluster that was started here last, {last}, does not answer; run ray stop to forget it, or "
                "set RAY_ADDRESS=local"
            )
        if not last and given in LOCAL:
            _check_temporary_folder(environment)
        return last or given
    match = _HOST_PORT.fullmatch(given)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(
            f"RAY_ADDRESS is {given!r}, which is not the address of a Ray cluster; set it to HOST:PORT of the head, "
            "such as 10.0.0.1:6379, or to local for a Ray of its own"
        )
    if not _answers(given, _PATIENCE_SECONDS):
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS {given}; check HOST:PORT and that its head runs (ray status), or "
            "set RAY_ADDRESS=local to start a Ray of its own"
        )
    return given


def refusal(address: str, cause: str) -> str:
    """A sentence about a cluster that answers, but does not let this process in."""
    if address == "auto":
        return (
            "RAY_ADDRESS is auto, and no Ray cluster runs on this machine; start one with ray start --head, or set "
            "RAY_ADDRESS=local"
        )
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "token":
        advice = (
            "give its token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or set RAY_AUTH_MODE=disabled if it was started "
            "without one"
        )
    else:
        advice = (
            "if it was started with a token, as ray start does once ~/.ray/auth_token exists, set RAY_AUTH_MODE=token; "
            "otherwise check that its Ray and Python versions are those of this machine"
        )
    return f"cannot use the Ray cluster at {address} ({cause}), though it answers; {advice}"


def _last_cluster(environment: dict[str, str] | os._Environ[str]) -> str:
    """Address that `ray start` wrote to a file on this machine, which ray.init uses; empty if there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return (_temporary_folder(environment)[1] / "ray" / "ray_current_cluster").read_text()[:300].strip()
    return ""


def _temporary_folder(environment: dict[str, str] | os._Environ[str]) -> tuple[str, Path]:
    """Ray's temporary folder, and the variable that it comes from."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if folder := environment.get(name):
            return name, Path(folder)
    return "", Path("/tmp")


def _check_temporary_folder(environment: dict[str, str] | os._Environ[str]) -> None:
    name, folder = _temporary_folder(environment)
    length = len(os.fsencode(f"{folder}{_SOCKET.format(pid=os.getpid())}"))
    if name and length > _LONGEST_SOCKET:
        raise UserError(
            f"{name} is {folder}, whose name is {length - _LONGEST_SOCKET} bytes too long for Ray's sockets; set "
            "RAY_TMPDIR to a shorter one on the node's own disk, such as /tmp"
        )


def _answers(address: str, patience: float) -> bool:
    """Whether a gRPC server answers at HOST:PORT. Tries again for `patience` seconds."""
    match = _HOST_PORT.fullmatch(address)
    if match is None:
        return False
    host, deadline = match[1].strip("[]"), time.monotonic() + patience
    while not _speaks_grpc(host, int(match[2])):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _speaks_grpc(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return True
            connection.settimeout(_CONNECT_SECONDS)
            connection.sendall(_HTTP2)
            answer = b""
            while len(answer) <= 3 and (more := connection.recv(9)):
                answer += more
            return len(answer) > 3 and answer[3] == _SETTINGS
    except OSError:
        return False
