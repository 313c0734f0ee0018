"""Storage on a real S3 server behind a proxy that injects faults: temporary faults are survived, lasting ones are
reported."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Timer
from typing import Any

import boto3.session
import numpy as np
import pytest
from botocore.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crate_ray.config import S3Config
from crate_ray.errors import UserError
from crate_ray.storage import s3, s3_client
from crate_ray.storage.interface import AlreadyExists, NotFound, Replaced, Storage, open_storage
from tests.faults.proxy import ErrorAnswer, Exchange, Fault, FaultProxy, Flip, Pass, Reset, Stall, Trickle, Truncate
from tests.s3_gateway import S3Gateway

BUCKET = "faults"
KEY = "folder/key"
PATH = f"{BUCKET}/{KEY}"
CONTENT = np.random.default_rng(0).bytes(700_000)
QUICK = {"connect_timeout": 1.0, "read_timeout": 0.4, "retry_seconds": 20.0}


@pytest.fixture(scope="module")
def client(s3_gateway: S3Gateway) -> Any:
    """A client past the proxy: what other programs do."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=s3_gateway.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3_gateway.access_key,
        aws_secret_access_key=s3_gateway.secret_key,
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture(autouse=True)
def surroundings(s3_gateway: S3Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in s3_gateway.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(s3_gateway: S3Gateway, client: Any) -> Iterator[FaultProxy]:
    client.put_object(Bucket=BUCKET, Key=KEY, Body=CONTENT)
    with FaultProxy(s3_gateway.endpoint) as proxy:
        yield proxy


def quick(proxy: FaultProxy, **changes: Any) -> S3Config:
    return S3Config(endpoint_url=proxy.url, **{**QUICK, **changes})


def reach(proxy: FaultProxy, **changes: Any) -> Storage:
    return open_storage(f"s3://{BUCKET}", quick(proxy, **changes))


# --- Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        (ErrorAnswer("SlowDown", 503), 3),
        (ErrorAnswer("InternalError", 500), 2),
        (ErrorAnswer("RequestTimeout", 400), 2),
        (ErrorAnswer("ThrottlingException", 400), 1),
        (Reset(), 2),
        (Reset(forward=False), 2),
        (Stall(2), 1),
        (Truncate(0, "closed"), 2),
        (Truncate(0, "chunked"), 2),
    ],
    ids=str,
)
def test_request_that_fails_is_sent_again(proxy: FaultProxy, fault: Fault, times: int) -> None:
    rule = proxy.plan(fault, times=times)
    assert reach(proxy).read(KEY) == CONTENT
    assert rule.struck == times == proxy.faults[PATH]
    assert proxy.requests[PATH] == times + 1


@pytest.mark.parametrize(
    "fault",
    [
        Reset(300_000),
        Stall(2, 300_000),
        Truncate(300_000, "closed"),
        Truncate(300_000, "short"),
        Truncate(300_000, "chunked"),
        Truncate(300_000, "chunk"),
    ],
    ids=str,
)
def test_body_that_stops_is_continued_from_its_last_byte(proxy: FaultProxy, fault: Fault) -> None:
    proxy.plan(fault, times=1)
    data, etag = reach(proxy).read_version(KEY, 1000, 600_000)
    assert data == CONTENT[1000:601_000]
    assert proxy.sent[PATH] == 600_000  # no byte twice
    first, second = proxy.exchanges
    assert first.headers["range"] == "bytes=1000-600999"
    assert second.headers["range"] == "bytes=301000-600999"
    assert second.headers["if-match"].strip('"') == etag


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the loopback address and its key, in one file."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-keyout", str(path), "-out", "-", *subject]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    path.write_text(path.read_text() + made.stdout)
    return path


def test_faults_under_tls(
    s3_gateway: S3Gateway, client: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put_object(Bucket=BUCKET, Key=KEY, Body=CONTENT)
    with FaultProxy(s3_gateway.endpoint, certificate=certificate) as proxy:
        begun = time.monotonic()
        with pytest.raises(UserError, match=f"the TLS certificate of {proxy.url} is not trusted; set AWS_CA_BUNDLE"):
            reach(proxy).read(KEY)
        assert time.monotonic() - begun < 2
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        store = reach(proxy)
        for fault in (Reset(), Reset(300_000), Truncate(300_000), Truncate(300_000, "chunk"), Stall(2, 300_000)):
            proxy.clear()
            proxy.plan(fault, times=1)
            assert store.read(KEY) == CONTENT
            assert proxy.sent[PATH] == len(CONTENT)


def test_body_that_trickles_is_given_up(proxy: FaultProxy) -> None:
    proxy.plan(Trickle(100), times=1)
    begun = time.monotonic()
    assert reach(proxy).read(KEY) == CONTENT
    assert time.monotonic() - begun < 4  # at that rate, two hours


def test_connection_is_used_again(proxy: FaultProxy) -> None:
    store = reach(proxy)
    for start in range(0, 700_000, 50_000):
        assert store.read(KEY, start, 50_000) == CONTENT[start : start + 50_000]
    assert proxy.connections < 5  # of 14 reads; one that the machine holds up for too long is made anew


def test_bytes_changed_in_flight_arrive_so(proxy: FaultProxy) -> None:
    """The storage does not detect this. Readers compare digests; tests with this proxy rely on that."""
    proxy.plan(Flip(-1), times=1)
    store = reach(proxy)
    data, etag = store.read_version(KEY, 0, 1000)
    assert data == CONTENT[:999] + bytes([CONTENT[999] ^ 0xFF])
    assert store.read_version(KEY, 0, 1000) == (CONTENT[:1000], etag)


@pytest.fixture(scope="module")
def no_delay() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_client, "_DELAY", 0.002)
        yield


@pytest.fixture
def store(proxy: FaultProxy) -> Storage:
    return reach(proxy, max_attempts=10)


PLACES = st.integers(0, 200_000)
FAULTS: st.SearchStrategy[Fault] = st.one_of(
    st.sampled_from([ErrorAnswer("SlowDown", 503), ErrorAnswer("InternalError", 500), Reset(), Pass()]),
    PLACES.map(Reset),
    st.builds(Truncate, PLACES, st.sampled_from(["closed", "short", "chunked", "chunk"])),
)


@given(
    faults=st.lists(FAULTS, max_size=8),
    start=st.integers(0, 700_001),
    length=st.none() | st.integers(0, 300_000),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_faults_within_the_budget_change_nothing(
    proxy: FaultProxy, store: Storage, no_delay: None, faults: list[Fault], start: int, length: int | None
) -> None:
    proxy.clear()
    for fault in faults:
        proxy.plan(fault, times=1)
    end = len(CONTENT) if length is None else start + length
    assert store.read(KEY, start, length) == CONTENT[start:end]
    if length:
        assert store.read_version(KEY, start, length)[0] == CONTENT[start:end]


def test_progress_restores_the_budget_but_a_little_does_not(proxy: FaultProxy) -> None:
    proxy.plan(Reset(100_000))
    assert reach(proxy, max_attempts=2).read(KEY) == CONTENT
    assert proxy.requests[PATH] == 7
    proxy.clear()
    proxy.plan(Reset(1000))
    with pytest.raises(UserError, match=r"key: the connection to \S+ failed \(ProtocolError, 5 attempts in \d s\)"):
        reach(proxy, max_attempts=5).read(KEY)


# --- Objects that change --------------------------------------------------------------------------------------------


def test_object_replaced_or_deleted_while_it_is_read(proxy: FaultProxy, client: Any, tmp_path: Path) -> None:
    store = reach(proxy)
    before = store.read_version(KEY, 0, 10)[1]
    for new in (CONTENT[::-1], b"short"):
        client.put_object(Bucket=BUCKET, Key=KEY, Body=CONTENT)
        proxy.plan(Reset(300_000), times=1, then=lambda new=new: client.put_object(Bucket=BUCKET, Key=KEY, Body=new))  # type: ignore[misc]
        with pytest.raises(Replaced, match="s3://faults/folder/key was replaced while it was being read"):
            store.read(KEY)
    assert store.read_version(KEY, 0, 10)[1] != before

    client.put_object(Bucket=BUCKET, Key=KEY, Body=CONTENT)
    proxy.plan(Reset(300_000), times=1, then=lambda: client.delete_object(Bucket=BUCKET, Key=KEY))
    with pytest.raises(NotFound):
        store.download(KEY, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
    proxy.clear()
    with pytest.raises(NotFound, match="s3://faults/folder/key does not exist"):
        store.read(KEY)
    assert proxy.requests[PATH] == 1
    assert not store.exists(KEY)


def test_error_that_is_cut_short(proxy: FaultProxy) -> None:
    proxy.plan(Truncate(20), times=1)
    with pytest.raises(UserError, match=r"bucket 'absent' does not exist at"):  # its code, not its status, says so
        open_storage("s3://absent", quick(proxy)).read(KEY)


def test_empty_object(proxy: FaultProxy, client: Any, tmp_path: Path) -> None:
    client.put_object(Bucket=BUCKET, Key=KEY, Body=b"")
    store = reach(proxy)
    etag = client.head_object(Bucket=BUCKET, Key=KEY)["ETag"].strip('"')
    assert store.read(KEY) == b""
    assert store.read_version(KEY, 0, 5) == store.read_version(KEY, 3, 0) == (b"", etag)
    assert store.exists(KEY)
    store.download(KEY, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


# --- Downloads and listings -----------------------------------------------------------------------------------------


def test_download_in_parts_under_faults(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_delay: None
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 64 * 1024)
    target = tmp_path / "copy"
    faults: list[Fault] = [ErrorAnswer(), Reset(30_000), Truncate(100, "short"), Stall(1, 50_000)]
    for seed, fault in enumerate(faults):
        proxy.plan(fault, probability=0.15, seed=seed)
    reach(proxy).download(KEY, target)
    assert target.read_bytes() == CONTENT
    assert proxy.faults[PATH] >= 3

    proxy.clear()
    proxy.plan(ErrorAnswer(), skip=4)
    with pytest.raises(UserError, match=r"cannot read .*SlowDown \(HTTP 503\), 2 attempts"):
        reach(proxy, max_attempts=2).download(KEY, target)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    with pytest.raises(UserError, match=r"cannot write .*nowhere/copy: No such file or directory"):
        reach(proxy).download(KEY, tmp_path / "nowhere/copy")


@pytest.mark.parametrize(
    "fault",
    [ErrorAnswer(), Reset(), Reset(100), Truncate(0), Truncate(200), Truncate(0, "chunked"), Truncate(200, "chunked")],
    ids=str,
)
def test_listing_is_whole(proxy: FaultProxy, client: Any, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        client.put_object(Bucket=BUCKET, Key=f"listed/{i}", Body=b"")
    proxy.plan(fault, key=BUCKET, times=2)
    assert [info.key for info in reach(proxy).list("listed/")] == [f"listed/{i}" for i in range(5)]
    assert proxy.requests[BUCKET] == 3


# --- Writing --------------------------------------------------------------------------------------------------------


def test_write_and_delete_are_sent_again(proxy: FaultProxy, client: Any, tmp_path: Path) -> None:
    store = reach(proxy)
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    contents: list[bytes | Path] = [b"bytes", file]
    for content in contents:
        for fault in (ErrorAnswer(), Reset(forward=False), Reset(), Stall(1)):
            proxy.plan(fault, method="PUT", times=1)
        store.write("written", content)
        stored = client.get_object(Bucket=BUCKET, Key="written")["Body"].read()
        assert stored == (content if isinstance(content, bytes) else CONTENT)
    proxy.plan(Reset(), method="DELETE", times=2)
    store.delete("written")
    assert not store.exists("written")
    assert sum(proxy.faults.values()) == 10


def test_own_write_whose_answer_was_lost_is_no_conflict(proxy: FaultProxy, client: Any) -> None:
    store = reach(proxy)
    proxy.plan(Reset(), method="PUT", key="own", times=1)
    store.write("own", b"content", if_absent=True)
    assert proxy.requests[f"{BUCKET}/own"] == 3  # lost, refused, and a look at whose it is
    with pytest.raises(AlreadyExists):
        store.write("own", b"content", if_absent=True)

    proxy.plan(
        Reset(forward=False),
        method="PUT",
        times=1,
        then=lambda: client.put_object(Bucket=BUCKET, Key="other", Body=b"same"),
    )
    with pytest.raises(AlreadyExists, match="s3://faults/other already exists"):
        store.write("other", b"same", if_absent=True)


def test_one_of_several_writers_wins_though_all_answers_are_lost(proxy: FaultProxy) -> None:
    proxy.plan(Reset(), method="PUT", key="once", probability=0.5, seed=4, times=6)

    def write(_: int) -> bool:
        try:
            reach(proxy).write("once", b"the same", if_absent=True)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(write, range(4))) == 1
    assert proxy.faults[f"{BUCKET}/once"] == 6


def test_large_files_are_written_in_parts(
    proxy: FaultProxy, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 * 2**20  # S3's least
    for name in ("_PART_BYTES", "_MULTIPART_BYTES", "_SINGLE_PUT_BYTES"):
        monkeypatch.setattr(s3, name, part)
    store = reach(proxy, read_timeout=2)
    file = tmp_path / "file"
    content = np.random.default_rng(1).bytes(2 * part + 12_345)
    file.write_bytes(content)

    def of(query: str) -> Callable[[Exchange], bool]:
        return lambda exchange: query in exchange.query

    faults: list[Fault] = [ErrorAnswer(), Truncate(0), Truncate(0, "chunked")]
    for fault in faults:
        proxy.plan(fault, method="POST", when=of("uploads"), times=1)
    proxy.plan(Reset(), method="PUT", when=of("partNumber=2"), times=1)
    proxy.plan(ErrorAnswer("InternalError", 500), method="PUT", when=of("partNumber=3"), times=2)
    completed = proxy.plan(Truncate(0, "chunked"), method="POST", when=of("uploadId"), times=1)
    # As AWS answers when the upload is complete; Ceph says once more that it is.
    gone = proxy.plan(ErrorAnswer("NoSuchUpload", 404), method="POST", when=of("uploadId"), times=1)
    store.write("large", file, if_absent=True)
    assert client.get_object(Bucket=BUCKET, Key="large")["Body"].read() == content
    assert completed.struck == gone.struck == 1
    proxy.clear()
    with pytest.raises(AlreadyExists):
        store.write("large", content, if_absent=True)
    assert len(proxy.exchanges) == 1  # before anything is sent
    proxy.plan(ErrorAnswer("InternalError", 500), method="POST", when=of("uploadId"), times=1)
    proxy.plan(ErrorAnswer("NoSuchUpload", 404), method="POST", when=of("uploadId"), times=1)
    with pytest.raises(UserError, match=r"cannot write s3://faults/large at .*NoSuchUpload"):
        store.write("large", content[::-1])  # what is there is not its own
    store.write("large", content[::-1])
    assert store.read("large") == content[::-1]

    proxy.plan(ErrorAnswer("InternalError", 500), method="PUT", when=of("partNumber=2"))
    with pytest.raises(UserError, match=r"cannot write s3://faults/large .*InternalError \(HTTP 500\), 2 attempts"):
        reach(proxy, max_attempts=2).write("large", file)
    refused = proxy.plan(ErrorAnswer("InternalError", 500), method="DELETE")
    with pytest.raises(UserError, match=r"InternalError \(HTTP 500\), 2 attempts"):
        reach(proxy, max_attempts=2).write("large", file)
    assert refused.struck == 1  # who has failed does not keep the user waiting to clear up
    assert store.read("large") == content[::-1]
    # Aborted, but for this one and those two whose number never arrived.
    assert len(client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])) == 3


# --- Outages and budgets --------------------------------------------------------------------------------------------


def test_retry_budget(
    proxy: FaultProxy, s3_gateway: S3Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_WARN_AFTER", 0.5)
    proxy.plan(ErrorAnswer("SlowDown", 503))
    store = reach(proxy, retry_seconds=1.5)
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        store.read(KEY)
    assert 1.5 <= time.monotonic() - begun < 2.5
    count = proxy.requests[PATH]
    assert count >= 3
    message = (
        f"cannot read s3://{BUCKET}/{KEY} at {proxy.url}: SlowDown (HTTP 503), {count} attempts in 2 s; the store is"
    )
    assert str(error.value).startswith(message)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        f"cannot read s3://{BUCKET}/{KEY} yet: SlowDown (HTTP 503)"
    ]
    for secret in s3_gateway.environment.values():
        assert secret not in str(error.value) + caplog.text + repr(store) + repr(vars(store))

    proxy.clear()
    proxy.plan(ErrorAnswer("AccessDenied", 403))
    with pytest.raises(UserError, match="access denied: these AWS credentials may not read"):
        store.read(KEY)
    assert proxy.requests[PATH] == 1


def test_endpoint_that_never_answered_is_given_up_soon(monkeypatch: pytest.MonkeyPatch, s3_gateway: S3Gateway) -> None:
    assert s3_client._FIRST_CONTACT <= 10
    monkeypatch.setattr(s3_client, "_FIRST_CONTACT", 0.5)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"cannot reach the S3 endpoint http://127.0.0.1:1 .*\d attempts in \d s\)"):
        open_storage("s3://bucket", S3Config(endpoint_url="http://127.0.0.1:1")).read("key")
    with FaultProxy(s3_gateway.endpoint) as proxy:
        proxy.plan(Stall(60))
        with pytest.raises(UserError, match=r"cannot reach .*\(ReadTimeoutError, 2 attempts in \d s\)"):
            reach(proxy, read_timeout=1).read(KEY)
    assert time.monotonic() - begun < 30  # of the 120 s that others are waited for


def test_server_that_restarts_is_waited_for(s3_gateway: S3Gateway, client: Any) -> None:
    client.put_object(Bucket=BUCKET, Key=KEY, Body=CONTENT)
    with FaultProxy(s3_gateway.endpoint) as proxy:
        store = reach(proxy)
        assert store.exists(KEY)
    port = int(proxy.url.rpartition(":")[2])
    again: list[FaultProxy] = []
    timer = Timer(1.0, lambda: again.append(FaultProxy(s3_gateway.endpoint, port).__enter__()))
    timer.start()
    try:
        assert store.read(KEY) == CONTENT
    finally:
        timer.join()
        again[0].__exit__()


# --- Credentials ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_keys(s3_gateway: S3Gateway) -> tuple[str, str]:
    return s3_gateway.new_keys()


@pytest.fixture
def key_file(tmp_path: Path, s3_gateway: S3Gateway, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that writes access key and secret key, or only the first, to the only credentials file."""
    path = tmp_path / "credentials"

    def write(*keys: str) -> None:
        names = ("aws_access_key_id", "aws_secret_access_key")
        path.write_text("[default]\n" + "".join(f"{n} = {k}\n" for n, k in zip(names, keys, strict=False)))

    for name in s3_gateway.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    write(s3_gateway.access_key, s3_gateway.secret_key)
    return write


@pytest.mark.parametrize(("code", "status"), [("ExpiredToken", 400), ("RequestExpired", 403), ("InvalidToken", 400)])
def test_expired_credentials_that_come_back(
    proxy: FaultProxy,
    s3_gateway: S3Gateway,
    other_keys: tuple[str, str],
    key_file: Callable[..., None],
    code: str,
    status: int,
) -> None:
    lock = Lock()

    def rewrite() -> None:
        with lock:
            key_file(*(other_keys if old.struck >= 3 else ["half"]))

    store = reach(proxy).under("folder")
    assert store.read("key", 0, 10) == CONTENT[:10]
    old = proxy.plan(
        ErrorAnswer(code, status),
        when=lambda exchange: exchange.access_key == s3_gateway.access_key,
        then=rewrite,
    )
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: store.read("key"), range(4))) == {CONTENT}
    keys = [exchange.access_key for exchange in proxy.exchanges]
    assert keys[0] == s3_gateway.access_key
    assert keys.count(other_keys[0]) == 4  # accepted by the server, so also signed with the new secret
    assert proxy.exchanges[-1].status == 206


def test_expired_credentials_that_stay_so(proxy: FaultProxy, key_file: Callable[..., None]) -> None:
    proxy.plan(ErrorAnswer("ExpiredToken", 400), method=None)
    message = (
        r"cannot write s3://faults/x: the AWS credentials have expired \(ExpiredToken, \d+ attempts in \d s\); renew"
    )
    with pytest.raises(UserError, match=message):
        reach(proxy, retry_seconds=2).write("x", b"")
    assert len(proxy.exchanges) >= 2


def test_wrong_credentials_fail_soon_unless_just_exchanged(
    proxy: FaultProxy, s3_gateway: S3Gateway, other_keys: tuple[str, str], key_file: Callable[..., None]
) -> None:
    wrong = "w" * 40
    key_file(s3_gateway.access_key, wrong)
    store = reach(proxy)
    with pytest.raises(UserError, match=r"rejects the AWS credentials \(SignatureDoesNotMatch\); set") as error:
        store.read(KEY)
    assert wrong not in str(error.value)
    assert proxy.requests[PATH] == 1
    key_file(*other_keys)
    assert store.read(KEY) == CONTENT
    assert proxy.requests[PATH] == 3
