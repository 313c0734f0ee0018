"""The record of a run, <run>/run.json: everything that is fixed when the run first starts."""

from __future__ import annotations

from pydantic import FiniteFloat, ValidationError

from crate_ray.config import (
    ClassifierConfig,
    CrateMAEConfig,
    FinetuneConfig,
    Kind,
    ModelConfig,
    PretrainConfig,
    Settings,
    ViTMAEConfig,
)
from crate_ray.config.identifiers import Count, RunKey, Sha256
from crate_ray.data.order.sequence import SampleOrder
from crate_ray.errors import UserError, invalid_value
from crate_ray.storage.interface import NotFound, Storage

RUN_FILE = "run.json"


class Parent(Settings):
    """The model that a fine-tuning run starts from."""

    reference: str
    """The model reference given in the settings."""
    run_key: RunKey | None = None
    """Key of the run that trained it, if known."""
    dataset: Sha256 | None = None
    """Digest of its training data."""
    step: Count = 0
    """Number of optimizer steps it was trained for."""


class FinetuneStart(Settings):
    """Encoder and classifier of a fine-tuning run."""

    encoder: ModelConfig
    """Architecture of the encoder."""
    classifier: ClassifierConfig
    """The classifier on top of the encoder."""
    parent: Parent | None = None
    """The model whose encoder weights are used; None for random weights."""


class RunRecord(Settings):
    """Everything that is fixed when a run first starts. Every resume must agree with it."""

    run_key: RunKey
    """Random key that identifies the run in MLflow, independent of its name."""
    config: PretrainConfig | FinetuneConfig
    """Settings of the first start."""
    finetune: FinetuneStart | None = None
    """Encoder and classifier of a fine-tuning run; None for a pretraining run."""
    dataset: Sha256
    """Digest of the training data's manifest."""
    order: SampleOrder
    """Order of the training data."""
    kind: Kind
    """Kind of the samples."""
    mean: tuple[FiniteFloat, ...]
    """Mean per channel, subtracted from the input."""
    std: tuple[FiniteFloat, ...]
    """Standard deviation per channel. The input is divided by it."""
    threads: Count
    """Torch threads of each worker. A different number changes the rounding."""
    initial_weights: Sha256 | None = None
    """SHA-256 of the weights the run starts from; None for random weights."""

    @property
    def model(self) -> CrateMAEConfig | ViTMAEConfig:
        """Architecture of the model, or of the encoder that is fine-tuned."""
        if isinstance(self.config, PretrainConfig):
            return self.config.model
        assert self.finetune is not None
        return self.finetune.encoder


def read_record(run: Storage) -> RunRecord | None:
    """Read the record of a run. Returns None if the run has never started.

    Raises:
        UserError: the file cannot be read as a record.
    """
    try:
        return RunRecord.model_validate_json(run.read_small(RUN_FILE))
    except NotFound:
        return None
    except ValidationError as error:
        raise UserError(
            f"{run.uri}/{RUN_FILE} cannot be read ({invalid_value(error)}); restore it, or choose another --name"
        ) from None


def write_record(run: Storage, record: RunRecord) -> None:
    """Write the record of a run."""
    run.write(RUN_FILE, record.model_dump_json(indent=2).encode())
