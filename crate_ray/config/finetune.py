"""Settings of `crate-ray finetune`, and its recipes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, PositiveInt, RunName, Settings
from crate_ray.config.data import DataConfig
from crate_ray.config.models import CrateMAEConfig, ModelConfig
from crate_ray.config.storage import S3Config
from crate_ray.config.training import (
    CheckpointConfig,
    OptimConfig,
    ScalingConfig,
    TrackingConfig,
    TrainingConfig,
    check_step,
)

FINETUNE_RECIPES: dict[str, dict[str, Any]] = {
    "crate": {
        "pooling": "cls",
        "data": {"crop_scale": (0.08, 1.0)},
        "training": {"epochs": 200},  # batch 256 is the default; a small dataset gets a smaller one
        "optim": {
            "lr": 5e-5, "min_lr": 0.0, "warmup": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.01, "clip_norm": None,
        },
        "augment": {"randaugment": 2, "magnitude": 14.0, "mixup": 0.0, "cutmix": 0.0},
        "label_smoothing": 0.0, "drop_path": 0.0, "layer_decay": 1.0,
    },
    "mae": {
        "pooling": "mean",
        "data": {"crop_scale": (0.08, 1.0)},
        "training": {"batch_size": 1024, "epochs": 100},
        "optim": {
            "base_lr": 5e-4, "min_lr": 1e-6, "warmup": 0.05, "betas": (0.9, 0.999), "weight_decay": 0.05,
            "clip_norm": None,
        },
        "augment": {"randaugment": 2, "magnitude": 27.0, "mixup": 0.8, "cutmix": 1.0},
        "label_smoothing": 0.1, "drop_path": 0.1, "layer_decay": 0.65,
    },
}  # fmt: skip
"""Settings by recipe.

'crate': finetune.py and README of the public CRATE code: AdamW (0.9, 0.999), weight decay 0.01, cosine without warm-up,
batch 256, RandAugment(2, 14), torchvision's random resized crop, flip, CLS token; rate and epochs are those for CIFAR
(Pets and Flowers: lr 1e-4, 400 epochs). Its weight decay includes biases and norms, ours does not.

'mae': table 9 of arXiv 2111.06377 and the public MAE code, for ViT-Base: batch 1024, base rate 5e-4, 5 of 100 epochs of
warm-up, layer decay 0.65, drop path 0.1, mixup 0.8, CutMix 1.0, label smoothing 0.1, RandAugment(2, 9 of 10), mean of
patch tokens; without the random erasing of that code, which the table does not have."""


Pooling = Literal["cls", "mean"]


class ClassifierConfig(Settings):
    """A classifier: an encoder, a feature of it, then a norm and a linear map to classes."""

    num_classes: PositiveInt
    """Number of classes."""
    pooling: Pooling = "cls"
    """Feature: 'cls', the CLS token of the last layer, or 'mean' of its patch tokens."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers, if known."""


class AugmentConfig(Settings):
    """Augmentation of training samples besides crop and flip."""

    randaugment: Annotated[int, Field(ge=0, le=14)] = 2
    """Operations that RandAugment (arXiv 1909.13719) applies to each image; 0 for none."""
    magnitude: Advanced[Annotated[float, Field(gt=0, lt=30)]] = 14.0
    """Magnitude M of RandAugment, out of 30, with the operations and ranges of torchvision."""
    mixup: Advanced[Annotated[float, Field(ge=0)]] = 0.0
    """α of mixup (arXiv 1710.09412); 0 for none. Pairs of samples are averaged with a weight λ ~ Beta(α, α), drawn for
    each batch."""
    cutmix: Advanced[Annotated[float, Field(ge=0)]] = 0.0
    """α of CutMix (arXiv 1905.04899); 0 for none. A box of area 1 − λ comes from the other sample of the pair. With
    mixup too, each batch uses one of the two at random."""


class FinetuneConfig(Settings):
    """Train a pretrained encoder to classify labelled images, on Ray.

    A recipe gives the defaults of the settings that are not set.
    """

    name: RunName = "finetune"
    """Name of the run; the same name and storage resume it."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for checkpoints and results. On several nodes, all of them must reach it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of new weights, the data order, augmentation, mixing and drop path."""
    model: str = "scratch"
    """Pretrained encoder. Forms: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation
    loss), a checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors). 'scratch:<any of these>' is
    the same encoder with random weights, as a control; 'scratch' is the encoder of the settings under `encoder` with
    random weights."""
    encoder: Advanced[ModelConfig] = CrateMAEConfig()
    """Encoder of model 'scratch', as for pretraining."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Side in pixels, or [height, width], of the images; by default that of the pretrained encoder. Its positions are
    interpolated."""
    recipe: Literal["crate", "mae"] = "crate"
    """Recipe that gives the defaults: 'crate', the fine-tuning of the public CRATE code, or 'mae', that of MAE (arXiv
    2111.06377, table 9) with layer-wise decay, mixup, CutMix, drop path and label smoothing."""
    pooling: Pooling = "cls"
    """Feature to classify: 'cls', the CLS token of the last layer, or 'mean' of its patch tokens."""
    data: DataConfig
    """Labelled datasets: every sample has its class as member `cls`."""
    training: TrainingConfig = TrainingConfig(epochs=200)
    """Batch, length and precision."""
    optim: OptimConfig = OptimConfig(lr=5e-5, warmup=0.0, betas=(0.9, 0.999), weight_decay=0.01, clip_norm=None)
    """Optimizer and its learning rate."""
    layer_decay: Advanced[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Layer-wise decay: each encoder layer's learning rate is this factor times the rate of the layer above. The
    classifier has the full rate, and the patch embedding has layer_decay ** (depth + 1) times the full rate."""
    drop_path: Advanced[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Drop path (stochastic depth, arXiv 1603.09382): share of samples that skip a residual branch in the last layer.
    It rises linearly from 0 in the first layer. In CRATE the branch is the compression step; ISTA has no residual."""
    label_smoothing: Advanced[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Label smoothing: share of each label that is spread over all classes."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation besides crop and flip."""
    scaling: ScalingConfig = ScalingConfig()
    """Ray Train workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is saved."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        recipe = FINETUNE_RECIPES.get(values.get("recipe", "crate"), {})
        filled = dict(values)
        for name, preset in recipe.items():
            given = values.get(name)
            if not isinstance(preset, dict):
                filled.setdefault(name, preset)
            elif given is None or isinstance(given, dict):
                filled[name] = {**preset, **(given or {})}
        for ours, theirs, group in (("epochs", "steps", "training"), ("lr", "base_lr", "optim")):
            given = values.get(group)
            if isinstance(given, dict) and given.get(theirs) is not None and given.get(ours) is None:
                filled[group].pop(ours, None)
        optim = values.get("optim")
        if isinstance(optim, dict) and optim.get("optimizer") == "lion" and "betas" not in optim:
            filled["optim"].pop("betas", None)  # the recipe's are AdamW's
        return filled

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        check_step(self.training, self.optim)
        if self.checkpoint.keep_best_by != "validation_loss":
            raise ValueError("checkpoint.keep_best_by is a setting of pretraining; leave it at 'validation_loss'")
        if self.checkpoint.keep_best and not self.data.validation:
            raise ValueError("checkpoint.keep_best compares validation losses; set data.validation")
        if self.image_size is not None and self.model == "scratch":
            raise ValueError("image_size is for a pretrained model; set encoder.image_size")
        if self.mixes and self.training.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix need an even training.batch_size, not {self.training.batch_size}: they mix pairs of "
                "samples"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether pairs of samples are mixed."""
        return bool(self.augment.mixup or self.augment.cutmix)
