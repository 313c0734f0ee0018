"""What the environment says about Ray is checked with one sentence, before Ray is asked."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from crate_ray import ray_address
from crate_ray.errors import UserError
from crate_ray.ray_address import checked_address, refusal
from crate_ray.ray_cluster import _private_token
from crate_ray.storage.credentials import names_here, only_on_driver
from crate_ray.storage.node_folders import spool_folder, user_name

GRPC = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # an empty SETTINGS frame of HTTP/2
HTTP = b"HTTP/1.1 400 Bad Request\r\n\r\n"


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """A server on loopback that sends an answer to each client; None for one that says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        held = []

        def serve() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        for connection in held:
            connection.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(ray_address, "_CONNECT_SECONDS", 0.3)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A temporary folder with a name that is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def check(tmp_path: Path, address: str | None = None, **more: str) -> str:
    return checked_address({"TMPDIR": str(tmp_path), **({} if address is None else {"RAY_ADDRESS": address}), **more})


@pytest.mark.parametrize(
    "address",
    ["nonsense", "127.0.0.1", "127.0.0.1:", ":6379", "host:0", "host:70000", "host:port", "a b:1", "tcp://host:6379",
     "host:6379/x", "1.2.3.4:6379,5.6.7.8:6379"],
)  # fmt: skip
def test_an_address_that_is_none_is_one_sentence(address: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^RAY_ADDRESS is '.*', which is not the address of a Ray cluster; set it to H"
    ):
        check(tmp_path, address)


@pytest.mark.parametrize("answer", [HTTP, b"", None, b"SSH-2.0-OpenSSH\r\n"])
def test_an_address_where_no_ray_answers_is_a_sentence_in_time(answer: bytes | None, tmp_path: Path) -> None:
    began = time.monotonic()
    with server(answer) as address, pytest.raises(UserError, match=f"^no Ray cluster answers at RAY_ADDRESS {address}"):
        check(tmp_path, address)
    with pytest.raises(UserError, match="^no Ray cluster answers at RAY_ADDRESS 127.0.0.1:9; check HOST:PORT"):
        check(tmp_path, "127.0.0.1:9")
    with pytest.raises(UserError, match="^no Ray cluster answers"):
        check(tmp_path, "host.invalid:6379")
    assert time.monotonic() - began < 20


def test_an_address_that_answers_is_used_without_its_spaces(tmp_path: Path) -> None:
    with server(GRPC) as address:
        assert check(tmp_path, f" {address}\n") == address
        assert check(tmp_path, f"ray://{address}") == f"ray://{address}"
    assert check(tmp_path, "local ") == "local" and check(tmp_path, "") == "" and check(tmp_path) == ""
    assert check(tmp_path, "auto ") == "auto"


def test_a_head_that_is_starting_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(ray_address, "_PATIENCE_SECONDS", 10.0)
    monkeypatch.setattr(ray_address, "_speaks_grpc", lambda host, port: next(answers))
    assert check(tmp_path, "head:6379") == "head:6379"


def test_a_cluster_that_ran_last_and_is_gone_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    last = tmp_path / "ray" / "ray_current_cluster"
    last.write_text("127.0.0.1:9\n")
    for address in (None, "auto"):
        with pytest.raises(UserError, match=r"started here last, 127\.0\.0\.1:9, does not answer; run ray stop"):
            check(tmp_path, address)
    assert check(tmp_path, "local") == "local"
    with server(GRPC) as address:
        last.write_text(address)
        assert check(tmp_path) == address


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_that_is_too_long_for_sockets_is_a_sentence(name: str, tmp_path: Path) -> None:
    long = f"/tmp/{'x' * 60}"
    with pytest.raises(UserError, match=f"^{name} is {long}, .* bytes too long for Ray's sockets; set RAY_TMPDIR"):
        checked_address({name: long})
    assert checked_address({name: long} | {"RAY_TMPDIR": "/tmp"}) in ("", "local") or name == "RAY_TMPDIR"
    with server(GRPC) as address:  # a cluster that runs has its own
        assert checked_address({name: long, "RAY_ADDRESS": address}) == address


def test_a_refusal_names_the_mode_of_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert "set RAY_AUTH_MODE=token" in refusal("h:1", "cause")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    said = refusal("h:1", "cause")
    assert "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in said and "RAY_AUTH_MODE=disabled" in said
    assert refusal("auto", "cause").startswith("RAY_ADDRESS is auto, and no Ray cluster runs on this machine")


@pytest.mark.parametrize("home", ["/proc/nohome", None])
def test_without_a_home_the_token_is_in_the_environment(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if home is None:
        _nobody(monkeypatch)
    else:
        monkeypatch.setenv("HOME", home)
    with _private_token(starts_here=False):
        assert "RAY_AUTH_TOKEN" not in os.environ
    with _private_token(starts_here=True):
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry in /etc/passwd, and without HOME."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_an_entry_has_a_number_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _nobody(monkeypatch)
    assert user_name() == str(os.getuid())
    with pytest.raises(UserError, match="HOME is not set, .* set XDG_CACHE_HOME to a folder of your own"):
        spool_folder("0" * 32)


def test_workers_are_told_the_names_of_credentials_and_no_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0123")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    passed = names_here()
    assert "AKIA" not in str(passed) and "wJal" not in str(passed)
    for name, value in passed.items():
        monkeypatch.setenv(name, value)
    assert only_on_driver() is None  # the driver itself
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert only_on_driver() == (
        f"the driver has AWS_SECRET_ACCESS_KEY, and node {socket.gethostname()} does not: set the same where Ray is "
        "started on each node, before ray start, or give the nodes a role"
    )
