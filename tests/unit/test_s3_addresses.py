"""Where requests to S3 go, and how: endpoint, profile, region, certificates and addressing come from the settings, the
environment or ~/.aws/config, alike for every client that the project makes."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from crate_ray.config import S3Config
from crate_ray.errors import UserError
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.s3 import S3Storage

ROOT = Path(__file__).parents[2]


@dataclass
class Recorder:
    """A server that answers every read with the same bytes, and notes who asked where."""

    port: int
    seen: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Host, path (of a list with its prefix), access key and region of each request."""

    def at(self, host: str = "127.0.0.1", scheme: str = "http") -> str:
        """Its address."""
        return f"{scheme}://{host}:{self.port}"


@pytest.fixture
def server() -> Iterator[Recorder]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            signed = re.search(r"Credential=([^/]+)/\d+/([^/]+)/", self.headers.get("Authorization", ""))
            assert signed
            host = self.headers["Host"].partition(":")[0]
            address = urlsplit(self.path)
            listed = "".join(f"/{prefix}" for prefix in parse_qs(address.query).get("prefix", []))
            recorder.seen.append((host, address.path + listed, signed[1], signed[2]))
            self.send_response(206)
            for name, value in (("Content-Length", "4"), ("Content-Range", "bytes 0-3/4"), ("ETag", '"e"')):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorder = Recorder(http.server_port)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield recorder
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Without any AWS variable of this machine. Returns what writes ~/.aws/config."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = mine\naws_secret_access_key = secret\n")
    return lambda text: (tmp_path / "config").write_text(text) and None


def clients(config: S3Config) -> list[Storage]:
    """A storage by each way to one that the project has."""
    first = open_storage("s3://bucket/data", config)
    local = open_storage("/", config)
    return [
        first, first.under("a"), first.at("s3://bucket/other"), local.at("s3://bucket/data"),
        pickle.loads(pickle.dumps(first)),  # noqa: S301
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "[default]\nendpoint_url = {}\n",
        "[default]\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = {}\n",
        "[default]\nendpoint_url = http://127.0.0.1:9\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = {}\n",
    ],
)
def test_an_endpoint_in_the_profile_is_the_endpoint_of_all(
    server: Recorder, profile: Callable[[str], None], text: str
) -> None:
    profile(text.format(server.at()))
    for storage in clients(S3Config(retry_seconds=0)):
        assert storage.read("key") == b"here"
        assert server.seen.pop() == ("127.0.0.1", f"{storage.uri[4:]}/key".replace("//", "/"), "mine", "us-east-1")
        assert isinstance(storage, S3Storage) and storage._s3.where() == server.at()


def test_settings_win_over_the_environment_and_that_over_the_profile(
    server: Recorder, profile: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9"
    profile(f"[default]\nendpoint_url = {nowhere}\nregion = of-profile\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.at())
    monkeypatch.setenv("AWS_REGION", "of-environment")
    open_storage("s3://bucket", S3Config(retry_seconds=0)).read("key")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", nowhere)
    config = S3Config(retry_seconds=0, endpoint_url=server.at(), region="of-settings")
    open_storage("s3://bucket", config).read("key")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name)
    open_storage("s3://bucket", S3Config(retry_seconds=0, endpoint_url=server.at())).read("key")
    assert [region for *_, region in server.seen] == ["of-environment", "of-settings", "of-profile"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.at())
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    ignoring = open_storage("s3://bucket", S3Config())
    assert isinstance(ignoring, S3Storage) and ignoring._s3.where() == "AWS"


def test_another_profile_has_its_own_endpoint_keys_and_region(
    server: Recorder, profile: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_program = tmp_path / "keys.sh"
    key_program.write_text(
        '#!/bin/sh\necho \'{"Version": 1, "AccessKeyId": "of-program", "SecretAccessKey": "secret"}\'\n'
    )
    key_program.chmod(0o700)
    profile(f"[profile other]\nendpoint_url = {server.at()}\nregion = eu-1\ncredential_process = {key_program}\n")
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert open_storage("s3://bucket", S3Config(retry_seconds=0)).read("key") == b"here"
    assert server.seen == [("127.0.0.1", "/bucket/key", "of-program", "eu-1")]
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(UserError, match="no usable AWS credentials for s3://bucket .*profile"):
        open_storage("s3://bucket", S3Config()).read("key")


def test_the_profile_may_ask_for_virtual_addresses(
    server: Recorder, profile: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.at())  # so that no name has to be resolved
    for style, seen in (
        ("", ("store.example", "/bucket/key")),
        ("s3 =\n  addressing_style = path\n", ("store.example", "/bucket/key")),
        ("s3 =\n  addressing_style = virtual\n", ("bucket.store.example", "/key")),
    ):
        profile(f"[default]\nendpoint_url = http://store.example\n{style}")
        assert open_storage("s3://bucket", S3Config(retry_seconds=0)).read("key") == b"here"
        assert server.seen.pop()[:2] == seen


@pytest.mark.parametrize("source", ["environment", "profile"])
def test_a_bundle_of_certificates_that_cannot_be_read_is_named(
    server: Recorder, profile: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    bundle = tmp_path / "ca.pem"
    text = f"[default]\nendpoint_url = {server.at(scheme='https')}\n"
    if source == "environment":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    profile(text if source == "environment" else f"{text}ca_bundle = {bundle}\n")
    for content in (None, "no certificate"):
        if content:
            bundle.write_text(content)
        with pytest.raises(UserError, match=r"certificates in .*/ca\.pem cannot be read; check AWS_CA_BUNDLE"):
            open_storage("s3://bucket", S3Config()).read("key")


def test_a_wrong_endpoint_in_the_profile_is_one_sentence(profile: Callable[[str], None]) -> None:
    for text, words in (
        ("[default]\nendpoint_url = localhost:9000\n", "'localhost:9000' is not a valid address; .*~/.aws/config"),
        ("[default]\nendpoint_url = http://u:pass-word@h/a@b\n", r"~/.aws/config: 'http://\*\*\*@"),
        ("[default\n", "no usable AWS credentials .*ConfigParseError"),
    ):
        profile(text)
        with pytest.raises(UserError, match=words) as error:
            open_storage("s3://bucket", S3Config(retry_seconds=0)).read("key")
        assert "pass-word" not in str(error.value)


JOBS = {
    "prepare": ["--output", "s3://bucket/prepare"],
    "pretrain": ["--data.train", "s3://bucket/pretrain", "--training.steps", "1"],
    "embed": ["--model", "s3://bucket/embed", "--data", "s3://bucket/x", "--output", "s3://bucket/y"],
    "sweep": ["--base", "base.yaml", "--search", "{optim.lr: {uniform: [1, 2]}}"],
    "evaluate": ["--model", "s3://bucket/evaluate", "--data", "s3://bucket/x"],
}
RUN = """
import sys
from importlib import import_module

for job, arguments in {}.items():
    sys.argv = [job, *arguments, "--s3.retry-seconds", "0"]
    try:
        import_module(f"crate_ray.jobs.{{job}}").run()
    except SystemExit as end:
        print(job, end.code)
"""


@pytest.mark.slow
def test_every_job_asks_the_endpoint_of_the_profile(
    server: Recorder, profile: Callable[[str], None], tmp_path: Path
) -> None:
    """Each job reads its data first, and fails, because that is no manifest."""
    profile(f"[default]\nendpoint_url = {server.at()}\n")
    (tmp_path / "base.yaml").write_text("data: {train: s3://bucket/sweep, validation: x}\ntraining.steps: 1\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(JOBS)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{job} 2" for job in JOBS], done.stderr
    asked = {path for _, path, *_ in server.seen}
    for job in JOBS:
        assert any(path.startswith(f"/bucket/{job}") for path in asked), job
