"""Settings of `crate-ray register`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from crate_ray.config.base import PositiveInt, Settings
from crate_ray.config.evaluate import ProbeConfig
from crate_ray.config.identifiers import check_model_name
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig

ModelName = Annotated[str, AfterValidator(check_model_name)]


class RegisterConfig(Settings):
    """Add the encoder of a run, or the classifier of a fine-tuning, to the MLflow registry as a new version."""

    run: str
    """Model to register: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation loss), a
    checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors). MLflow must know its
    run."""
    name: ModelName = "crate-mae"
    """Name of the registered model."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""


Criterion = Literal["probe", "knn", "rank"]


class PromotionProbe(ProbeConfig):
    """Labelled data on which a version and the champion are measured. `train` is not needed for a classifier."""

    train: str | None = None  # type: ignore[assignment]
    """Local folder or s3://bucket/prefix of labelled shards (member `cls`) to fit the probe on, for an encoder."""
    test: str
    """Labelled shards to measure the accuracy on. They must not be among the shards of `train`."""


class PromoteConfig(Settings):
    """Give a version the alias @champion if it is better than the current champion on the same labelled samples.

    Encoders are compared by linear probe and k-NN, classifiers by their accuracy on probe.test. The first champion must
    beat an untrained encoder and raw pixels, or, for a classifier, the most frequent class.
    """

    version: PositiveInt
    """Version to promote."""
    name: ModelName = "crate-mae"
    """Name of the registered model."""
    probe: PromotionProbe
    """Labelled data, and the linear probe."""
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1)] = ("probe", "knn")
    """Measures of an encoder in which the version must pass: linear 'probe', 'knn', and the effective 'rank' of the
    features. All of them must pass."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How much worse than the champion the version may be. With 95 % confidence, the difference must be above -margin:
    with 0 the version must be better, with 0.01 at most one point of accuracy worse. For the rank it is relative."""
    force: bool = False
    """Promote even if the version does not pass; give the reason, too."""
    reason: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Why the version is promoted by force. It is recorded."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_force(self) -> Self:
        if self.force != (self.reason is not None):
            raise ValueError("give --force true and --reason TEXT together, or neither of them")
        return self


class RollbackConfig(Settings):
    """Give the alias @champion back to the champion before."""

    name: ModelName = "crate-mae"
    """Name of the registered model."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""


class CardConfig(Settings):
    """Print the model card of a version: data, recipe, figures, promotion, limits."""

    version: PositiveInt | None = None
    """Version; by default the champion."""
    name: ModelName = "crate-mae"
    """Name of the registered model."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""


class ListConfig(Settings):
    """List the versions of a registered model."""

    name: ModelName = "crate-mae"
    """Name of the registered model."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
