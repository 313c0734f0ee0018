"""Settings of `crate-ray evaluate compare`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from crate_ray.config.base import RunName, Settings
from crate_ray.config.evaluate import ProbeConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class CompareConfig(Settings):
    """Compare models fairly: the same data, steps, seeds and trainer, in one table with intervals."""

    name: RunName = "compare"
    """Name of the comparison. The same name and storage continue it; finished runs are not repeated."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for the runs and the table."""
    base: str
    """YAML file with the pretraining settings of the CRATE-MAE that the comparison is about (jobs/pretrain.py's)."""
    settings: dict[str, Any] = {}
    """Dotted pretraining settings that override the base's in all runs, such as {training.steps: 500}."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """Each model is trained once with each seed; intervals are over seeds."""
    baselines: bool = True
    """Train a ViT-MAE of the same width, depth and heads, and one of as many parameters."""
    ablations: bool = False
    """Train the model without each of the derivation's assumptions, one at a time: on output map, attention, decoder,
    tokens and sparsity."""
    variants: dict[str, dict[str, Any]] = {}
    """More models: dotted settings by name, such as {wide: {model.dim: 384}}."""
    finetune: str | None = None
    """YAML file with fine-tuning settings (jobs/finetune.py's). With it, every encoder is fine-tuned too, and for
    comparison trained in the same way from random weights, on probe.train; the accuracy is that on probe.test."""
    finetune_settings: dict[str, Any] = {}
    """Dotted fine-tuning settings that override those of the YAML file, such as {training.epochs: 10}."""
    launcher: Literal["ray", "none"] = "ray"
    """What trains: 'ray', with runs in MLflow that resume where they were cut off; or 'none', on a machine that has
    torch but neither Ray nor MLflow: one process, one GPU where there is one."""
    probe: ProbeConfig
    """Labelled datasets, for linear probe and k-NN."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""
