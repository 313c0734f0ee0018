"""`crate-ray serve` as a process of its own: requests in each form, what is refused, an alias that moves, SIGTERM."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from crate_ray.addresses import Address
from crate_ray.config import CrateMAEConfig
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.served_model import ServedModel
from crate_ray.tracking.flavor import log_model
from tests.jobs import ROOT, environment, free_port, job

pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.ray, pytest.mark.daily, pytest.mark.timeout(300)]

MODEL = CrateMAEConfig(image_size=16, patch_size=4, dim=16, num_subspaces=2, depth=2)
TOKEN = "a-token-of-this-test-alone"
MAX_BYTES, MAX_IMAGES = 400_000, 24


class Answer(NamedTuple):
    status: int
    version: str | None
    values: Any

    @property
    def message(self) -> str:
        return str(self.values["message"])


@dataclass
class Server:
    """The job, its registry and its models."""

    folder: Path
    uri: str
    experiment: str = ""
    port: int = field(default_factory=free_port)
    models: dict[str, ServedModel] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = [
            "--model", "models:/crate-mae@champion", "--port", str(self.port), "--token-env", "SERVE_TOKEN",
            "--poll-seconds", "0.3", "--batch-size", "8", "--max-images", str(MAX_IMAGES),
            "--max-body-bytes", str(MAX_BYTES), "--tracking.uri", self.uri,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                job("serve", *arguments), cwd=self.folder, env=environment(self.folder) | {"SERVE_TOKEN": TOKEN},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 200
        while "serving " not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def add(self, seed: int) -> str:
        """Register a model with other weights. Returns its version."""
        torch.manual_seed(seed)
        exported = self.folder / f"exported-{seed}"
        export_model(
            exported,
            build_model(MODEL).state_dict(),
            ModelDescription(model=MODEL, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), kind="image", step=seed),
        )
        client = mlflow.MlflowClient(self.uri)
        run_id = client.create_run(self.experiment).info.run_id
        info = log_model(Address(self.uri), run_id, exported)
        version = client.create_model_version("crate-mae", info.model_uri, run_id, model_id=info.model_id).version
        self.models[str(version)] = ServedModel.from_folder(exported)
        return str(version)

    def promote(self, version: str) -> None:
        mlflow.MlflowClient(self.uri).set_registered_model_alias("crate-mae", "champion", version)

    def ask(
        self, body: bytes | None = None, kind: str = "application/json", path: str = "/invocations", token: str = TOKEN
    ) -> Answer:
        headers = {"Content-Type": kind, "Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=100) as answer:
                return Answer(answer.status, answer.headers["crate-ray-model-version"], json.load(answer))
        except urllib.error.HTTPError as error:
            return Answer(error.code, None, json.loads(error.read() or b"null"))

    def ask_json(self, **document: Any) -> Answer:
        return self.ask(json.dumps(document).encode())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    server, before = Server(folder, f"sqlite:///{folder}/mlflow.db"), mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(server.uri)
    client.create_registered_model("crate-mae")
    server.experiment = client.create_experiment("serve", artifact_location=(folder / "artifacts").as_uri())
    server.promote(server.add(1))
    server.start()
    yield server
    mlflow.set_tracking_uri(before)
    assert server.process is not None
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def picture(number: int, size: tuple[int, int] = (31, 24)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(number) for number in range(5)]
TEXTS = [base64.b64encode(content).decode() for content in PICTURES]


def close(found: Any, expected: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor(found["predictions"]), expected, atol=1e-4)


def test_each_form_of_a_request_gives_what_the_model_gives(server: Server) -> None:
    model = server.models["1"]
    images = model.load(PICTURES)
    for output in ("mean", "cls", "patch", "attention", "reconstruction"):
        params = model.params({"output": output, "mask_ratio": 0.5, "seed": 7})
        expected = model(images, params)
        given = params.model_dump()
        for form in (
            {"inputs": {"image": TEXTS}},
            {"inputs": TEXTS},
            {"instances": [{"image": text} for text in TEXTS]},
            {"dataframe_records": [{"image": text} for text in TEXTS]},
            {"dataframe_split": {"columns": ["image"], "data": [[text] for text in TEXTS]}},
        ):
            answer = server.ask_json(**form, params=given)
            assert answer.status == 200 and answer.version == "1" and close(answer.values, expected), (form, answer)
        query = "&".join(f"{name}={value}" for name, value in given.items())
        for kind in ("image/png", "application/octet-stream"):
            answer = server.ask(PICTURES[0], kind, f"/invocations?{query}")
            assert answer.status == 200 and close(answer.values, expected[:1]), answer
    pixels = np.asarray(Image.open(io.BytesIO(PICTURES[0]))).tolist()
    assert close(server.ask_json(instances=[{"image": pixels}]).values, model(images[:1]))
    assert server.ask_json(instances=[]).values == {"predictions": []}
    many = (TEXTS * 5)[:MAX_IMAGES]  # more than one batch
    assert close(server.ask_json(inputs=many).values, model(model.load((PICTURES * 5)[:MAX_IMAGES])))
    about = server.ask(path="/model").values
    assert about["version"] == "1" and about["default_output"] == "mean" and about["image_size"] == [16, 16]


def test_what_cannot_be_answered_is_a_status_and_a_sentence(server: Server) -> None:
    good = {"inputs": TEXTS[:1]}
    for document, message in (
        ({"inputs": [TEXTS[0], "aGVsbG8="]}, "image 2 of 2 cannot be used: not a JPEG, PNG or WebP image"),
        (good | {"params": {"output": "logits"}}, "output 'logits' is not one of mean, cls, patch"),
        (good | {"params": {"mask_ratio": "x"}}, "the parameter mask_ratio: Input should be a valid number"),
        (good | {"params": {"depth": 1}}, "there is no parameter 'depth'; the parameters are output, mask_ratio, seed"),
        ({}, "the body must have one of 'inputs', 'instances'"),
        ({"inputs": TEXTS * 5}, f"the request has 25 images; send at most {MAX_IMAGES} at once"),
    ):
        answer = server.ask_json(**document)
        assert answer.status == 400 and answer.message.startswith(message), answer
    body = json.dumps(good).encode()
    for status, message, answer in (
        (400, "the body is not JSON", server.ask(b"{")),
        (401, "the token is missing or wrong", server.ask(body, token="another-token-of-enough")),
        (401, "the token is missing or wrong", server.ask(path="/model", token="")),
        (404, "there is no such page", server.ask(body, path="/predict")),
        (405, "/invocations takes POST requests", server.ask()),
        (413, "the body has more than 400,000 bytes", server.ask(bytes(MAX_BYTES + 1), "image/png")),
        (415, "Content-Type 'text/csv' is not known", server.ask(body, "text/csv")),
    ):
        assert (answer.status, answer.message[: len(message)]) == (status, message)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/ping") as answered:  # probes have no token
        assert answered.status == 200
    assert TOKEN not in server.log.read_text()


def test_the_requests_of_the_guide_are_answered(server: Server) -> None:
    page = (ROOT / "docs/tracking.md").read_text().split("\n## Serve a model\n")[1].split("\n## ")[0]
    lines = [line for line in page.splitlines() if line.startswith("curl ")]
    (server.folder / "cat.jpg").write_bytes(PICTURES[0])
    assert len(lines) == 10
    for line in lines:
        line = line.replace("localhost:8000", f"127.0.0.1:{server.port}").partition("  #")[0]
        if "Authorization" not in line:
            line = line.replace("curl ", f"curl -H 'Authorization: Bearer {TOKEN}' ", 1)
        done = subprocess.run(
            ["bash", "-c", line.replace("curl ", "curl -sS --fail ", 1)],
            cwd=server.folder, env=os.environ | {"SERVE_TOKEN": TOKEN}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
        assert "/ping" in line or {"predictions", "version"} & json.loads(done.stdout).keys(), line


def test_a_version_takes_over_while_requests_are_in_flight(server: Server) -> None:
    images = server.models["1"].load(PICTURES)
    version = server.add(2)
    answers: list[Answer] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(server.ask_json(inputs=TEXTS))

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    server.promote(version)
    deadline = time.monotonic() + 60
    while not (answers and answers[-1].version == version) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    expected = {name: model(images) for name, model in server.models.items()}
    assert not torch.allclose(expected["1"], expected[version], atol=1e-2)
    assert {answer.status for answer in answers} == {200}
    assert {answer.version for answer in answers} == {"1", version} and answers[-1].version == version
    for answer in answers:
        assert answer.version is not None and close(answer.values, expected[answer.version])


def test_a_version_that_cannot_be_loaded_leaves_the_old_one(server: Server) -> None:
    before = server.ask(path="/model").values["version"]
    broken = server.add(3)
    source = mlflow.MlflowClient(server.uri).get_model_version_download_uri("crate-mae", broken)
    for file in Path(mlflow.artifacts.download_artifacts(source)).rglob("model.json"):
        file.write_text("{")
    server.promote(broken)
    deadline = time.monotonic() + 60
    while "stays: " not in server.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    said = [line for line in server.log.read_text().splitlines() if "stays: " in line]
    assert len(said) == 1 and said[0].startswith(f"version {before} stays: ") and "model.json" not in said[0][:20]
    answer = server.ask_json(inputs=TEXTS)
    assert answer.status == 200 and answer.version == before
    server.promote(before)


def test_sigterm_finishes_the_requests_in_progress(server: Server) -> None:
    assert server.process is not None
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000), (9, 80, 200)).save(file, "PNG")  # slow to decode
    text = base64.b64encode(file.getvalue()).decode()
    answers: list[Answer] = []
    number = min(4, MAX_BYTES // len(text))
    thread = threading.Thread(target=lambda: answers.append(server.ask_json(inputs=[text] * number)))
    thread.start()
    time.sleep(0.4)
    assert not answers
    os.kill(server.process.pid, signal.SIGTERM)
    thread.join()
    assert answers[0].status == 200 and np.shape(answers[0].values["predictions"]) == (number, MODEL.dim)
    assert server.process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        server.ask(path="/ping")
    said = server.log.read_text()
    assert "Traceback" not in said and said.splitlines()[-1] == "stopping   requests in progress are finished"
