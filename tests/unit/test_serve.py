"""`crate-ray serve` without Ray: which addresses need a token, what is refused before the start, the forms of requests,
batches of mixed requests, and a new version on the shelf."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crate_ray.cli import parse_config
from crate_ray.config import CrateMAEConfig, ServeConfig
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.served_model import ServedModel
from crate_ray.server.requests import Refusal, parse_request
from crate_ray.server.run import _check_port, _token_digest
from crate_ray.server.shelf import Shelf, Version

MODEL = CrateMAEConfig(image_size=16, patch_size=4, dim=16, num_subspaces=2, depth=1)


def test_an_address_that_others_can_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert parse_config(ServeConfig, ["--host", host]).is_private
    for host in ("0.0.0.0", "::", "10.0.0.3", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(UserError, match="can be reached from other machines; set token_env"):
            parse_config(ServeConfig, ["--host", host])
        assert parse_config(ServeConfig, ["--host", host, "--token-env", "SERVE_TOKEN"]).host == host
    for token, length in ((None, 0), ("short", 5), (" " * 20, 0)):
        monkeypatch.delenv("SERVE_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("SERVE_TOKEN", token)
        with pytest.raises(UserError, match=f"SERVE_TOKEN of --token-env has {length} characters; put a token of at"):
            _token_digest("SERVE_TOKEN")
    monkeypatch.setenv("SERVE_TOKEN", "a-token-that-is-long-enough\n")
    digest = _token_digest("SERVE_TOKEN")
    assert digest is not None and len(digest) == 64 and _token_digest(None) is None


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^cannot listen on 127\.0\.0\.1:{port} \(Address already in use\); give"):
            _check_port("127.0.0.1", port)
    _check_port("127.0.0.1", port)


@pytest.mark.slow
def test_without_its_packages_serve_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray.serve'] = None; sys.argv = ['crate-ray', 'serve']; "
    code += "from crate_ray.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: Ray Serve cannot be imported (")
    assert done.stderr.endswith("; pip install 'crate-ray[serve]'\n") and done.stderr.count("\n") == 1


# --- Requests --------------------------------------------------------------------------------------------------------


def parse(document: Any, query: dict[str, str] | None = None) -> Any:
    return parse_request("application/json; charset=utf-8", query or {}, json.dumps(document).encode())


def test_all_forms_of_a_request_mean_the_same_images() -> None:
    for images in (["YQ==", "Yg=="], [[[1, 2], [3, 4]], [[5]]], []):
        for form in (
            {"inputs": {"image": images}},
            {"inputs": images},
            {"instances": images},
            {"instances": [{"image": image} for image in images]},
            {"dataframe_records": [{"image": image} for image in images]},
            {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}},
            {"dataframe_split": {"index": [0, 1], "columns": ["image"], "data": [[image] for image in images]}},
        ):
            assert parse(form) == (images, {}), form
            asked = parse(form | {"params": {"seed": 1, "output": "cls"}}, {"seed": "2"})
            assert asked == (images, {"seed": "2", "output": "cls"})
    assert parse({"inputs": {"image": "YQ=="}}).images == ["YQ=="]
    for kind in ("image/jpeg", "Image/PNG", "application/x-npy", "application/octet-stream"):
        assert parse_request(kind, {"output": "cls"}, b"\xff\xd8") == ([b"\xff\xd8"], {"output": "cls"})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "the body is not a JSON object"),
        ({}, r"the body must have one of 'inputs', .*; it has \[\]"),
        ({"inputs": [], "instances": []}, r"must have one of .*; it has \['inputs', 'instances'\]"),
        ({"inputs": [], "params": [1]}, "'params' is not a JSON object"),
        ({"inputs": {"picture": ["a"]}}, r"'inputs' names \['picture'\]; it takes 'image' alone"),
        ({"inputs": 3}, "'inputs' is not a list of images"),
        ({"instances": [{"image": "a"}, {"x": "b"}]}, "the entries of 'instances' are not all such as"),
        ({"instances": [{"image": "a"}, "b"]}, "the entries of 'instances' are not all such as"),
        ({"dataframe_records": {"image": 1}}, "'dataframe_records' is not a list of images"),
        ({"dataframe_split": {"columns": ["a", "b"], "data": []}}, "dataframe_split has the columns"),
        ({"dataframe_split": {"columns": ["image"], "data": ["a"]}}, "dataframe_split is not such as"),
        ({"dataframe_split": []}, "dataframe_split is not such as"),
    ],
)
def test_a_request_of_another_form_is_one_sentence(document: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        parse(document)
    assert refusal.value.status == 400 and "\n" not in str(refusal.value)


def test_hostile_bodies_are_refused() -> None:
    for body in (b"", b"{", b"\xff", b"[" * 200_000, b'{"inputs": NaN}'):
        with pytest.raises(Refusal):
            parse_request("application/json", {}, body)
    for kind in ("", "text/csv", "application/x-www-form-urlencoded", "multipart/form-data"):
        with pytest.raises(Refusal, match="Content-Type .* is not known") as refusal:
            parse_request(kind, {}, b"")
        assert refusal.value.status == 415


# --- Batches and versions ---------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> list[ServedModel]:
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        description = ModelDescription(model=MODEL, mean=(0.5,) * 3, std=(0.2,) * 3, kind="image")
        export_model(tmp_path / str(seed), build_model(MODEL).state_dict(), description)
        found.append(ServedModel.from_folder(tmp_path / str(seed)))
    return found


def test_a_batch_of_mixed_requests_gives_each_its_own_answer(models: list[ServedModel]) -> None:
    replica = pytest.importorskip("crate_ray.server.replica")
    random = np.random.default_rng(0)
    works = []
    for number in range(24):
        model = models[number % 2]
        output = ("mean", "patch", "reconstruction")[number // 2 % 3]
        images = model.load(list(random.integers(0, 256, (number % 4, 20, 24, 3), np.uint8)))
        works.append(replica.Work(model, model.params({"output": output, "seed": number % 2}), images))
    for work, found in zip(works, replica._compute_together(works), strict=True):
        torch.testing.assert_close(found, work.model(work.images, work.params), atol=1e-3, rtol=1e-4)


def test_the_shelf_wakes_who_waits_for_another_version() -> None:
    async def scene() -> None:
        shelf = Shelf()
        first = asyncio.create_task(shelf.other_than(None))
        await asyncio.sleep(0.01)
        assert not first.done()
        await shelf.put(Version("1", b"", []))
        assert (await first).name == "1" and (await shelf.other_than("0")).name == "1"
        second = asyncio.create_task(shelf.other_than("1"))
        await shelf.put(Version("1", b"", []))  # the same again
        await asyncio.sleep(0.01)
        assert not second.done()
        await shelf.put(Version("2", b"", []))
        assert (await second).name == "2"

    asyncio.run(scene())
