"""A trained model as two files: model.safetensors, and model.json, which says how to build and how to feed it."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from crate_ray.config import ClassifierConfig, ModelConfig, Settings
from crate_ray.data.decode import Kind
from crate_ray.data.storage import Storage
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.classifier import Classifier
from crate_ray.training.checkpoint import RunRecord, load_weights

WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"


class ModelDescription(Settings):
    """What weights alone do not say."""

    model: ModelConfig
    """Architecture and sizes; of a classifier, those of its encoder."""
    classifier: ClassifierConfig | None = None
    """Of a fine-tuned classifier: what is on top of the encoder."""
    mean: tuple[float, ...]
    """Mean per channel that is subtracted from the input (images on the scale 0 to 1)."""
    std: tuple[float, ...]
    """Standard deviation per channel that the input is divided by."""
    kind: Kind
    """'image': takes encoded or uint8 images; 'grid': float arrays."""
    dataset: str | None = None
    """Digest of the training data's manifest."""
    run_key: str | None = None
    """The run that trained it."""
    step: int = 0
    """Optimiser steps behind the weights."""

    @classmethod
    def of(cls, record: RunRecord, step: int) -> ModelDescription:
        """That of a run's model after some steps."""
        return cls(
            model=record.model,
            classifier=record.finetune.classifier if record.finetune else None,
            mean=record.mean,
            std=record.std,
            kind=record.kind,
            dataset=record.dataset,
            run_key=record.run_key,
            step=step,
        )


def export_run(run: Storage, folder: Path, step: int | None = None) -> ModelDescription:
    """Write the weights of a run's newest checkpoint, or of that of a step, into a local folder as a model.

    Raises UserError when the run has no such checkpoint.
    """
    state, weights = load_weights(run, step)
    description = ModelDescription.of(state.run, state.step)
    export_model(folder, weights, description)
    return description


def export_model(folder: Path, weights: dict[str, Tensor], description: ModelDescription) -> None:
    """Write a model into a local folder."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2))


def load_exported(folder: Path) -> tuple[MaskedAutoencoder, ModelDescription]:
    """Masked autoencoder in evaluation mode, and its description, from a local folder.

    Raises UserError when the files are missing or do not belong together, or hold a classifier.
    """
    model, description = load_any(folder)
    if isinstance(model, Classifier):
        raise UserError("this model is a fine-tuned classifier, a pretrained one is needed; give that")
    return model, description


def load_any(folder: Path) -> tuple[MaskedAutoencoder | Classifier, ModelDescription]:
    """Masked autoencoder or classifier in evaluation mode, and its description, from a local folder.

    Raises UserError when the files are missing or do not belong together.
    """
    try:
        description = ModelDescription.model_validate_json((folder / DESCRIPTION_FILE).read_bytes())
        model: MaskedAutoencoder | Classifier
        if description.classifier is None:
            model = build_model(description.model)
        else:
            model = Classifier(description.model, description.classifier)
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (OSError, ValidationError, RuntimeError, safetensors.SafetensorError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"{folder} does not hold a model as this version writes them: {cause}") from None
    return model.eval(), description
