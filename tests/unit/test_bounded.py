"""Files of any size and kind in the place of settings, records and leases: an answer at once, or one sentence."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from crate_ray.bounded import MAX_JSON_BYTES, MAX_YAML_BYTES
from crate_ray.config import Settings
from crate_ray.config.values import load_yaml, validate
from crate_ray.errors import UserError
from crate_ray.storage.interface import TooLarge
from crate_ray.storage.lease import Lease
from crate_ray.storage.local import LocalStorage
from tests.sentences import sentence_of


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Fails a test that takes longer than reading the largest allowed file."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < 20


def irregular(folder: Path, kind: str) -> Path:
    path = folder / "a.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**40)
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = irregular(tmp_path, kind)
    (tmp_path / "b").write_bytes(b"regular")
    storage = LocalStorage(tmp_path)
    for read in (
        lambda: storage.read("a.json"),
        lambda: storage.read("a.json", 0, 10),
        lambda: storage.read_version("a.json", 0, 10),
        lambda: storage.download("a.json", tmp_path / "copy"),
        lambda: load_yaml(path),
    ):
        with pytest.raises(UserError, match=r"^cannot read [^\n]*(regular file|[Ii]s a directory)$"):
            read()
    assert [info.key for info in storage.list()] == ["b"]
    assert kind == "folder" or "not a regular file: a.json" in caplog.text


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    irregular(tmp_path, "sparse")
    (tmp_path / "small").write_bytes(b"0123456789")
    storage = LocalStorage(tmp_path)
    with pytest.raises(TooLarge, match=f"^{tmp_path}/a.json has more than {MAX_JSON_BYTES} bytes"):
        storage.read_small("a.json")
    with pytest.raises(UserError, match=f"cannot read .*more than {MAX_YAML_BYTES} bytes"):
        load_yaml(tmp_path / "a.json")
    assert storage.read_small("small", 10) == b"0123456789"
    for start, length, found in ((4, 2**60, b"456789"), (20, 2**60, b""), (4, -1, b""), (4, 2, b"45")):
        assert storage.read("small", start, length) == storage.read_version("small", start, length)[0] == found


class Example(Settings):
    """Settings."""

    number: int = 0
    inner: dict[str, Any] = Field(default_factory=dict)


def laughs(levels: int) -> str:
    return "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, levels)
    )


BOMBS = {
    "aliases of aliases": laughs(9),
    "merged aliases": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i}\n  <<: [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 9)),
    "an alias of itself": "a: &a [*a]",
    "many values": "a: [" + "1," * 32_000 + "]",
    "nested": "a: " + "[" * 30_000,
    "nested mappings": "".join(f"{' ' * i}a:\n" for i in range(350)),
    "digits": f"number: {'9' * 5000}",
    "hexadecimal digits": f"number: 0x{'f' * 60_000}",
    "sexagesimal digits": f"number: 1{':59' * 20_000}",
    "not a number": "number: !!int x",
    "not a truth": "number: !!bool x",
    "not a time": "number: !!timestamp x",
    "control characters": "number: \x01",
    "long text": f"number: {'x' * 60_000}",
    "deep text": "number: " + "[" * 60 + "]" * 60,
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOMBS[name])
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        validate(Example, load_yaml(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000
    assert time.monotonic() - begun < 8


@given(st.text(st.sampled_from("ab01: -[]{}&*<!'\"#|>\n%@,?x"), max_size=60))
def test_any_yaml_is_a_mapping_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(text)
    assert "\n" not in sentence_of(lambda: load_yaml(path))


def test_aliases_that_repeat_little_are_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("inner: &shared {a: [1, 2]}\nother: {<<: *shared, b: *shared}\n")
    assert load_yaml(tmp_path / "config.yaml") == {
        "inner": {"a": [1, 2]},
        "other": {"a": [1, 2], "b": {"a": [1, 2]}},
    }


GOOD = {"id": "1", "host": "h", "pid": 1, "since": "2026", "what": "w", "seconds": 1.0, "beat": 0}


@pytest.mark.parametrize(
    "changed",
    [{"seconds": seconds} for seconds in (-1.0, 0.0, 1e300, float("nan"), float("inf"), "1e400", "x", None, 10**400)]
    + [
        {"pid": -1},
        {"pid": 10**30},
        {"beat": "x"},
        {"beat": 10**400},
        {"host": 5},
        {"since": None},
        {"id": "x" * 1000},
    ],
    ids=lambda changed: str(changed)[:30],
)
def test_a_lease_with_impossible_numbers_belongs_to_nobody(tmp_path: Path, changed: dict[str, Any]) -> None:
    (tmp_path / "lease").write_text(json.dumps(GOOD | changed))
    with Lease(LocalStorage(tmp_path), "lease", "the run", lease_seconds=0.4) as lease:
        lease.check()


@pytest.mark.parametrize("content", [b"", b"[" * 60_000, b"[" * 20_000 + b"]" * 20_000, b"\xff", b"1" * 5000, b"null"])
def test_a_lease_that_is_no_record_belongs_to_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease").write_bytes(content)
    with Lease(LocalStorage(tmp_path), "lease", "the run", lease_seconds=0.4) as lease:
        lease.check()


def test_a_lease_that_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lease")
    with (
        pytest.raises(UserError, match="lease: it is not a regular file$"),
        Lease(LocalStorage(tmp_path), "lease", "the run", lease_seconds=0.4),
    ):
        pass
