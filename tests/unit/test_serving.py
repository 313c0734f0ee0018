"""The registered model runs in its own environment: its requirements are enough, and it predicts the same."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import uvicorn
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

import crate_ray
from crate_ray.addresses import Address
from crate_ray.config import ClassifierConfig, CrateMAEConfig
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.received import received_image
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, Normalizer, export_model, load_exported, read_description
from crate_ray.served_model import ServedModel
from crate_ray.serving import FeatureExtractor, load_images
from crate_ray.structure.attention import patch_maps
from crate_ray.tracking.flavor import log_model

MODEL = CrateMAEConfig(image_size=16, patch_size=4, dim=16, num_subspaces=2, depth=2)
BLOCKED = (
    "boto3",
    "botocore",
    "ray",
    "xxhash",
    "webdataset",
    "kornia",
    "sklearn",
    "pydantic_settings",
    "rich",
    "optuna",
)
SERVE = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[3].split(","):
            raise ImportError(f"{name} is not a requirement of the model")

sys.meta_path.insert(0, Blocked())
import mlflow
import numpy as np
import pandas as pd

for kind in ("encoder", "classifier"):
    folder = Path(sys.argv[1]) / kind
    images = [path.read_bytes() for path in sorted(Path(sys.argv[2]).glob("*.png"))]
    model = mlflow.pyfunc.load_model(str(folder))
    np.save(Path(sys.argv[2]) / f"{kind}.npy", model.predict(pd.DataFrame({"image": images})))
import crate_ray

assert Path(crate_ray.__file__).is_relative_to(sys.argv[1]), crate_ray.__file__
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of an encoder and a classifier as MLflow logs them, and a folder of images with the expected results."""
    folder, uri_before = tmp_path_factory.mktemp("logged"), mlflow.get_tracking_uri()
    images = folder / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        pixels = random.integers(0, 256, (20 + number, 31, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    encoded = [path.read_bytes() for path in sorted(images.glob("*.png"))]
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("serving", artifact_location=(folder / "artifacts").as_uri())
    torch.manual_seed(0)
    head = ClassifierConfig(num_classes=3)
    for kind in ("encoder", "classifier"):
        description = ModelDescription(
            model=MODEL, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), kind="image",
            classifier=head if kind == "classifier" else None,
        )  # fmt: skip
        module = Classifier(MODEL, head) if kind == "classifier" else build_model(MODEL)
        export_model(folder / f"exported-{kind}", module.state_dict(), description)
        made = (ServedModel if kind == "classifier" else FeatureExtractor).from_folder(folder / f"exported-{kind}")
        np.save(images / f"expected-{kind}.npy", made(made.load(encoded)).numpy())
        run_id = client.create_run(experiment).info.run_id
        info = log_model(Address(uri), run_id, folder / f"exported-{kind}")
        found = mlflow.artifacts.download_artifacts(info.model_uri, tracking_uri=uri, dst_path=str(folder / "download"))
        Path(found).rename(folder / kind)
    mlflow.set_tracking_uri(uri_before)
    return folder, images


def serve(python: str, folder: Path, images: Path, blocked: tuple[str, ...]) -> None:
    """Load both models in another process, predict, and compare."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW"))}
    command = [python, "-c", SERVE, str(folder), str(images), ",".join(blocked)]
    done = subprocess.run(command, cwd=images, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, columns in (("encoder", MODEL.dim), ("classifier", 3)):
        found, expected = np.load(images / f"{kind}.npy"), np.load(images / f"expected-{kind}.npy")
        assert found.shape == (5, columns) and np.abs(found - expected).max() < 1e-6
        assert np.ptp(expected, axis=0).max() > 0
        (images / f"{kind}.npy").unlink()


def test_threads_decode_the_same_images_and_find_the_same_errors() -> None:
    random = np.random.default_rng(0)
    items: list[bytes] = []
    for _ in range(7):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (20, 24, 3), np.uint8)).save(file, "PNG")
        items.append(file.getvalue())
    items[4] = b"no picture"
    model = CrateMAEConfig(image_size=16, patch_size=4, dim=16, depth=1, num_subspaces=2)
    description = ModelDescription(model=model, mean=(0.5,) * 3, std=(0.2,) * 3, kind="image", step=1)
    images, errors = load_images(items, description)
    threaded, found = load_images(items, description, threads=3)
    good = [i for i in range(7) if i != 4]
    assert torch.equal(images[good], threaded[good])
    assert [error is None for error in errors] == [error is None for error in found] == [i != 4 for i in range(7)]


# --- What clients send ----------------------------------------------------------------------------------------------

Answer = tuple[int, dict[str, Any]]


@contextmanager
def mlflow_server(model: Path) -> Iterator[Callable[[str, str], Answer]]:
    """Asks MLflow's server for a logged model, as `mlflow models serve` runs it: status and answer."""
    app = scoring_server.init(mlflow.pyfunc.load_model(str(model)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def send(body: str, kind: str) -> Answer:
        url = f"http://127.0.0.1:{port}/invocations"
        request = urllib.request.Request(url, body.encode(), {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        yield send
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def ask(logged: tuple[Path, Path]) -> Iterator[Callable[[str, str], Answer]]:
    """MLflow's server of the encoder."""
    with mlflow_server(logged[0] / "encoder") as send:
        yield send


def bodies(texts: list[str]) -> dict[str, tuple[str, str]]:
    """Images as text in each form of MLflow's protocol: body and content type."""
    forms: dict[str, Any] = {
        "dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]},
        "dataframe_records": [{"image": text} for text in texts],
        "inputs": {"image": texts},
        "instances": [{"image": text} for text in texts],
    }
    found = {name: (json.dumps({name: value}), "application/json") for name, value in forms.items()}
    table = pd.DataFrame({"image": texts}).to_csv(index=False)
    return found | {"csv": (table, "text/csv")}


def test_http_clients_send_base64_in_every_form(ask: Callable[[str, str], Answer], logged: tuple[Path, Path]) -> None:
    encoded = [path.read_bytes() for path in sorted(logged[1].glob("*.png"))]
    expected = np.load(logged[1] / "expected-encoder.npy")
    plain = [base64.b64encode(content).decode() for content in encoded]
    spellings = {
        "plain": plain,
        "lines": [base64.encodebytes(content).decode() for content in encoded],
        "URL": [f"data:image/png;base64,{text}" for text in plain],
        "URL-safe": [base64.urlsafe_b64encode(content).decode() for content in encoded],
        "unpadded": [text.rstrip("=") for text in plain],
    }
    for spelling, texts in spellings.items():
        for form, body in bodies(texts).items():
            if form.startswith("dataframe") and spelling not in ("plain", "lines"):
                continue  # MLflow itself decodes these, and takes only what RFC 2045 defines
            status, answer = ask(*body)
            assert status == 200, (spelling, form, answer)
            assert np.abs(np.array(answer["predictions"]) - expected).max() < 1e-5, (spelling, form)
    pixels = [np.asarray(Image.open(io.BytesIO(content))).tolist() for content in encoded[:1]]
    for form in ({"inputs": {"image": pixels}}, {"instances": [{"image": pixels[0]}]}):
        status, answer = ask(json.dumps(form), "application/json")
        assert status == 200 and np.abs(np.array(answer["predictions"]) - expected[:1]).max() < 1e-5


def test_http_clients_get_one_sentence_for_an_image_that_cannot_be_used(
    ask: Callable[[str, str], Answer], logged: tuple[Path, Path]
) -> None:
    good = base64.b64encode((logged[1] / "0.png").read_bytes()).decode()
    for bad, cause in (("aGVsbG8gd29ybGQ=", "not a JPEG, PNG or WebP image"), ("iVBORw0KGgoAAAANSUhEUgAA", "")):
        for form, body in bodies([good, bad]).items():
            status, answer = ask(*body)
            assert status == 400, form
            assert answer["message"].startswith(f"image 2 of 2 cannot be used: {cause}"), (form, answer)
            assert answer["message"].endswith("; send encoded images in base64, or arrays of pixels")
            assert "stack_trace" not in answer and good[:20] not in str(answer), form
    for form in ("inputs", "instances", "csv"):
        status, answer = ask(*bodies(["what is this?", good])[form])
        assert status == 400 and answer["message"].startswith("image 1 of 2 cannot be used: "), answer


def test_the_same_image_in_every_python_type(logged: tuple[Path, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(logged[0] / "encoder"))
    content = (logged[1] / "3.png").read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    expected = np.load(logged[1] / "expected-encoder.npy")[3:4]
    texts = base64.b64encode(content).decode(), base64.b64encode(content)
    for value in (
        content,
        bytearray(content),
        memoryview(content),
        pixels,
        pixels.astype(int),
        pixels.tolist(),
        *texts,
    ):
        for table in (pd.DataFrame({"image": [value]}), {"image": [value]}):
            found = model.predict(table)
            assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6, (type(value), type(table))
    assert np.abs(model.predict({"image": [texts[0]] * 2}) - expected).max() < 1e-6
    assert model.predict(pd.DataFrame({"image": []}, dtype=object)).shape == (0, MODEL.dim)
    with pytest.raises(MlflowException, match=r"^image 2 of 2 cannot be used: it is missing; send"):
        model.predict(pd.DataFrame({"image": [content, None]}))


def test_what_a_client_means() -> None:
    for content in (b"\xff\xd8\xff\xe0 a JPEG", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\x00\x00\x00WEBP", b"\x93NUMPY\x01"):
        assert received_image(content, "image") == content
        assert received_image(base64.b64encode(content), "image") == content
        assert received_image(f" {base64.b64encode(content).decode()}\n", "image") == content
    grid = received_image([[0.5, -1.0], [2.0, 3.0]], "grid")
    assert isinstance(grid, np.ndarray) and grid.dtype == np.float64 and grid[0, 1] == -1
    for value, message in (
        (None, "missing"), (float("nan"), "missing"), (3, "a int"), ("a b?", "not base64"), ("abcde", "not base64"),
        ([[0.5]], "whole numbers from 0 to 255"), ([[256]], "whole numbers from"), ([[-1]], "whole numbers from"),
        ([[1], [2, 3]], "no array of numbers"), ([["x"]], "no array of numbers"), ([], "whole numbers"),
    ):  # fmt: skip
        with pytest.raises(DecodeError, match=message):
            received_image(value, "image")


# --- Outputs --------------------------------------------------------------------------------------------------------


def asked(images: Path, **params: Any) -> tuple[str, str]:
    """A request for an output of all images."""
    texts = [base64.b64encode(path.read_bytes()).decode() for path in sorted(images.glob("*.png"))]
    return json.dumps({"inputs": {"image": texts}, "params": params}), "application/json"


def test_http_clients_choose_the_output(ask: Callable[[str, str], Answer], logged: tuple[Path, Path]) -> None:
    folder, images = logged
    model, description = load_exported(folder / "exported-encoder")
    pixels, _ = load_images([path.read_bytes() for path in sorted(images.glob("*.png"))], description)
    inputs = Normalizer.of(description.mean, description.std)(pixels)
    with torch.no_grad():
        tokens = model.encode(inputs).tokens
    expected = {
        "mean": tokens[:, 1:].mean(1), "cls": tokens[:, 0], "patch": tokens[:, 1:],
        "attention": patch_maps(model, inputs).attention[:, -1],
    }  # fmt: skip
    for output, values in expected.items():
        status, answer = ask(*asked(images, output=output))
        found = torch.tensor(answer["predictions"])
        assert status == 200 and found.shape == values.shape, output
        torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-5)
    assert found.shape == (5, 2, 4, 4) and (found.sum((2, 3)) < 1).all()  # CLS attends to itself, too


def test_http_clients_get_hidden_patches_as_the_model_predicts_them(
    ask: Callable[[str, str], Answer], logged: tuple[Path, Path]
) -> None:
    folder, images = logged
    model, description = load_exported(folder / "exported-encoder")
    pixels, _ = load_images([path.read_bytes() for path in sorted(images.glob("*.png"))], description)
    normalizer = Normalizer.of(description.mean, description.std)

    def reconstructed(**params: Any) -> torch.Tensor:
        status, answer = ask(*asked(images, output="reconstruction", **params))
        assert status == 200, answer
        return torch.tensor(answer["predictions"]).permute(0, 3, 1, 2)

    for ratio, hidden in ((0.75, 12), (0.5, 8), (0.0, 0)):
        found = reconstructed(mask_ratio=ratio, seed=3)
        assert found.shape == pixels.shape
        changed = ((found - pixels).abs() > 0.01).any(1).unflatten(2, (4, 4)).unflatten(1, (4, 4)).any(4).any(2)
        assert (changed.sum((1, 2)) == hidden).all() and (changed == changed[0]).all()  # the same patches of each image
        if not hidden:
            continue
        # What a model with this ratio predicts where these patches are hidden.
        other = build_model(MODEL.model_copy(update={"mask_ratio": ratio}))
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            noise = changed.flatten(1).float()
            predicted = other.reconstruct(other.eval()(normalizer(pixels), noise).prediction, normalizer(pixels))
        mask = changed.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        expected = torch.where(mask, (255 * normalizer.undo(predicted)).clamp(0, 255), pixels.float())
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    assert torch.equal(reconstructed(), reconstructed(mask_ratio=MODEL.mask_ratio, seed=0))
    assert not torch.equal(reconstructed(seed=1), reconstructed(seed=2))


def test_http_clients_get_one_sentence_for_what_a_model_cannot_give(
    ask: Callable[[str, str], Answer], logged: tuple[Path, Path]
) -> None:
    some = "mean, cls, patch, attention"
    for params, message in (
        ({"output": "logits"}, f"output 'logits' is not one of {some}, reconstruction"),
        ({"output": "probabilities"},
         f"this model is an encoder without classes; output 'probabilities' is not one of {some}, reconstruction"),
        ({"output": "reconstruction", "mask_ratio": 1.5},
         "the parameter mask_ratio: Input should be less than 1"),
        ({"output": "reconstruction", "mask_ratio": 0.99},
         "mask_ratio 0.99 leaves none of the 16 patches visible; lower it"),
        ({"output": "reconstruction", "seed": -1}, "the parameter seed: Input should be greater than or equal to 0"),
    ):  # fmt: skip
        status, answer = ask(*asked(logged[1], **params))
        assert (status, answer["message"]) == (400, message)


def test_http_clients_of_a_classifier_get_probabilities_or_features(logged: tuple[Path, Path]) -> None:
    folder, images = logged
    model = ServedModel.from_folder(folder / "exported-classifier").model
    assert isinstance(model, Classifier)
    description = read_description(folder / "exported-classifier")
    pixels, _ = load_images([path.read_bytes() for path in sorted(images.glob("*.png"))], description)
    tokens = crate_ray.Backbone(model).forward_features(Normalizer.of(description.mean, description.std)(pixels))
    probabilities = torch.from_numpy(np.load(images / "expected-classifier.npy"))
    with mlflow_server(folder / "classifier") as ask:
        for params, expected in (
            ({}, probabilities), ({"output": "probabilities"}, probabilities), ({"output": "cls"}, tokens[:, 0]),
            ({"output": "mean"}, tokens[:, 1:].mean(1)), ({"output": "patch"}, tokens[:, 1:]),
        ):  # fmt: skip
            status, answer = ask(*asked(images, **params))
            assert status == 200, answer
            torch.testing.assert_close(torch.tensor(answer["predictions"]), expected, atol=1e-5, rtol=1e-5)
        status, answer = ask(*asked(images, output="attention"))
        assert status == 200 and np.shape(answer["predictions"]) == (5, 2, 4, 4)
        status, answer = ask(*asked(images, output="reconstruction"))
    assert status == 400 and answer["message"] == (
        "this model has no decoder, so it reconstructs nothing; output 'reconstruction' is not one of probabilities, "
        "mean, cls, patch, attention"
    )


def test_a_grid_is_reconstructed_in_its_own_numbers(tmp_path: Path) -> None:
    exported(tmp_path / "model", 5, "grid")
    model = ServedModel.from_folder(tmp_path / "model")
    grids = np.random.default_rng(0).standard_normal((2, 5, 16, 24), np.float32) * 40
    params = model.params({"output": "reconstruction", "mask_ratio": 0.5})
    found = model(model.receive(list(grids)), params).numpy()
    same = np.isclose(found, grids, atol=1e-4).all(1).reshape(2, 4, 4, 6, 4).all((2, 4))
    assert found.shape == grids.shape and (same.sum((1, 2)) == 12).all()


# --- Its own environment --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_served_model_imports_nothing_of_the_data_stack(logged: tuple[Path, Path]) -> None:
    serve(sys.executable, *logged, BLOCKED)


@pytest.mark.daily
@pytest.mark.timeout(1800)
def test_a_served_model_runs_in_an_environment_made_of_its_own_requirements(
    logged: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, images = logged
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r"]
    subprocess.run([*install, str(folder / "encoder" / "requirements.txt")], check=True)
    absent = subprocess.run([python, "-c", "import boto3"], capture_output=True, check=False)
    assert absent.returncode != 0  # else it would show nothing
    serve(python, folder, images, ())


# --- What load_model's preprocess takes ------------------------------------------------------------------------------


def exported(folder: Path, channels: int, kind: Literal["image", "grid"]) -> Any:
    """A model of 16 × 24 pixels with uneven statistics, as load_model gives it."""
    model = CrateMAEConfig(image_size=(16, 24), patch_size=4, dim=16, num_subspaces=2, depth=1, channels=channels)
    mean, std = tuple(0.1 * (i + 1) for i in range(channels)), tuple(0.3 + 0.1 * i for i in range(channels))
    export_model(folder, build_model(model).state_dict(), ModelDescription(model=model, mean=mean, std=std, kind=kind))
    return crate_ray.load_model(str(folder))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
def test_a_loaded_model_takes_every_form_of_a_picture(channels: int, mode: str, tmp_path: Path) -> None:
    model = exported(tmp_path / "model", channels, "image")
    random = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(random.integers(0, 2**16, (50, 70), np.uint16))
    else:
        blobs = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8))
        picture = blobs.resize((70, 50), Image.Resampling.BILINEAR).convert(mode)
    picture.getexif()[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "picture.png", exif=picture.getexif())
    content = (tmp_path / "picture.png").read_bytes()
    found = model.preprocess(content)
    assert found.shape == (1, channels, 16, 24) and found.dtype == torch.float32
    with Image.open(tmp_path / "picture.png") as opened:
        for path in (tmp_path / "picture.png", str(tmp_path / "picture.png")):
            assert torch.equal(model.preprocess(path), found)
        for form in (opened, picture):  # turned before they are resized instead of after
            levels = (model.preprocess(form) - found) * 255 * torch.tensor(model.preprocess.std)[:, None, None]
            assert levels.abs().max() < 3 and levels.abs().mean() < 0.5
            assert model.preprocess(form).std() > 0.1
    assert torch.equal(model.preprocess([content, content]), found.repeat(2, 1, 1, 1))
    # Undone, it is what the job of embedding loads.
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.preprocess.mean, model.preprocess.std))
    pixels = (found * std + mean) * 255
    description = read_description(tmp_path / "model")
    assert (pixels - load_images([content], description)[0]).abs().max() < 1e-3
    assert model.encode(found).tokens.shape == (1, 25, 16)


def test_a_loaded_model_takes_arrays(tmp_path: Path) -> None:
    model = exported(tmp_path / "model", 3, "image")
    array = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8)
    found = model.preprocess(array)
    assert found.shape == (3, 3, 16, 24)
    assert torch.equal(model.preprocess(list(array)), found)
    assert torch.equal(model.preprocess(array[0]), found[:1])
    assert torch.equal(model.preprocess(array[0, :, :, 0]), model.preprocess(array[0, :, :, :1].repeat(3, 2)))
    assert torch.equal(model.preprocess(Image.fromarray(array[0])), found[:1])


def test_a_loaded_model_takes_grids(tmp_path: Path) -> None:
    model = exported(tmp_path / "model", 5, "grid")
    grids = np.random.default_rng(0).standard_normal((2, 5, 16, 24), np.float32)
    np.save(tmp_path / "grid.npy", grids[0])
    found = model.preprocess(grids)
    mean, std = (np.array(values)[:, None, None] for values in (model.preprocess.mean, model.preprocess.std))
    assert np.abs(found.numpy() - (grids - mean) / std).max() < 1e-5
    for form in (grids[0], tmp_path / "grid.npy", (tmp_path / "grid.npy").read_bytes()):
        assert torch.equal(model.preprocess(form), found[:1])


def test_a_picture_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    model = exported(tmp_path / "model", 3, "image")
    good = np.zeros((20, 20, 3), np.uint8)
    for bad, cause in (
        (b"no picture", "not a JPEG, PNG or WebP image"),
        (np.zeros((4, 4, 2), np.uint8), "uint8 of shape"),
        (np.full((4, 4, 3), 0.5), "its pixels are not whole numbers"),
        (object(), "it is a object"),
    ):
        with pytest.raises(UserError, match=f"^image 2 of 2 cannot be used: {cause}"):
            model.preprocess([good, bad])
    with pytest.raises(UserError, match=r"none\.png cannot be read: No such file"):
        model.preprocess(str(tmp_path / "none.png"))


def test_a_model_that_was_not_loaded_has_no_preprocessing() -> None:
    with pytest.raises(AttributeError, match="preprocess"):
        _ = build_model(MODEL).preprocess
