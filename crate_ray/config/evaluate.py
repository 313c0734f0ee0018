"""Settings of `crate-ray evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from crate_ray.config.base import PositiveInt, Settings
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig

Feature = Literal["mean", "cls"]


class ProbeConfig(Settings):
    """Linear probe: logistic regression on features of the frozen encoder."""

    train: str
    """Local folder or s3://bucket/prefix of labelled shards (member `cls`) that the probe is fitted on."""
    test: str
    """The same for the samples that its accuracy is measured on."""
    feature: Feature = "mean"
    """'mean' of the encoder's patch tokens, or its CLS token 'cls'."""
    layer: PositiveInt | None = None
    """Encoder layer 1 … L whose output tokens the feature is taken from; by default after the encoder's last norm."""
    solver: Literal["auto", "sklearn", "torch"] = "auto"
    """Who fits: scikit-learn in memory, or L-BFGS on torch, which reads the features in batches from disk and uses a
    GPU where there is one. 'auto' takes torch for features of more than 1 GiB."""
    max_samples: PositiveInt = 10_000
    """Most samples of either dataset to use, spread evenly over it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the untrained encoder and of the split that the strength and the layer are chosen on."""


class EvaluateConfig(Settings):
    """Measure what a pretrained encoder learned, next to controls, and write a report: one HTML page and JSON.

    Give any of probe, data and masks; what needs data that is not given is left out of the report.
    """

    model: str
    """Folder of a run (its newest checkpoint; <run>@<step> for another), of a checkpoint or of an exported model (local
    or S3), runs:/<MLflow run>, models:/<name>@<alias>, or a file with a published checkpoint (.pth, .safetensors)."""
    baseline: str | None = None
    """Another model, given like model, to be measured beside it, such as a ViT-MAE of the same data."""
    probe: ProbeConfig | None = None
    """Labelled datasets, for linear probe and k-NN."""
    all_layers: bool = True
    """Probe the features of every layer too, and report the one that is best on a part of the training samples."""
    data: str | None = None
    """Local folder or s3://bucket/prefix of held-out shards, for reconstruction and the structure of the layers."""
    masks: str | None = None
    """The same of shards whose samples have a mask of the foreground (`mask.png`), for attention and segmentation."""
    max_images: Annotated[int, Field(ge=2)] = 512
    """Most samples of data and of masks to use, spread evenly over them."""
    mask_ratios: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        0.5,
        0.6,
        0.7,
        0.75,
        0.8,
        0.9,
        0.95,
    )
    """Shares of hidden patches that reconstruction is measured at."""
    knn_neighbours: PositiveInt = 20
    """Neighbours that vote in k-NN (DINO: 20)."""
    knn_temperature: Annotated[float, Field(gt=0)] = 0.07
    """Temperature τ of their weights exp(cosine / τ) (DINO: 0.07)."""
    attention_mass: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of an attention map's mass that is kept as foreground (DINO: 0.6)."""
    output: str | None = None
    """Local folder or s3://bucket/prefix of the report; by default `evaluation` in the model's folder, or in the
    working directory for models that are not in a folder."""
    workers: PositiveInt | None = None
    """Encoders that work at the same time on features, each on one CPU or one GPU; by default one on each."""
    gpu: bool | None = None
    """Compute on GPUs; by default where the cluster has any."""
    features_dir: str | None = None
    """Local folder that keeps features, by their content; by default in the user's cache."""
    features_bytes: PositiveInt = 20 * 2**30
    """Size limit of features_dir; what was used longest ago makes room."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow; the report goes to the run that trained the model, where it is known there."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.probe is None and self.data is None and self.masks is None:
            raise ValueError(
                "there is nothing to measure on; give --probe.train and --probe.test (labelled shards), --data "
                "(held-out shards) or --masks (shards with mask.png)"
            )
        return self
