"""Parses and loads model references. Every setting that names a model accepts all of these forms:

    runs/mine                                   a run: its newest checkpoint
    runs/mine@500, runs/mine@best               its checkpoint of a step, or of the lowest validation loss
    runs/mine/attempt-001/step-00000500-ab12    one checkpoint
    runs/mine/model                             an exported model (model.safetensors and model.json)
    models:/<name>@<alias>, models:/<name>/<version>    a model in MLflow's registry
    runs:/<id>, <id>                            a run by its MLflow id; also with @<step> or @best
    weights.pth, published:<file>               a published checkpoint of CRATE-MAE, CRATE, CRATE-α or ViT-MAE (.pth .pt
                                                .ckpt .bin .safetensors, also .pth.tar)

Folders and files may be local or on S3 (s3://bucket/prefix).
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from crate_ray.config import CrateMAEConfig, ModelConfig, S3Config, TrackingConfig, ViTMAEConfig
from crate_ray.errors import UserError
from crate_ray.models import CrateMAE, MaskedAutoencoder, ViTMAE, load_published
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    ModelDescription,
    export_model,
    load_any,
    load_exported,
    read_description,
)
from crate_ray.models.resolution import ImageSize, at_image_size
from crate_ray.runs.commits import BEST, CHECKPOINT_FOLDER, Which
from crate_ray.runs.export import export_run
from crate_ray.runs.mlflow_lookup import download_registered, run_storage
from crate_ray.runs.record import RUN_FILE
from crate_ray.serving import Preprocessor
from crate_ray.storage.interface import Storage, open_storage

PUBLISHED_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pth.tar", ".pt.tar", ".ckpt.tar")
FORMS = (
    "a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation loss), a checkpoint's folder, "
    "the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>, runs:/<MLflow run id>, or a "
    "published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors)"
)
"""The forms in words, for messages. The help text of every setting that names a model uses the same words."""

_PUBLISHED = "published:"
_REGISTERED, _MLFLOW_RUN = "models:/", "runs:/"
_MLFLOW_ID = re.compile(r"[0-9a-f]{32}")
_AT = re.compile(r"(.+)@(\d+|best)")
_CHECKPOINT = re.compile(f"(?:(.*)/)?({CHECKPOINT_FOLDER})/?")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Reference:
    """A parsed model reference."""

    text: str
    """As it was given."""
    kind: Literal["folder", "mlflow_run", "registered", "published"]
    """Kind: folder of a run or exported model, MLflow id of a run, registered model, or published checkpoint file."""
    path: str
    """Address of the folder or file, MLflow id, or MLflow's address of the registered model."""
    checkpoint: Which = None
    """Which checkpoint of the run."""


@dataclass(frozen=True)
class Located:
    """Folder that a reference points to."""

    storage: Storage
    """The run's folder, or the exported model's."""
    is_run: bool
    """Whether it is a run's."""


def parse(text: str) -> Reference:
    """Parse a model reference. This is a pure function: it opens nothing, and the model need not exist.

    Raises:
        UserError: the reference is empty.
    """
    if not text.strip():
        raise UserError(f"the model reference is empty; give {FORMS}")
    if text.startswith(_REGISTERED):
        return Reference(text, "registered", text)
    if text.startswith(_PUBLISHED):
        return Reference(text, "published", text.removeprefix(_PUBLISHED))
    if text.rpartition("/")[2].lstrip(".").endswith(PUBLISHED_SUFFIXES):
        return Reference(text, "published", text)
    if checkpoint := _CHECKPOINT.fullmatch(text):
        return Reference(text, "folder", "." if checkpoint[1] is None else checkpoint[1] or "/", checkpoint[2])
    path, which = text, None
    if at := _AT.fullmatch(text):
        path, which = at[1], BEST if at[2] == BEST else int(at[2])
    if path.startswith(_MLFLOW_RUN):
        return Reference(text, "mlflow_run", path.removeprefix(_MLFLOW_RUN), which)
    if _MLFLOW_ID.fullmatch(path):
        return Reference(text, "mlflow_run", path, which)
    return Reference(text, "folder", path, which)


def locate(text: str, tracking: TrackingConfig, s3: S3Config) -> Located | None:
    """Find the folder that a reference points to. None for registered models and published checkpoints.

    Raises:
        UserError: the reference points to a folder or an MLflow run, and there is no model.
    """
    reference = _without_suffix_trap(parse(text), s3)
    if reference.kind in ("registered", "published"):
        return None
    if reference.kind == "mlflow_run":
        return Located(run_storage(reference.path, tracking, s3), is_run=True)
    storage = open_storage(reference.path, s3)
    if storage.exists(RUN_FILE):
        return Located(storage, is_run=True)
    if storage.exists(DESCRIPTION_FILE):
        if reference.checkpoint is not None:
            raise UserError(f"{storage.uri} holds an exported model, which has no checkpoints; give its folder alone")
        return Located(storage, is_run=False)
    raise UserError(f"{storage.uri} holds neither a run nor an exported model; give {FORMS}")


def fetch(text: str, folder: Path, tracking: TrackingConfig, s3: S3Config) -> ModelDescription:
    """Write the model behind a reference into a local folder as an exported model (see models/exported.py).

    Raises:
        UserError: there is no such model.
    """
    reference = _without_suffix_trap(parse(text), s3)
    if reference.kind == "published":
        model = _download_published(reference.path, None, s3)
        description = _describe_published(model, text)
        export_model(folder, model.state_dict(), description)
        return description
    located = locate(text, tracking, s3)
    if located is not None and located.is_run:
        return export_run(located.storage, folder, reference.checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    files = (WEIGHTS_FILE, DESCRIPTION_FILE)
    if located is None:
        download_registered(reference.path, files, folder, tracking)
    else:
        for name in files:
            located.storage.download(name, folder / name)
    return read_description(folder)


def load(text: str, tracking: TrackingConfig, s3: S3Config) -> tuple[MaskedAutoencoder | Classifier, ModelDescription]:
    """Load the model behind a reference, in evaluation mode on the CPU, and its description.

    Returns:
        A masked autoencoder, or the classifier of a fine-tuning run.

    Raises:
        UserError: there is no such model.
    """
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        fetch(text, Path(temporary), tracking, s3)
        return load_any(Path(temporary))


def pinned(text: str, step: int, tracking: TrackingConfig, s3: S3Config) -> str:
    """A reference that names the same model in any working directory, and after the run has gone on.

    Args:
        text: a reference to a model.
        step: the step of the model that it refers to now.
        tracking: where MLflow is.
        s3: where S3 is.
    """
    reference = _without_suffix_trap(parse(text), s3)
    if reference.kind == "registered":
        return text
    if reference.kind == "published":
        parent, _, name = reference.path.rpartition("/")
        folder = open_storage(parent or ("/" if reference.path.startswith("/") else "."), s3).uri
        return f"{_PUBLISHED}{folder.rstrip('/')}/{name}"
    if reference.kind == "mlflow_run":
        return f"{_MLFLOW_RUN}{reference.path}@{step}"
    located = locate(text, tracking, s3)
    assert located is not None
    return f"{located.storage.uri}@{step}" if located.is_run else located.storage.uri


def load_encoder(
    text: str, tracking: TrackingConfig, s3: S3Config, image_size: ImageSize | None = None
) -> tuple[MaskedAutoencoder, ModelDescription]:
    """Load the masked autoencoder behind a reference, in evaluation mode on the CPU, and its description.

    With an image size, it is the model for such images (see resolution.at_image_size).

    Raises:
        UserError: there is no such model, it is a classifier, or its patches do not fit the image size.
    """
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        fetch(text, Path(temporary), tracking, s3)
        model, description = load_exported(Path(temporary))
    return (model, description) if image_size is None else at_image_size(model, description, image_size)


def load_weights(text: str, model: ModelConfig, tracking: TrackingConfig, s3: S3Config) -> dict[str, Tensor]:
    """Load the weights behind a reference, as CPU tensors by name, for a run that starts from them (init_from).

    Args:
        text: the reference.
        model: the run's model. A published checkpoint is read as one of this architecture and size.
        tracking: where MLflow is.
        s3: where S3 is.

    Raises:
        UserError: there are no such weights, or a published checkpoint has another architecture or size.
    """
    reference = _without_suffix_trap(parse(text), s3)
    if reference.kind != "published":
        return load_encoder(text, tracking, s3)[0].state_dict()
    found = _download_published(reference.path, model, s3)
    if not found.has_decoder:
        raise UserError(
            f"{text} holds an encoder without a decoder, which pretraining needs; give a checkpoint with both, or use "
            "this one with finetune, evaluate, embed or register"
        )
    return found.state_dict()


def load_model(
    reference: str,
    *,
    image_size: ImageSize | None = None,
    tracking: TrackingConfig | None = None,
    s3: S3Config | None = None,
) -> MaskedAutoencoder | Classifier:
    """Load a model by reference: `crate_ray.load_model("runs/mine@best")`.

    Args:
        reference: a run's folder, <run>@<step>, <run>@best, a checkpoint's folder, the folder of an exported model,
            models:/<name>@<alias>, models:/<name>/<version>, runs:/<MLflow run id>, or a published checkpoint file.
        image_size: side in pixels, or height and width, of the images, for a masked autoencoder. Its positions are
            interpolated. By default the size that it was trained on.
        tracking: where MLflow is; by default as for the jobs.
        s3: where S3 is; by default the usual AWS settings.

    Returns:
        A masked autoencoder or a fine-tuned classifier, a torch module in evaluation mode on the CPU. It takes
        normalised images; `model.preprocess(images)` makes them (see serving.Preprocessor).

    Raises:
        UserError: there is no such model, or it cannot take images of that size.
    """
    model, description = load(reference, tracking or TrackingConfig(), s3 or S3Config())
    if image_size is not None:
        if isinstance(model, Classifier):
            raise UserError(f"{reference} is a classifier for images of one size; leave out image_size")
        model, description = at_image_size(model, description, image_size)
    model.preprocess = Preprocessor(description)
    return model


def _without_suffix_trap(reference: Reference, s3: S3Config) -> Reference:
    """Correct a reference that looks like a checkpoint file, but is a folder with such a suffix."""
    if reference.kind != "published" or reference.text.startswith(_PUBLISHED):
        return reference
    storage = open_storage(reference.path, s3)
    if storage.exists(RUN_FILE) or storage.exists(DESCRIPTION_FILE):
        return Reference(reference.text, "folder", reference.path)
    return reference


def _download_published(path: str, config: CrateMAEConfig | ViTMAEConfig | None, s3: S3Config) -> CrateMAE | ViTMAE:
    parent, _, name = path.rpartition("/")
    storage = open_storage(parent or ("/" if path.startswith("/") else "."), s3)
    if (file := storage.local_path(name)) is not None:
        return _evaluated(load_published(file, config, name=path))
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        local = Path(temporary) / name
        storage.download(name, local)
        return _evaluated(load_published(local, config, name=path))


def _evaluated(model: CrateMAE | ViTMAE) -> CrateMAE | ViTMAE:
    return model.float().eval()


def _describe_published(model: CrateMAE | ViTMAE, text: str) -> ModelDescription:
    """Describe a published model. Like MAE, it was trained on images normalised with ImageNet's statistics."""
    if model.config.channels != len(_IMAGENET_MEAN):
        raise UserError(f"{text} is a model of {model.config.channels} channels; published checkpoints have 3")
    return ModelDescription(model=model.config, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, kind="image")
