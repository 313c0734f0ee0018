"""Settings of `crate-ray evaluate`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, PositiveInt, Settings
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig

Feature = Literal["mean", "cls"]


class ProbeConfig(Settings):
    """Linear probe: logistic regression on features of the frozen encoder."""

    train: str
    """Local folder or s3://bucket/prefix of labelled shards (member `cls`) to fit the probe on."""
    test: str
    """Labelled shards to measure its accuracy on."""
    feature: Feature = "mean"
    """Feature of an image: 'mean' of the encoder's patch tokens, or the CLS token 'cls'."""
    layer: Advanced[PositiveInt | None] = None
    """Encoder layer 1 … L to take the feature from; by default the output of the encoder's last norm."""
    solver: Advanced[Literal["auto", "sklearn", "torch"]] = "auto"
    """Solver that fits the probe. 'sklearn' works in memory. 'torch' (L-BFGS) reads features from disk in batches and
    uses a GPU if there is one. 'auto' chooses torch for more than 1 GiB of features."""
    max_samples: Advanced[PositiveInt] = 10_000
    """Largest number of samples of each dataset to use, spread evenly over it."""
    seed: Advanced[Annotated[int, Field(ge=0)]] = 0
    """Seed of the untrained encoder, and of the split on which regularisation strength and layer are chosen."""


class EvaluateConfig(Settings):
    """Evaluate a pretrained encoder, compare it with controls, and write a report as HTML and JSON.

    Give any of probe, data and masks. The report has a section for each of them.
    """

    removed: ClassVar[dict[str, str]] = {
        "knn_neighbours": "k-NN uses 20 neighbours, as DINO does",
        "knn_temperature": "k-NN uses the temperature 0.07, as DINO does",
        "attention_mass": "segmentation keeps 0.6 of the attention, as DINO does",
    }

    model: str
    """Model to evaluate. Forms: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation
    loss), a checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors)."""
    baseline: str | None = None
    """Second model to compare with, for example a ViT-MAE trained on the same data; any form that `model` takes."""
    probe: ProbeConfig | None = None
    """Labelled datasets for linear probe and k-NN."""
    all_layers: Advanced[bool] = True
    """Also probe the features of every layer, and report the layer that is best on a part of the training samples."""
    components: Advanced[PositiveInt | None] = None
    """Measure features by this number of their principal components, those of the probe's training samples. So encoders
    of different widths are compared with as many numbers each. By default the features themselves are measured."""
    whiten: Advanced[bool] = False
    """Divide principal components by their standard deviation. Otherwise k-NN depends mostly on the few components that
    vary most, such as brightness or loudness."""
    data: str | None = None
    """Local folder or s3://bucket/prefix of held-out shards for reconstruction and layer structure."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Side in pixels, or [height, width], of the images; by default that of the training. Positions are interpolated.
    Larger images give finer maps of attention."""
    masks: str | None = None
    """Shards whose samples have a foreground mask (`mask.png`), for attention and segmentation."""
    max_images: Annotated[int, Field(ge=2)] = 512
    """Largest number of samples of data and of masks to use, spread evenly over them."""
    mask_ratios: Advanced[Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]] = (
        0.5,
        0.6,
        0.7,
        0.75,
        0.8,
        0.9,
        0.95,
    )
    """Mask ratios at which reconstruction is measured."""
    output: str | None = None
    """Local folder or s3://bucket/prefix of the report; by default `evaluation` (with image_size 64:
    `evaluation-64px`) in the model's folder, or in the working directory if the model has no folder."""
    workers: PositiveInt | None = None
    """Encoders that compute features in parallel, each on one CPU or GPU; by default one on each."""
    gpu: bool | None = None
    """Compute on GPUs; by default if the cluster has any."""
    features_dir: Advanced[str | None] = None
    """Local folder that caches features by content; by default in the user's cache folder."""
    features_bytes: Advanced[PositiveInt] = 20 * 2**30
    """Size limit of features_dir; least recently used features are evicted."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow. The report is added to the run that trained the model, if MLflow knows it."""
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
