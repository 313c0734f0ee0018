"""Settings of `crate-ray register`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

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


class PromoteConfig(Settings):
    """Give a version the alias @champion if its probe accuracy is at least that of the current champion."""

    version: PositiveInt
    """Version to promote."""
    name: ModelName = "crate-mae"
    """Name of the registered model."""
    probe: ProbeConfig
    """Linear probe that compares the version with the champion."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""


class ListConfig(Settings):
    """List the versions of a registered model."""

    name: ModelName = "crate-mae"
    """Name of the registered model."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
