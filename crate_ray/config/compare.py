"""Settings of `crate-ray compare`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from crate_ray.config.base import Advanced, ConfigFile, PositiveInt, RunName, Settings
from crate_ray.config.evaluate import ProbeConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class CompareConfig(Settings):
    """Compare models fairly: the same data, steps, seeds and trainer, in one table with intervals."""

    name: RunName = "compare"
    """Name of the comparison; the same name and storage continue it, and finished runs are not repeated."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for the runs and the table."""
    base: ConfigFile[str]
    """YAML file with the pretraining settings of the CRATE-MAE to compare. In a YAML file, relative to its folder."""
    settings: dict[str, Any] = {}
    """Dotted pretraining settings that override the base in all runs, such as {training.steps: 500}."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds. Each model is trained once per seed; intervals are over the seeds."""
    baselines: bool = True
    """Also train a ViT-MAE of the same width, depth and heads, and one with as many parameters."""
    ablations: bool = False
    """Also train five variants of the model that each change one choice: output map, attention, decoder, tokens,
    sparsity."""
    successors: bool = False
    """Also train eleven variants that followed the published model, each with as many parameters: small initial
    weights, LayerScale, residuals, overcomplete dictionaries, visible keys in encoder or decoder, long steps, learned
    thresholds."""
    variants: dict[str, dict[str, Any]] = {}
    """More models: dotted settings by name, such as {wide: {model.dim: 384}}."""
    finetune: ConfigFile[str | None] = None
    """YAML file with fine-tuning settings. If set, every encoder is also fine-tuned on probe.train. As a control, the
    same encoder is trained on it from random weights. The accuracy is measured on probe.test."""
    finetune_settings: Advanced[dict[str, Any]] = {}
    """Dotted fine-tuning settings that override that file, such as {training.epochs: 10}."""
    launcher: Advanced[Literal["ray", "none"]] = "ray"
    """How runs are trained. 'ray': on Ray, with MLflow. 'none': in one process, with one GPU if there is one, for a
    machine that has torch but neither Ray nor MLflow. An interrupted run resumes, also with the other launcher."""
    probe: ProbeConfig
    """Labelled datasets for linear probe and k-NN."""
    components: Advanced[PositiveInt | None] = None
    """Measure features by this number of their principal components, those of the probe's training samples. So encoders
    of different widths are compared with as many numbers each. By default the features themselves are measured."""
    whiten: Advanced[bool] = False
    """Divide principal components by their standard deviation. Otherwise k-NN depends mostly on the few components that
    vary most, such as brightness or loudness."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""
