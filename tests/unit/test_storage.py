"""Local folders and S3 behave alike; every failure that a user can fix gives one clear sentence."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from crate_ray.config import S3Config
from crate_ray.errors import UserError
from crate_ray.storage import s3_client
from crate_ray.storage.interface import AlreadyExists, NotFound, Replaced, Storage, open_storage

SECRET = "top-secret-key-0123456789"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, endpoint: str) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "data"), S3Config())
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    return open_storage(f"s3://bucket/{request.node.name}/", S3Config(endpoint_url=endpoint))


def test_contract(storage: Storage, endpoint: str, tmp_path: Path) -> None:
    assert list(storage.list()) == []
    file = tmp_path / "file"
    file.write_bytes(b"from a file" * 1000)
    for key in ("b", "a/2", "a-b", "a/1/x"):
        storage.write(key, key.encode())
    storage.write("a/1/file", file)

    assert storage.read("a/1/x") == b"a/1/x"
    assert storage.read("a/1/file", 5, 1) == b"a"
    assert storage.read("a/1/file", 10_995) == b" file"
    assert storage.read("a/1/file", 10_995, 100) == b" file"
    assert storage.read("b", 0, 0) == storage.read("b", 7, 7) == b""
    assert storage.read_version("a/1/file", 10_995, 100)[0] == b" file"
    assert storage.read_version("b", 7, 7) == (b"", storage.read_version("b", 0, 0)[1])
    (tmp_path / "copy").write_bytes(b"old")
    storage.download("a/1/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()

    assert [info.key for info in storage.list()] == ["a-b", "a/1/file", "a/1/x", "a/2", "b"]
    assert storage.survey() == (list(storage.list()), {}) and storage.survey("a/") == (list(storage.list("a/")), {})
    storage.write("empty", b"")
    assert [storage.info(info.key) for info in storage.list()] == list(storage.list())
    storage.delete("empty")
    for absent in ("a/1", "absent", "b/c"):
        with pytest.raises(UserError):
            storage.info(absent)
    assert [(info.key, info.size) for info in storage.list("a/1/")] == [("a/1/file", 11_000), ("a/1/x", 5)]
    assert [info.key for info in storage.list("a")] == ["a-b", "a/1/file", "a/1/x", "a/2"]
    assert [info.key for info in storage.under("a/1").list()] == ["file", "x"]
    assert storage.under("a").under("1").read("x") == b"a/1/x"
    assert storage.under("a").uri == storage.uri + "/a"
    assert open_storage(str(tmp_path), S3Config(endpoint_url=endpoint)).at(storage.uri).read("b") == b"b"
    assert storage.at(tmp_path.as_uri()).at(storage.uri).at(f"{storage.uri}/a").read("2") == b"a/2"

    (old,) = storage.list("b")
    assert storage.read_version("b", 0, 1) == (b"b", old.etag)
    storage.write("b", b"changed")
    (new,) = storage.list("b")
    assert storage.read_version("b", 0, 7) == (b"changed", new.etag)
    assert new.etag != old.etag
    assert storage.exists("b")
    storage.delete("b")
    storage.delete("b")
    assert not storage.exists("b")
    with pytest.raises(NotFound, match="b does not exist"):
        storage.read("b")
    with pytest.raises(NotFound, match="b does not exist"):
        storage.download("b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match=r"cannot write .*/nowhere/copy: No such file"):
        storage.download("a/2", tmp_path / "nowhere/copy")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file", "copy"]


def test_if_absent_lets_one_writer_win(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"9")
    contents: list[bytes | Path] = [*(str(i).encode() for i in range(7)), file]

    def write(content: bytes | Path) -> bool:
        try:
            storage.write("once", content, if_absent=True)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, contents))
    assert sum(won) == 1
    winner = contents[won.index(True)]
    assert storage.read("once") == (winner if isinstance(winner, bytes) else b"9")
    with pytest.raises(AlreadyExists, match="once already exists"):
        storage.write("once", file, if_absent=True)


def test_listing_while_objects_are_deleted(storage: Storage) -> None:
    """A run's checkpoints are listed by one process while another deletes the old ones."""
    for number in range(40):
        storage.write(f"commits/{number:03d}", b"old")
    storage.write("commits/kept", b"new")

    def delete() -> None:
        for number in range(40):
            storage.delete(f"commits/{number:03d}")

    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(delete)
        found = [[info.key for info in storage.list("commits/")]]
        while not deleting.done():
            found.append([info.key for info in storage.list("commits/")])
        deleting.result()
    assert all(keys[-1] == "commits/kept" and keys == sorted(keys) for keys in found)
    assert [info.key for info in storage.list("commits/")] == ["commits/kept"]


def test_pickled_copy_works(storage: Storage) -> None:
    storage.write("key", b"content")
    assert pickle.loads(pickle.dumps(storage)).read("key") == b"content"  # noqa: S301


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "is empty"),
        ("gs://bucket/x", "unknown scheme 'gs'; use a local folder or s3://bucket/prefix"),
        ("s3://", "names no bucket"),
        ("file://x", "is not a file address"),
    ],
)
def test_bad_addresses(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_storage(uri, S3Config())


def test_local_names_stay_inside(tmp_path: Path) -> None:
    for key in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(UserError, match="leads out of"):
            open_storage(str(tmp_path), S3Config()).read(key)


def test_missing_bucket(endpoint: str, tmp_path: Path) -> None:
    storage = open_storage("s3://absent/x", S3Config(endpoint_url=endpoint))
    file = tmp_path / "file"
    file.write_bytes(b"x")
    message = f"bucket 'absent' does not exist at {endpoint}; create it or check the name"
    actions: list[Any] = [
        lambda: storage.read("key"),
        lambda: storage.write("key", b"x"),
        lambda: storage.write("key", file),
        lambda: storage.download("key", file),
        lambda: list(storage.list()),
        lambda: storage.exists("key"),
    ]
    for action in actions:
        with pytest.raises(UserError) as error:
            action()
        assert str(error.value) == message


def test_unreachable_endpoint_and_absent_credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    config = S3Config(endpoint_url=f"http://user:{SECRET}@127.0.0.1:1", max_attempts=1)
    gone = open_storage("s3://bucket", config)
    with pytest.raises(UserError, match=r"cannot reach the S3 endpoint http://127.0.0.1:1 to read") as error:
        gone.read("key")
    assert SECRET not in str(error.value) + repr(gone) + repr(vars(gone)) + repr(config)
    with pytest.raises(UserError, match="not a valid address"):
        open_storage("s3://bucket", S3Config(endpoint_url="nonsense")).read("key")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"no usable AWS credentials for s3://bucket .*set AWS_ACCESS_KEY_ID"):
        open_storage("s3://bucket", S3Config(endpoint_url=endpoint)).read("key")


class _Answer(BaseHTTPRequestHandler):
    """Answers every GET with the next (status, error code or body, bytes to hold back) of the server's list."""

    def do_GET(self) -> None:
        status, text, held_back = self.server.answers.pop(0)  # type: ignore[attr-defined]
        body = (
            text.encode() if status < 300 else f"<Error><Code>{text}</Code><Message>{SECRET}</Message></Error>".encode()
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if text.startswith("version"):
            self.send_header("ETag", f'"{text}"')
        self.end_headers()
        self.wfile.write(body[: len(body) - held_back])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[tuple[str, list[tuple[int, str, int]]]]:
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    answers: list[tuple[int, str, int]] = []
    server.answers = answers  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access denied: these AWS credentials may not read s3://bucket/x/key"),
        (403, "SignatureDoesNotMatch", r"rejects the AWS credentials \(SignatureDoesNotMatch\); set AWS_ACCESS"),
        (403, "InvalidAccessKeyId", r"rejects the AWS credentials"),
        (400, "AuthorizationHeaderMalformed", "bucket 'bucket' is in another region; set s3.region"),
        (400, "Curious", r"cannot read s3://bucket/x/key at http://127.0.0.1:\d+: Curious \(HTTP 400\)"),
    ],
)
def test_refusals(answering: tuple[str, list[tuple[int, str, int]]], status: int, code: str, message: str) -> None:
    endpoint, answers = answering
    answers += [(status, code, 0)] * 4
    with pytest.raises(UserError, match=message) as error:
        open_storage("s3://bucket/x", S3Config(endpoint_url=endpoint, max_attempts=1)).read("key")
    assert SECRET not in str(error.value)


def test_store_without_ranges(answering: tuple[str, list[tuple[int, str, int]]]) -> None:
    endpoint, answers = answering
    answers += [(503, "SlowDown", 0), (200, "whole", 2), (200, "whole", 0), (200, "whole", 0)]
    storage = open_storage("s3://bucket", S3Config(endpoint_url=endpoint, max_attempts=3))
    assert storage.read("key") == b"whole"
    with pytest.raises(UserError, match=f"the store at {endpoint} does not support ranged reads"):
        storage.read("key", 1, 2)
    assert not answers


def test_object_replaced_on_a_store_that_ignores_conditions(answering: tuple[str, list[tuple[int, str, int]]]) -> None:
    endpoint, answers = answering
    answers += [(200, "version 1", 2), (200, "version 2", 0)]
    with pytest.raises(Replaced, match="s3://bucket/key was replaced"):
        open_storage("s3://bucket", S3Config(endpoint_url=endpoint)).read("key")


def test_a_server_that_is_no_store_fails_soon(
    answering: tuple[str, list[tuple[int, str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_FIRST_CONTACT", 0.3)
    endpoint, answers = answering
    answers += [(502, "502", 0)] * 100
    with pytest.raises(
        UserError, match=r"cannot read s3://bucket/key at .*: 502 \(HTTP 502\), \d+ attempts in \d+ s; the"
    ):
        open_storage("s3://bucket", S3Config(endpoint_url=endpoint)).read("key")


@given(
    most=st.integers(1, 60),
    seconds=st.floats(0, 600),
    durations=st.lists(st.floats(0, 40), min_size=60, max_size=60),
    draws=st.randoms(use_true_random=False),
)
def test_attempts_keep_their_budget(most: int, seconds: float, durations: list[float], draws: Random) -> None:
    now = 0.0
    begins: list[float] = []
    limits: list[float] = []

    def sleep(duration: float) -> None:
        nonlocal now
        assert duration >= 0
        now += duration

    def uniform(low: float, high: float) -> float:
        assert low == 0
        limits.append(high)
        return draws.uniform(low, high)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_client, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
        patch.setattr(s3_client, "random", SimpleNamespace(uniform=uniform))
        attempts = s3_client.Attempts(most, seconds)
        for duration in durations:
            begins.append(now)
            now += duration
            attempts.failed()
            if not attempts.wait():
                break
    assert limits == [min(20, 0.1 * 2**i) for i in range(len(begins) - 1)]
    assert attempts.count == len(begins) <= most
    assert all(begin <= seconds * 1.000001 for begin in begins[2:])
    # It did not stop before its budget was used up.
    assert len(begins) == most or now >= seconds * 0.999999
    if most > 1 and seconds > 0:
        assert len(begins) > 1
