"""The registered model runs in its own environment: its requirements are enough, and it predicts the same."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from crate_ray.addresses import Address
from crate_ray.config import ClassifierConfig, CrateMAEConfig
from crate_ray.models import build_model
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.serving import FeatureExtractor, Predictor, load_images
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
        made = (Predictor if kind == "classifier" else FeatureExtractor).from_folder(folder / f"exported-{kind}")
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
