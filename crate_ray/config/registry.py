"""Settings of `crate-ray register`."""

from __future__ import annotations

from crate_ray.config.base import PositiveInt, Settings
from crate_ray.config.evaluate import ProbeConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class RegisterConfig(Settings):
    """Make a run's encoder, or a fine-tuning's classifier, a new version of a registered MLflow model."""

    run: str
    """The run: its folder (storage/name, local or S3), or its id in MLflow."""
    name: str = "crate-mae"
    """Name of the registered model."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""


class PromoteConfig(Settings):
    """Give a version of a registered model the alias @champion when its probe accuracy is not below the champion's."""

    version: PositiveInt
    """Version to promote."""
    name: str = "crate-mae"
    """Name of the registered model."""
    probe: ProbeConfig
    """The probe that decides."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""


class ListConfig(Settings):
    """Show the versions of a registered model."""

    name: str = "crate-mae"
    """Name of the registered model."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
