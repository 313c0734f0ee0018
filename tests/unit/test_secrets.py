"""Secrets in addresses are used and never shown or stored. Whatever a job prints is safe to look at, and an unexpected
error is one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.table import Table

from crate_ray.addresses import Address, has_secret, redact
from crate_ray.cli import parse_config, run_job
from crate_ray.config import CompareConfig, EmbedConfig, PretrainConfig, S3Config, SweepConfig, TrackingConfig
from crate_ray.errors import UserError
from crate_ray.output import GuardedStream, visible
from crate_ray.progress import console
from crate_ray.runs.mlflow_lookup import login, tracking_uri
from crate_ray.storage.interface import open_storage
from crate_ray.storage.s3_client import S3Client
from crate_ray.tracking.run_tracker import flatten

SECRET = "hunter2-9d41c7"

hosts = st.sampled_from(["localhost", "127.0.0.1", "mlflow.example.org", "[::1]"])
ports = st.sampled_from(["", ":5000"])
schemes = st.sampled_from(["http://", "https://", "postgresql://", "postgresql+psycopg://", "mysql+pymysql://", "//"])
paths = st.sampled_from(["", "/", "/mlflow", "/a/b"])
# Around the secret, characters that people write without encoding them.
passwords = st.text(st.sampled_from("@: %+!$&=x7é\\|'\""), max_size=6).flatmap(
    lambda text: st.sampled_from([SECRET + text, text + SECRET])
)
parameters = st.sampled_from(["password", "token", "access_token", "X-Amz-Signature", "sig", "api_key", "unheard-of"])
PRETRAIN = ["--data.train", "data/absent", "--training.steps", "1"]


@given(schemes, st.sampled_from(["", "user", "a.b"]), passwords, hosts, ports, paths)
@example("http://", "user", f"p@{SECRET}", "host", ":5000", "")
@example("http://", "user", f"pass word {SECRET}", "host", ":5000", "/a")
def test_an_address_as_text_has_no_password(
    scheme: str, user: str, password: str, host: str, port: str, path: str
) -> None:
    address = Address(f"{scheme}{user}:{password}@{host}{port}{path}")
    for text in (str(address), f"{address}", repr(address), json.dumps(address), yaml.safe_dump(str(address))):
        assert SECRET not in text
    assert address.endswith(f"{host}{port}{path}")
    assert address.full.count(SECRET) == 1 and address.login is not None and SECRET in address.login[1]
    assert Address(str(address)) == address  # what is stored can be read
    assert pickle.loads(pickle.dumps(address)).full == address.full  # noqa: S301
    assert SECRET not in redact(f"cannot reach {address.full}: refused")


@given(schemes, hosts, ports, paths, parameters, st.sampled_from("?&#"))
def test_an_address_as_text_has_no_secret_parameter(
    scheme: str, host: str, port: str, path: str, name: str, mark: str
) -> None:
    query = {"?": f"?{name}={SECRET}", "&": f"?timeout=5&{name}={SECRET}", "#": f"#{name}={SECRET}"}[mark]
    address = Address(f"{scheme}{host}{port}{path}{query}")
    assert address == f"{scheme}{host}{port}{path}" + ("?timeout=5" if mark == "&" else "")
    assert SECRET not in redact(f"cannot reach {address.full}")


@pytest.mark.parametrize(
    "text",
    [
        f"user:{SECRET}@host:5000",
        f"user:p@{SECRET}@host:5000/path",
        f"{SECRET}@host",
        f"host:5000?token={SECRET}",
        f"http://user:a/{SECRET}@host",
        f"http://user:{SECRET}?@host",
        f"http://user:{SECRET}#x@host/path",
    ],
)
def test_ambiguous_addresses_are_refused_without_their_secret(text: str) -> None:
    with pytest.raises(ValueError, match=r"percent-encoded|no scheme") as error:
        Address(text)
    assert SECRET not in str(error.value)
    for option in ("--tracking.uri", "--s3.endpoint-url"):
        with pytest.raises(UserError, match=r"percent-encoded|no scheme") as refused:
            parse_config(PretrainConfig, [*PRETRAIN, option, text])
        assert SECRET not in str(refused.value)
    with pytest.raises(ValidationError) as invalid:
        TrackingConfig(uri=text)
    assert SECRET not in str(invalid.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000",
        "https://mlflow.example.org/team/",
        "sqlite:////home/me@work/mlflow.db",
        "sqlite:///mlflow.db?timeout=5",
        "file:///home/me@work/runs",
        "postgresql+psycopg://mlflow@host/db?sslmode=require",
        "./mlruns",
        "/home/me@work/mlruns",
        "databricks",
        "databricks://profile",
        "nonsense",
    ],
)
def test_addresses_without_secrets_do_not_change(text: str) -> None:
    assert Address(text) == text == Address(text).full


def _settings() -> PretrainConfig:
    arguments = ["--tracking.uri", f"http://user:{SECRET}@host:5000", "--s3.endpoint-url", f"http://k:{SECRET}@s3:9000"]
    return parse_config(PretrainConfig, [*PRETRAIN, *arguments])


def test_settings_are_stored_without_secrets_and_work_with_them() -> None:
    config = _settings()
    stored = [
        config.model_dump_json(),
        json.dumps(config.model_dump(mode="json")),
        yaml.safe_dump(config.model_dump(mode="json")),
        repr(config),
        str(config.model_dump()),
        str(flatten(config.model_dump(mode="json"))),
    ]
    assert not any(SECRET in text for text in stored)
    assert tracking_uri(config.tracking).full == f"http://user:{SECRET}@host:5000"
    # A trial and a fine-tuning of a comparison get their settings by dump and validation; Ray pickles.
    for again in (PretrainConfig.model_validate(config.model_dump()), pickle.loads(pickle.dumps(config))):  # noqa: S301
        assert tracking_uri(again.tracking).full == f"http://user:{SECRET}@host:5000"
    # The next start, with the secret elsewhere, is the same run.
    assert PretrainConfig.model_validate_json(config.model_dump_json()) == config
    assert S3Client(config.s3).endpoint == "http://s3:9000"


def test_mlflow_gets_the_login_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "mine")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    assert login(Address(f"http://user:p%40{SECRET}@host:5000")) == "http://host:5000"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "user"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == f"p@{SECRET}"
    # As mlflow.set_tracking_uri does: the address comes back from the environment without the login.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert login(tracking_uri(TrackingConfig())) == "http://host:5000"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == f"p@{SECRET}"
    # Another server does not receive it.
    assert login(Address("http://other:5000")) == "http://other:5000"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "mine" and "MLFLOW_TRACKING_PASSWORD" not in os.environ
    database = Address(f"postgresql://mlflow:{SECRET}@host/db")
    assert database == "postgresql://mlflow@host/db" and login(database) == database.full


def test_an_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@host:5000")
    assert tracking_uri(TrackingConfig()) == "http://host:5000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@s3:9000")
    assert S3Client(S3Config()).endpoint == S3Client(S3Config()).where() == "http://s3:9000"
    for name, use in (
        ("MLFLOW_TRACKING_URI", lambda: tracking_uri(TrackingConfig())),
        ("AWS_ENDPOINT_URL", lambda: S3Client(S3Config()).where()),
    ):
        monkeypatch.setenv(name, f"user:{SECRET}@host")
        with pytest.raises(UserError, match=name) as error:
            use()
        assert SECRET not in str(error.value)


@pytest.mark.parametrize("scheme", ["ray://", "http://", ""])
def test_an_address_of_ray_has_no_secret(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from crate_ray.ray_cluster import start_ray

    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}user:{SECRET}@127.0.0.1:1")
    with pytest.raises(UserError, match="RAY_ADDRESS") as error:
        start_ray()
    assert SECRET not in str(error.value)


FOLDERS = [
    f"s3://AKIA:{SECRET}@bucket/runs",
    f"s3://AKIA:a/{SECRET}@bucket/runs",
    f"s3://bucket/runs?endpoint_override=http://user:{SECRET}@host",
    f"https://bucket.example.org/runs?X-Amz-Signature={SECRET}",
    f"https://user:{SECRET}@example.org/weights.pth",
]


@pytest.mark.parametrize("address", FOLDERS)
def test_folders_and_models_have_no_secrets(address: str, tmp_path: Path) -> None:
    """Settings with secrets in other places are refused, since they are stored with results."""
    base = tmp_path / "base.yaml"
    base.write_text("{}")
    refusals = [
        lambda: open_storage(address, S3Config()),
        lambda: parse_config(PretrainConfig, [*PRETRAIN, "--storage", address]),
        lambda: parse_config(PretrainConfig, [*PRETRAIN, "--init-from", f"published:{address}"]),
        lambda: PretrainConfig(data={"train": {address: 1.0}}, training={"steps": 1}),  # type: ignore[arg-type]
        lambda: parse_config(EmbedConfig, ["--model", address, "--data", "x", "--output", "y"]),
        lambda: SweepConfig(base=str(base), search={"data.train": {"choice": [address]}}),  # type: ignore[dict-item]
        lambda: SweepConfig(base=str(base), settings={"data": {"train": address}}, search={}),
        lambda: CompareConfig(base=str(base), variants={"a": {"data.train": address}}, probe={"train": "", "test": ""}),  # type: ignore[arg-type]
    ]
    for refused in refusals:
        with pytest.raises((UserError, ValidationError), match="holds a user name, a password or a token") as error:
            refused()
        assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "reference",
    ["runs/mine@500", "s3://bucket/runs/mine@best", "models:/crate-mae@champion", "runs:/0123456789abcdef@best"],
)
def test_references_with_at_are_no_secrets(reference: str) -> None:
    assert not has_secret(reference)
    message = f"MLflow at http://host:5000 cannot load {reference}: not found; see http://host:5000/#/models"
    assert redact(message) == message
    EmbedConfig(model=reference, data="s3://bucket/data", output="out")


@pytest.mark.parametrize("value", [f"http://user:{SECRET}@host", f"http://user:pass {SECRET}@host"])
def test_errors_about_settings_do_not_quote_secrets(value: str, tmp_path: Path) -> None:
    wrong = {
        "group.yaml": f"tracking: {value}",
        "broken.yaml": f"tracking:\n  uri: {value}: [\n",
        "type.yaml": f"training: {{steps: '{value}'}}",
        "name.yaml": f"name: '{value}'",
        "long.yaml": f"training: {{steps: '{'x' * 90}{value}{'x' * 190}'}}",
    }
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as error:
            parse_config(PretrainConfig, ["--config", str(tmp_path / name)])
        assert SECRET not in str(error.value), name
    for option in ("--tracking", "--tracking.url", "--training.steps", "--tracking.log-every", ""):
        with pytest.raises(UserError) as error:
            parse_config(PretrainConfig, [*PRETRAIN, *filter(None, (option, value))])
        assert SECRET not in str(error.value), option


# --- Output -----------------------------------------------------------------------------------------------------------


def _python(
    code: str, *arguments: str, stdout: int | None = subprocess.PIPE, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True,
        env=os.environ | env, timeout=60,
    )  # fmt: skip


GUARDED = "import os, sys\nfrom crate_ray.output import guard_output\nguard_output()\n"


def test_known_secrets_are_hidden_in_everything_a_process_prints() -> None:
    code = GUARDED + (
        "from crate_ray.addresses import Address\n"
        f"Address('http://user:p%40{SECRET}@host')\n"
        f"print('the password is p%40{SECRET}, or p@{SECRET}')\n"
        "print('View run at http://user:other-secret@host/#/runs', file=sys.stderr)\n"
        "import logging; logging.warning('key %s', os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        "from crate_ray.progress import console; console().print('key', os.environ['AWS_SECRET_ACCESS_KEY'])\n"
    )
    done = _python(code, AWS_SECRET_ACCESS_KEY="abc/DEF+0123456789")
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout and "the password is ***" in done.stdout
    assert "other-secret" not in done.stderr and "abc/DEF" not in done.stderr + done.stdout


NAMES = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b31m",
    "a\rb",
    "\x08\x08",
    "‮gpj",
    "[red]x[/red]",
    "[link=http://x]y[/]",
    ":smile:",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def check(out: str) -> None:
        assert not any(c in out for c in "\x1b\x07\x9b\r\x08‮")
        assert visible(name) in out

    assert visible(name).isprintable() and (not name.isprintable() or visible(name) == name)
    table = Table("name")
    table.add_row(name)
    out = console()
    out.print(table)
    check(capsys.readouterr().out)
    out.print(f"line {name}")
    check(capsys.readouterr().out)

    def fail(config: EmbedConfig) -> None:
        raise UserError(f"{name} is wrong")

    with pytest.raises(SystemExit):
        run_job(EmbedConfig, fail, ["--data", "a", "--output", "b"])
    check(capsys.readouterr().err)


def test_a_guarded_stream_keeps_colours_and_escapes_the_rest() -> None:
    under = io.StringIO()
    GuardedStream(under).write("\x1b[31mred\x1b[0m\tx\n\x1b[2J\x1b]8;;http://x\x07")
    assert under.getvalue() == "\x1b[31mred\x1b[0m\tx\n\\x1b[2J\\x1b]8;;http://x\\x07"


def test_output_never_ends_a_job() -> None:
    code = GUARDED + "print('größe → \\udce9', flush=True)\nprint('end', file=sys.stderr)"
    done = _python(code, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0 and done.stdout == "gr\\xf6\\xdfe \\u2192 \\udce9\n" and done.stderr == "end\n"
    read, write = os.pipe()
    os.close(read)
    try:
        done = _python(GUARDED + "for _ in range(9999): print('x' * 99)\nprint('end', file=sys.stderr)", stdout=write)
        assert done.returncode == 0 and done.stderr == "end\n"
    finally:
        os.close(write)
    with Path("/dev/full").open("w") as full:
        done = _python(GUARDED + "print('x', flush=True)\nprint('end', file=sys.stderr)", stdout=full.fileno())
    assert done.returncode == 0 and done.stderr.endswith("\nend\n")


def test_an_unexpected_error_is_one_sentence_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(config: EmbedConfig) -> None:
        raise ZeroDivisionError(f"cannot divide \x1b[2J http://user:{SECRET}@host\nsecond line")

    with pytest.raises(SystemExit) as exit_:
        run_job(EmbedConfig, fail, ["--data", "a", "--output", "b"])
    said = capsys.readouterr().err
    assert exit_.value.code == 70 and said.count("\n") == 1 and "Traceback" not in said
    assert (
        "failed unexpectedly (ZeroDivisionError: cannot divide \\x1b[2J http://***@host); the traceback is in" in said
    )
    (file,) = tmp_path.iterdir()
    assert str(file) in said and file.stat().st_mode & 0o77 == 0
    assert "in fail" in file.read_text() and SECRET not in file.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(SystemExit):
        run_job(EmbedConfig, fail, ["--data", "a", "--output", "b"])
    assert "the traceback could not be written" in capsys.readouterr().err


def test_the_cause_of_an_error_in_another_process_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(config: EmbedConfig) -> None:
        raise RuntimeError("a worker failed:\nTraceback (most recent call last):\n  File x\nKeyError: 'cls'\n")

    with pytest.raises(SystemExit):
        run_job(EmbedConfig, fail, ["--data", "a", "--output", "b"])
    assert "failed unexpectedly (RuntimeError: KeyError: 'cls')" in capsys.readouterr().err


def test_unexpected_errors_of_every_entry_are_caught(tmp_path: Path) -> None:
    broken = (
        "import crate_ray.jobs.configs as c\nc.example_configs = lambda: 1 / 0\nfrom crate_ray.__main__ import main\n"
    )
    done = _python(broken + "main()", "configs", TMPDIR=str(tmp_path))
    assert done.returncode == 70 and "ZeroDivisionError" in done.stderr and "Traceback" not in done.stderr


def test_mistakes_at_the_edges_are_user_errors(tmp_path: Path) -> None:
    main = "from crate_ray.__main__ import main\nmain()\n"
    for arguments, words in (
        (("configs", "digits", "--output", str(tmp_path / "absent" / "x")), "cannot write"),
        (("register", "list", "--tracking.uri", "foo://bar"), "MLflow cannot use the address foo://bar"),
    ):
        done = _python(main, *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_login_names_are_percent_decoded() -> None:
    assert Address(f"http://{quote('a:b', safe='')}:{quote('c/d@e', safe='')}@host").login == ("a:b", "c/d@e")
