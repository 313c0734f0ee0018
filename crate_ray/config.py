"""Every setting of every job, as one family of strict pydantic models.

A field's docstring is its documentation: `--help` prints it. Units are named where there are any.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: unknown names are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


# --- Models ---------------------------------------------------------------------------------------------------------

PresetName = Literal["tiny", "small", "base", "large"]

CRATE_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"dim": 384, "depth": 12, "num_subspaces": 6},
    "small": {"dim": 576, "depth": 12, "num_subspaces": 12},
    "base": {"dim": 768, "depth": 12, "num_subspaces": 12},
    "large": {"dim": 1024, "depth": 24, "num_subspaces": 16},
}
"""The four published sizes (arXiv 2404.02446, appendix). The decoder is as deep as the encoder and p = d / K; both
follow from the fields' defaults, so that an override of depth or num_subspaces carries them along."""

VIT_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 384, "depth": 12, "num_heads": 6, "decoder_depth": 8, "qkv_bias": False},
    "small": {"dim": 576, "depth": 12, "num_heads": 12, "decoder_depth": 8, "qkv_bias": False},
    "base": {
        "dim": 768, "depth": 12, "num_heads": 12, "decoder_depth": 8, "decoder_num_heads": 16, "qkv_bias": False,
    },
    "large": {
        "dim": 1024, "depth": 24, "num_heads": 16, "decoder_depth": 8, "decoder_num_heads": 16, "qkv_bias": False,
    },
    "tiny-matched": {"dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.125},
    "small-matched": {"dim": 288, "depth": 12, "num_heads": 6},
    "base-matched": {"dim": 384, "depth": 12, "num_heads": 6},
    "large-matched": {"dim": 512, "depth": 24, "num_heads": 8},
}  # fmt: skip
"""Baselines. 'base' and 'large' are the ViT-MAE that the CRATE-MAE authors compare with (their mae_vit_base, 143.79 M
with its frozen tables: MAE's 8 decoder layers at the encoder's width, no qkv bias); 'tiny' and 'small' follow their
pattern. '-matched' halves a CRATE-MAE preset's width at its depths: a ViT layer has about 12 d² parameters, a CRATE
layer 3 d²."""


def fill_from_preset(values: Any, presets: dict[str, dict[str, int]]) -> Any:
    """Give a preset's sizes to the fields that were not set explicitly."""
    if isinstance(values, dict) and values.get("preset") in presets:
        return {**presets[values["preset"]], **values}
    return values


def whole_number(value: Any) -> Any:
    """A number that a command line gave as text, before validation; anything else as it is."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class ImageModelConfig(Settings):
    """What CRATE-MAE and ViT-MAE have in common: the patch grid and the masked-completion objective."""

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """Image side in pixels, or [height, width]."""
    patch_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 16
    """Patch side in pixels, or [height, width]; divides the image size."""
    channels: PositiveInt = 3
    """Channels of the input: 3 for colour images, 1 for grayscale, any number for .npy grids."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of patches hidden from the model; floor(N (1 - mask_ratio)) of N stay visible."""
    norm_pix_loss: bool = False
    """Predict each patch's pixels normalised by that patch's mean and variance (MAE) instead of the plain pixels."""

    @field_validator("image_size", "patch_size", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size, self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Number of patches down and across."""
        return self.image_hw[0] // self.patch_hw[0], self.image_hw[1] // self.patch_hw[1]

    @property
    def num_patches(self) -> int:
        """Number N of patches of one image."""
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def num_visible(self) -> int:
        """Number of patches that stay visible: ⌊N (1 − mask_ratio)⌋ (published code)."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        for side, image, patch in zip(("height", "width"), self.image_hw, self.patch_hw, strict=True):
            if image % patch:
                near = dict.fromkeys((image // patch * patch or patch, (image // patch + 1) * patch))
                raise ValueError(
                    f"image {side} {image} is not divisible by patch {side} {patch}; "
                    f"use an image size of {' or '.join(map(str, near))}"
                )
        if self.num_visible < 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} leaves none of the {self.num_patches} patches visible; lower it"
            )
        return self


class CrateMAEConfig(ImageModelConfig):
    """CRATE-MAE (arXiv 2404.02446). The defaults are the published base model at 224²."""

    architecture: Literal["crate_mae"] = "crate_mae"
    """Which model this is."""
    preset: PresetName | None = None
    """Published size; fields set beside it win over its values."""
    dim: PositiveInt = 768
    """Token dimension d; divisible by 4 (positions are sine-cosine in 2-D)."""
    depth: PositiveInt = 12
    """Number of encoder layers."""
    decoder_depth: PositiveInt | None = None
    """Number of decoder layers; by default as many as in the encoder."""
    num_subspaces: PositiveInt = 12
    """Number K of subspaces in the codebook U_[K] (the attention heads)."""
    subspace_dim: PositiveInt | None = None
    """Dimension p of each subspace; d / K by default. K·p may differ from d."""
    sparsity_lambda: Annotated[float, Field(ge=0)] = 0.5
    """λ, the weight of the sparsity penalty in ISTA (published CRATE-MAE: 0.5; supervised CRATE: 0.1)."""
    step_size: Annotated[float, Field(gt=0)] = 0.1
    """η, the step size of ISTA (published: 0.1)."""
    output_map: Literal["learned", "tied"] = "learned"
    """MSSA's output map: 'learned' W with bias (published), or 'tied' to [U_1 … U_K], the form that the derivation of
    the compression step gives."""
    attention: Literal["softmax", "linear"] = "softmax"
    """Subspace attention: 'softmax' (published), or 'linear', without softmax: the gradient of R^c before the softmax
    approximation."""
    decoder_maps: Literal["free", "tied"] = "free"
    """Decoder parameters: 'free' (published), or 'tied' to the encoder's mirrored layer (V = U, E = Dᵀ), the
    discretised time reversal in its strict form. 'tied' needs decoder_depth = depth."""
    encoder_tokens: Literal["all", "visible"] = "all"
    """What the encoder sees: 'all' N + 1 tokens, masked ones as mask tokens (published), or 'visible' ones only, as in
    MAE; shows what the mask tokens in the encoder cost and bring."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        values = fill_from_preset(values, CRATE_PRESETS)
        if isinstance(values, dict):
            values = dict(values)
            if values.get("decoder_depth") is None:
                values["decoder_depth"] = values.get("depth", cls.model_fields["depth"].default)
            if values.get("subspace_dim") is None:
                values.pop("subspace_dim", None)
                dim = whole_number(values.get("dim", cls.model_fields["dim"].default))
                count = whole_number(values.get("num_subspaces", cls.model_fields["num_subspaces"].default))
                if isinstance(dim, int) and isinstance(count, int) and count > 0 and dim % count == 0:
                    values["subspace_dim"] = dim // count
        return values

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is not divisible by 4, which 2-D sine-cosine positions need")
        if self.subspace_dim is None:
            raise ValueError(
                f"dim {self.dim} is not divisible by num_subspaces {self.num_subspaces}; set subspace_dim explicitly"
            )
        if self.decoder_maps == "tied" and self.decoder_depth != self.depth:
            raise ValueError(
                f"decoder_maps 'tied' needs decoder_depth equal to depth, got {self.decoder_depth} and {self.depth}"
            )
        return self


class ViTMAEConfig(ImageModelConfig):
    """ViT-MAE, the baseline (arXiv 2111.06377), at the configuration of a CRATE-MAE preset or its parameter count."""

    architecture: Literal["vit_mae"] = "vit_mae"
    """Which model this is."""
    preset: (
        Literal["tiny", "small", "base", "large", "tiny-matched", "small-matched", "base-matched", "large-matched"]
        | None
    ) = None
    """A CRATE-MAE preset's width, encoder depth and heads; '-matched' has that preset's parameter count within 2 %.
    Fields set beside it win over its values."""
    dim: PositiveInt = 768
    """Token dimension of the encoder; divisible by 4 and by num_heads."""
    depth: PositiveInt = 12
    """Number of encoder layers."""
    num_heads: PositiveInt = 12
    """Number of attention heads of the encoder."""
    decoder_dim: PositiveInt | None = None
    """Token dimension of the decoder; by default the encoder's."""
    decoder_depth: PositiveInt | None = None
    """Number of decoder layers; by default as many as in the encoder."""
    decoder_num_heads: PositiveInt | None = None
    """Number of attention heads of the decoder; by default the encoder's."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the MLP as a multiple of the token dimension."""
    qkv_bias: bool = True
    """Biases in the query, key and value projections (MAE: yes; the CRATE-MAE authors' ViT-MAE: no)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        values = fill_from_preset(values, VIT_PRESETS)
        if isinstance(values, dict):
            values = dict(values)
            for name in ("dim", "depth", "num_heads"):
                if values.get(f"decoder_{name}") is None:
                    values[f"decoder_{name}"] = values.get(name, cls.model_fields[name].default)
        return values

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        sizes = (("", self.dim, self.num_heads), ("decoder_", self.decoder_dim or 0, self.decoder_num_heads or 1))
        for part, dim, heads in sizes:
            if dim % 4:
                raise ValueError(f"{part}dim {dim} is not divisible by 4, which 2-D sine-cosine positions need")
            if dim % heads:
                raise ValueError(f"{part}dim {dim} is not divisible by {part}num_heads {heads}")
        return self


def _default_architecture(value: Any) -> Any:
    return {"architecture": "crate_mae", **value} if isinstance(value, dict) else value


# ViTMAE first: --help shows the last one's default of a field that both have.
ModelConfig = Annotated[
    ViTMAEConfig | CrateMAEConfig, Field(discriminator="architecture"), BeforeValidator(_default_architecture)
]


# --- Data -----------------------------------------------------------------------------------------------------------


class S3Config(Settings):
    """Where S3 is. Credentials come only from the usual AWS chain (environment, ~/.aws, instance role)."""

    endpoint_url: Annotated[str | None, Field(repr=False)] = None
    """Address of an S3-compatible store, such as http://127.0.0.1:7480; not set: AWS_ENDPOINT_URL, or AWS itself."""
    region: str | None = None
    """Region name; the AWS chain's when not set."""
    connect_timeout: Annotated[float, Field(gt=0)] = 5.0
    """Seconds to wait for a connection."""
    read_timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds to wait for more bytes of a response."""
    retry_seconds: Annotated[float, Field(ge=0)] = 120.0
    """Seconds without progress after which a request is given up: a run survives an outage of the store, or expired
    credentials, for so long. An endpoint that never answered is given up after 10 s. 0 turns retries off."""
    max_attempts: PositiveInt = 40
    """Attempts without progress after which a request is given up, however short a time they took; waits between them
    are random, from 0 to 0.1 s at first, doubling up to 20 s (about 20 attempts fit into 120 s)."""


class PrepareConfig(Settings):
    """Pack images into WebDataset shards with a manifest and an index, or index the shards that are already there."""

    source: str | None = None
    """What to pack: a folder (or s3://bucket/prefix) of images or .npy grids, class folders optional, or of .tar shards
    to repack; or the built-in 'digits' (scikit-learn's, 8×8, 1 channel) or 'shapes' (procedural, with masks). Not set:
    index the shards under output."""
    output: str
    """Local folder or s3://bucket/prefix of the dataset: shards, index and manifest."""
    shards: str = "*.tar"
    """Which shards to index or to repack: 'train-*.tar', 'train-{00000..00049}.tar', '{train,extra}-*.tar'; all that
    braces stand for must be there. To index shards elsewhere, which are only read, their address, such as
    's3://bucket/cifar10/train-{00000..00049}.tar' or '/data/cifar10/*.tar'."""
    split: Literal["all", "train", "test"] = "all"
    """Part of a built-in dataset: every sample, or the fixed 80 % for training or 20 % for testing."""
    num_samples: PositiveInt = 2000
    """Number of samples of the procedural 'shapes' set."""
    image_size: PositiveInt = 64
    """Image side of the procedural 'shapes' set, in pixels."""
    shard_bytes: PositiveInt = 256 * 2**20
    """Start a new shard when the current one reaches this many bytes, after a multiple of 16 samples."""
    shard_samples: PositiveInt = 10_000
    """Start a new shard when the current one holds this many samples."""
    shuffle: bool = True
    """Pack the samples in a random order (fixed by seed), so that neighbours in a shard are unrelated."""
    seed: int = 0
    """Seed of the packing order and of the procedural set."""
    max_side: Annotated[PositiveInt | None, Field(validation_alias=AliasChoices("max_side", "max-side"))] = None
    """Largest shortest side in pixels: while packing, an image whose shortest side is longer is encoded anew with this
    shortest side (antialiased, upright, without metadata), its mask.png with it. Smaller ones stay byte for byte. By
    default nothing is encoded anew. Usual are 256 to 480."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Quality of JPEGs and WebPs that max_side encodes anew, 1 to 100; PNGs stay PNGs."""
    overwrite: bool = False
    """Replace a dataset, or the beginning of another one, that is already under output."""
    lease_seconds: Annotated[float, Field(ge=1)] = 30.0
    """One process at a time writes to an output. One that was killed keeps it for so many seconds; they must be longer
    than any stall of the machine or the store."""
    s3: S3Config = S3Config()
    """Object storage."""


class DataConfig(Settings):
    """What to train on, in which order, and how samples become batches."""

    train: Annotated[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)] | str
    """Local folder or s3://bucket/prefix with the training shards, as written or indexed by jobs/prepare.py. Or several
    of them with the share that each has in every batch, in proportion: {s3://data/photos: 3, s3://data/drawings: 1}."""
    validation: str | None = None
    """The same for held-out samples; masked validation loss and pictures come from them."""
    shuffle: bool = True
    """Read in the epoch's pseudo-random order; false keeps the order of the shards."""
    block_samples: PositiveInt | None = None
    """Samples b that are always read together, as one ranged GET. By default 1 for data that fits memory_bytes, else as
    many as make about 2 MiB."""
    window_blocks: PositiveInt | None = None
    """Blocks g of one lane that are shuffled together. By default as many as buffer_bytes allows."""
    lanes: PositiveInt | None = None
    """Number L of lanes, each in another place of the epoch, that every batch is drawn from equally. By default 32, or
    what small data or a small batch has room for; 1 for data that fits memory_bytes, which needs none."""
    memory_bytes: PositiveInt = 2 * 2**30
    """Data up to this many bytes is kept in memory by every worker, and shuffled sample by sample."""
    buffer_bytes: PositiveInt = 2**30
    """Most encoded bytes that one worker has in memory while streaming: of the windows that its lanes draw from, of
    those ahead, and of batches that wait for decoding. The more there are of them, over all workers, the better data is
    shuffled that lies sorted in its shards. What the lanes draw from is fixed when a run begins: where a run goes on
    with fewer workers than it was planned for and that exceeds these bytes, the rest waits in unnamed files in
    cache_dir or the temporary folder (up to fetch_threads reads of part_bytes each are in memory on the way there), no
    window is read ahead, and a warning says so."""
    fetch_threads: PositiveInt = 8
    """Concurrent ranged reads per worker."""
    part_bytes: PositiveInt = 8 * 2**20
    """Largest ranged read: longer stretches are read in parts of about this size, in parallel."""
    cache_dir: str | None = None
    """Local folder that keeps what was read, for all workers of a node; none by default."""
    cache_bytes: PositiveInt = 50 * 2**30
    """Size limit of cache_dir; what was used longest ago makes room."""
    max_bad_fraction: Fraction = 0.01
    """Share of samples that may be unreadable (they are replaced and reported); above it the run stops."""
    max_pixels: PositiveInt = 2**26
    """Images with more pixels than this count as unreadable: they may be decompression bombs."""
    decode_threads: PositiveInt | None = None
    """Threads that decode and augment, per worker; by default the CPUs of the worker."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """Where JPEGs are decoded: 'cuda' decodes and crops on the GPU that trains (nvJPEG; needs a torchvision that fits
    torch), for hosts whose CPUs cannot keep up. Pixels differ a little from the CPU's."""
    prefetch_batches: PositiveInt = 4
    """Batches to have decoded ahead of the training step."""
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Random resized crop: smallest and largest share of the image's area. [1, 1] keeps the centre, as large as the
    aspect ratio of the model's image allows."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: smallest and largest aspect ratio (width / height)."""
    flip: bool = True
    """Mirror every other sample left to right."""
    mean: tuple[float, ...] | None = None
    """Mean per channel that is subtracted, for images on the scale 0 to 1; the dataset's own by default."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel that is divided by; the dataset's own by default."""

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if min(self.crop_ratio) <= 0:
            raise ValueError(f"crop_ratio is {list(self.crop_ratio)}; aspect ratios are positive")
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} is {[low, high]}; give the smaller number first")
        return self


# --- Training -------------------------------------------------------------------------------------------------------


class OptimConfig(Settings):
    """AdamW with linear warm-up and cosine decay, per step."""

    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Learning rate for a batch of 256; the peak rate is base_lr × batch_size / 256 (MAE)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate as it is; overrides base_lr."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the last step."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up: a share of the run below 1, a number of steps from 1 on."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the two moment estimates."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; biases, norms and tokens have none."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; null for no clipping."""


class TrainingConfig(Settings):
    """How long, how large and how precise."""

    batch_size: PositiveInt = 256
    """Global batch: samples per optimiser step over all workers. Part of the experiment, not of the cluster."""
    micro_batch_size: PositiveInt | None = None
    """Most samples that one worker puts through the model at once; larger local batches are accumulated. By default the
    whole local batch."""
    steps: PositiveInt | None = None
    """Optimiser steps of the run; set this or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training data; set this or steps. Of a mixture: times that so many samples are drawn as its
    datasets hold together."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: 'auto' takes bf16 where the device computes in it, else fp32."""
    compile: Literal["auto", "layers", "off"] = "auto"
    """Compile the model's 'layers' with torch.compile, which takes up to a minute when a run starts and needs a C++
    compiler on the CPU; 'auto' does on a GPU (on the CPU it gains little). Where it fails, training goes on without and
    says so."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the layer twice: a fraction of the memory for
    a third more time. The numbers stay the same."""
    validate_every: PositiveInt | None = None
    """Steps between validations on all held-out samples (and once at the end); only at the end by default."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Steps in a row that may be skipped because their loss or gradient is not finite: they change nothing and are
    counted. After more of them the run stops."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """Profile the first worker in the steps from the first number to the second with torch.profiler, such as [20, 25]:
    a trace and a table of operators are written to profile/ in the run's folder."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either steps or epochs, and not both")
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps is {list(self.profile_steps)}; give the first step first")
        return self


class ScalingConfig(Settings):
    """The Ray Train worker group."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of training processes. Or the least and the most of them, such as [2, 8]: the run takes what the cluster
    has, and goes on from its newest checkpoint with another number when nodes come or go. Batches stay the same."""
    resize_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between two looks for nodes that came, where workers is a range."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How workers share a model: 'ddp', each holds all of it; 'fsdp' (FSDP2), each holds and updates an equal part of
    weights, gradients and optimiser state, and layers are gathered as they are needed: for models that do not fit.
    'auto' is ddp. A run may go on with another one."""
    gpu: bool | None = None
    """One GPU per worker; by default where the cluster has GPUs for all of them."""
    cpus_per_worker: PositiveInt | None = None
    """CPUs that each worker reserves and computes on; by default an equal share of the cluster's."""
    hang_seconds: Annotated[float, Field(gt=0)] = 900.0
    """Seconds without a step after which the run ends with an error that names the worker to blame."""
    preemption_seconds: Annotated[float, Field(gt=0)] | None = 10.0
    """Seconds between looks for a notice that a node will be taken away: a checkpoint is saved then. null: never."""
    lease_seconds: Annotated[float, Field(ge=1)] = 15.0
    """One driver at a time works on a run, or on a sweep. One that was killed keeps it for so many seconds."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures to recover from before the run ends with an error; -1 for any number."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number_is_fixed(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"workers {self.min_workers} to {self.max_workers} is no range; give the smaller number first"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Least number of workers."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        """Largest number of workers."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class CheckpointConfig(Settings):
    """When state is saved, and how much of it is kept."""

    every_steps: PositiveInt = 500
    """Steps between checkpoints; there is always one at the end."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Number of checkpoints with the least validation loss to keep besides; there is a validation before each
    checkpoint then."""
    keep_every_hours: Annotated[float, Field(gt=0)] | None = None
    """Keep one checkpoint for each so many hours of the run besides, the first one included."""


class TrackingConfig(Settings):
    """Where runs are recorded, and how often."""

    uri: str | None = None
    """MLflow tracking server, such as http://127.0.0.1:5000; MLFLOW_TRACKING_URI or, without it, a local SQLite file
    mlflow.db by default."""
    experiment: str = "crate-ray"
    """MLflow experiment."""
    log_every: PositiveInt = 10
    """Steps between logged metrics."""
    picture_every: PositiveInt | None = 500
    """Steps between looks at eight fixed held-out samples (and once at the end): pictures of reconstructions, attention
    and layers, and metrics by layer (coding rate, share of zeros, Gini index); null for none."""
    deliver_seconds: Annotated[float, Field(ge=0)] = 120.0
    """How long a run that is done waits for MLflow to take all records. What it did not take is kept on disk, and sent
    when the same job is started again."""


def check_name(name: str) -> str:
    """A run's name becomes a folder and a record in MLflow."""
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ValueError(f"run name {name!r} may hold letters, digits, '-', '_' and '.' only")
    return name


RunName = Annotated[str, AfterValidator(check_name)]


class PretrainConfig(Settings):
    """Pretrain CRATE-MAE or ViT-MAE on sharded images, on Ray."""

    name: RunName = "pretrain"
    """Name of the run. The same name and storage resume the run where its last checkpoint left it."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for checkpoints and results; with several nodes one that all reach."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, data order, augmentation and masks."""
    init_from: Annotated[str | None, Field(validation_alias=AliasChoices("init_from", "init-from"))] = None
    """Start from these weights (nothing else of theirs; the run begins at step 0): a run's folder, local or on S3, for
    its newest checkpoint, or with @step for that of a step; models:/<name>@<alias> or runs:/<id> in MLflow; the folder
    of an exported model; or a checkpoint file of the published code (.pth, .pt, .bin, .safetensors)."""
    model: ModelConfig = CrateMAEConfig()
    """The model."""
    data: DataConfig
    """The data."""
    training: TrainingConfig
    """The training run."""
    optim: OptimConfig = OptimConfig()
    """The optimiser and its schedule."""
    scaling: ScalingConfig = ScalingConfig()
    """The workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_keep_best(self) -> Self:
        if self.checkpoint.keep_best and not self.data.validation:
            raise ValueError("checkpoint.keep_best goes by the validation loss; set data.validation")
        return self


# --- Evaluation -----------------------------------------------------------------------------------------------------

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


# --- Fine-tuning ----------------------------------------------------------------------------------------------------

FINETUNE_RECIPES: dict[str, dict[str, Any]] = {
    "crate": {
        "pooling": "cls",
        "data": {"crop_scale": (0.08, 1.0)},
        "training": {"batch_size": 256, "epochs": 200},
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
(Pets and Flowers: lr 1e-4, 400 epochs). It decays biases and norms too, we do not.

'mae': table 9 of arXiv 2111.06377 and the public MAE code, for ViT-Base: batch 1024, base rate 5e-4, 5 of 100 epochs of
warm-up, layer decay 0.65, drop path 0.1, mixup 0.8, CutMix 1.0, label smoothing 0.1, RandAugment(2, 9 of 10), mean of
patch tokens; without the random erasing of that code, which the table does not have."""

Pooling = Literal["cls", "mean"]


class ClassifierConfig(Settings):
    """A classifier: an encoder, the feature that it is read at, and a norm and a linear map to classes."""

    num_classes: PositiveInt
    """Number of classes."""
    pooling: Pooling = "cls"
    """Feature: the CLS token of the last layer, or the mean of its patch tokens."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of their numbers, where known."""


class AugmentConfig(Settings):
    """What is done to training samples beside crop and flip."""

    randaugment: Annotated[int, Field(ge=0, le=14)] = 2
    """Operations that RandAugment (arXiv 1909.13719) applies to each image, drawn anew for each; 0 for none."""
    magnitude: Annotated[float, Field(gt=0, lt=30)] = 14.0
    """Their magnitude M of 30, with the operations and ranges of torchvision."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """α of mixup (arXiv 1710.09412): pairs of samples are averaged with a weight λ ~ Beta(α, α) drawn for each batch; 0
    for none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """α of CutMix (arXiv 1905.04899): a box of the area 1 − λ comes from the other sample of the pair; 0 for none. With
    both, each batch has one of them, either as likely."""


class FinetuneConfig(Settings):
    """Train a pretrained encoder, or the same encoder from random weights, to classify labelled images, on Ray.

    A recipe gives the settings that are not set.
    """

    name: RunName = "finetune"
    """Name of the run. The same name and storage resume the run where its last checkpoint left it."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for checkpoints and results; with several nodes one that all reach."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of new weights, data order, augmentation, mixing and drop path."""
    model: str = "scratch"
    """The pretrained encoder: a run's folder (<run>@<step> for that of a step) or a checkpoint's, runs:/<MLflow run>,
    models:/<name>@<alias>, the folder of an exported model, or a published checkpoint (.pth, .safetensors, also as
    published:<file>). 'scratch:<any of these>': the same encoder with random weights, the control. 'scratch': the
    encoder of the settings below with random weights."""
    encoder: ModelConfig = CrateMAEConfig()
    """The encoder of model 'scratch', as for pretraining."""
    recipe: Literal["crate", "mae"] = "crate"
    """Where settings come from that are not set: 'crate', how CRATE was fine-tuned (its public code), or 'mae', how MAE
    was (arXiv 2111.06377, table 9): layer-wise decay, mixup, CutMix, drop path, label smoothing."""
    pooling: Pooling = "cls"
    """What is classified: the CLS token of the last layer, or the mean of its patch tokens."""
    data: DataConfig
    """The data; every sample has its class as member `cls`."""
    training: TrainingConfig = TrainingConfig(epochs=200)
    """The training run."""
    optim: OptimConfig = OptimConfig(lr=5e-5, warmup=0.0, betas=(0.9, 0.999), weight_decay=0.01, clip_norm=None)
    """The optimiser and its schedule."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Layer-wise decay: each encoder layer's learning rate is that of the layer above it times this; the classifier has
    the whole rate, the patch embedding layer_decay ** (depth + 1) of it."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop path (stochastic depth, arXiv 1603.09382): share of samples that skip a residual branch in the last layer;
    it rises linearly from 0 in the first. In CRATE the compression step is one; ISTA has no residual to skip to."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label that is spread over all classes."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation beside crop and flip."""
    scaling: ScalingConfig = ScalingConfig()
    """The workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
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
        return filled

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        if self.checkpoint.keep_best and not self.data.validation:
            raise ValueError("checkpoint.keep_best goes by the validation loss; set data.validation")
        if self.mixes and self.training.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix mix pairs of samples, and training.batch_size {self.training.batch_size} is odd; "
                "use an even one"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed in pairs."""
        return bool(self.augment.mixup or self.augment.cutmix)


# --- Sweeps ---------------------------------------------------------------------------------------------------------


class SearchSpace(Settings):
    """Values that a sweep tries for one setting; set exactly one of the fields."""

    choice: tuple[Any, ...] | None = None
    """Any of these values."""
    integers: tuple[int, int] | None = None
    """Whole numbers from the first to the second, both included."""
    uniform: tuple[float, float] | None = None
    """Numbers between the two, all equally likely."""
    loguniform: tuple[float, float] | None = None
    """Positive numbers between the two, their logarithms equally likely."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of choice, integers, uniform and loguniform, not {given or 'none'}")
        values = getattr(self, given[0])
        if not values:
            raise ValueError("choice needs at least one value")
        if given[0] != "choice" and (values[0] >= values[1] or (given[0] == "loguniform" and values[0] <= 0)):
            raise ValueError(f"{given[0]} needs a smaller and a larger number (positive for loguniform), not {values}")
        return self


class SweepConfig(Settings):
    """Search over settings of a pretraining run; every trial is a full pretraining run of its own."""

    name: RunName = "sweep"
    """Name of the sweep. The same name and storage continue it; finished trials are not repeated."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for the trials' checkpoints and the results."""
    base: str
    """YAML file with the pretraining settings that all trials share (jobs/pretrain.py's)."""
    settings: dict[str, Any] = {}
    """Dotted pretraining settings that override the base's in all trials, such as {training.steps: 500}."""
    search: dict[str, SearchSpace]
    """Dotted pretraining settings to search over, each with its values, such as
    {model.num_subspaces: {choice: [4, 8]}, optim.lr: {loguniform: [1e-4, 1e-2]}}."""
    trials: PositiveInt = 8
    """Number of trials."""
    max_concurrent: PositiveInt = 1
    """Trials that run at the same time; each takes scaling.workers of the base."""
    objective: Literal["validation_loss", "probe_accuracy"] = "validation_loss"
    """What to optimise: the least masked loss on data.validation, or the best accuracy of a linear probe."""
    probe: ProbeConfig | None = None
    """The probe, for objective probe_accuracy."""
    grace_steps: PositiveInt | None = None
    """Early stopping by ASHA on the validation loss, after at least so many steps; off by default. Needs
    training.validate_every and objective validation_loss."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """ASHA keeps one of so many trials at each rung."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the search (Optuna's TPE)."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow: a parent run for the sweep, a child run per trial."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.objective == "probe_accuracy" and self.probe is None:
            raise ValueError("objective 'probe_accuracy' needs probe.train and probe.test")
        if self.grace_steps and self.objective != "validation_loss":
            raise ValueError("grace_steps (ASHA) goes with objective 'validation_loss', which is known during training")
        if not self.search:
            raise ValueError("search is empty; name at least one setting to search over")
        return self


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


# --- Registry and embedding -----------------------------------------------------------------------------------------


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


class EmbedConfig(Settings):
    """Embed every sample of a dataset with a trained encoder; Parquet files with sample keys come out."""

    model: str = "models:/crate-mae@champion"
    """Registered model, or any other that jobs/evaluate.py takes."""
    data: str
    """Local folder or s3://bucket/prefix of the shards, with manifest."""
    output: str
    """Local folder or s3://bucket/prefix for the Parquet files."""
    feature: Feature = "mean"
    """'mean' of the encoder's patch tokens, or its CLS token 'cls'."""
    workers: PositiveInt = 1
    """Encoders that work at the same time, each on one CPU (or one GPU)."""
    gpu: bool = False
    """Put each encoder on a GPU."""
    batch_size: PositiveInt = 256
    """Samples per task; one Parquet file holds at least as many."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    s3: S3Config = S3Config()
    """Object storage."""


# --- Benchmarks -----------------------------------------------------------------------------------------------------

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


class BenchmarkDataConfig(Settings):
    """Measure our loader, stock webdataset and, where installed, spdl and LitData, with the same output."""

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Datasets of images as jobs/prepare.py leaves them: a local folder or s3://bucket/prefix, or several as
    name=address (a mapping in YAML). Ratios are against webdataset on the first one."""
    image_size: PositiveInt = 224
    """Side of the images that come out, in pixels."""
    batch_size: PositiveInt = 64
    """Images per batch."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """Duration of each measurement in seconds, after the first batch and a moment more."""
    repeats: PositiveInt = 3
    """Measurements of each loader, in turns; the fastest counts."""
    processes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4)
    """Numbers of loader processes that webdataset and LitData are measured with; the fastest counts."""
    memory_bytes: PositiveInt = 2 * 2**30
    """Our loader keeps data up to this many bytes in memory, as in training; 1 makes it stream."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""
    s3: S3Config = S3Config()
    """Object storage."""

    @field_validator("data", mode="before")
    @classmethod
    def _from_mapping(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return tuple(f"{name}={address}" for name, address in value.items())
        return (value,) if isinstance(value, str) else value

    @field_validator("data")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [_named(entry)[0] for entry in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data has {twice[0]!r} twice; give every dataset a name of its own, as name=address")
        return value

    @property
    def datasets(self) -> dict[str, str]:
        """Addresses of the datasets by name."""
        return dict(map(_named, self.data))


def _named(entry: str) -> tuple[str, str]:
    """Name and address; an address without a name is its own."""
    match = _NAMED.fullmatch(entry)
    return (match[1], match[2]) if match else (entry, entry)


class BenchmarkOrderConfig(Settings):
    """Measure what planning costs on very large data, and how well shards that are sorted by class are mixed."""

    num_shards: PositiveInt = 1_000_000
    """Shards of the synthetic dataset that is planned for; its index takes some hundred MB of the temporary folder."""
    shard_samples: PositiveInt = 1000
    """Samples per shard."""
    sample_bytes: Annotated[int, Field(ge=512)] = 110 * 2**10
    """Mean size of a sample in bytes."""
    classes: PositiveInt = 1000
    """Classes of the sorted dataset."""
    class_samples: PositiveInt = 1281
    """Samples of each class."""
    batch_size: PositiveInt = 4096
    """Global batch."""
    workers: PositiveInt = 8
    """Workers of the run."""
    buffer_bytes: PositiveInt = 2**30
    """data.buffer_bytes of each worker."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""


class BenchmarkScalingConfig(Settings):
    """Estimate how a model trains on 8 to 512 GPUs, from the bytes that a step moves. The defaults are H100 nodes."""

    model: ModelConfig = CrateMAEConfig(preset="base")
    """The model, as for pretraining."""
    batch_size: PositiveInt = 4096
    """Global batch; the GPUs share it."""
    gpus: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 16, 32, 64, 128, 256, 512)
    """Numbers of GPUs."""
    peak_flops: Annotated[float, Field(gt=0)] = 989e12
    """Peak of one GPU in FLOP/s, bf16 without sparsity (H100 SXM)."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the peak that the computation alone reaches, as jobs/benchmark.py train measures it."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node."""
    gpu_bytes_per_second: Annotated[float, Field(gt=0)] = 450e9
    """Bandwidth of a GPU's links within the node, one direction (NVLink 4)."""
    node_bytes_per_second: Annotated[float, Field(gt=0)] = 400e9
    """Bandwidth of a node's network, one direction (8 ports of 400 Gbit/s)."""
    latency_seconds: Annotated[float, Field(ge=0)] = 10e-6
    """Latency of one hop between nodes."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""


class BenchmarkOverheadConfig(Settings):
    """Measure what a Ray Train job costs beside training, against the same loop bare under torchrun."""

    data: str | None = None
    """Dataset as jobs/prepare.py leaves it; by default generated shapes of the model's size."""
    samples: PositiveInt = 2000
    """Shapes to generate."""
    model: ModelConfig = CrateMAEConfig(preset="small", image_size=96, patch_size=8)
    """The model, as for pretraining."""
    batch_size: PositiveInt = 16
    """Global batch."""
    workers: PositiveInt = 2
    """Training processes."""
    cpus_per_worker: PositiveInt | None = None
    """Threads of each, on a CPU; by default all that the machine has for it. Fewer leave room for Ray's own processes,
    which otherwise take their share of the cores from the training."""
    steps: PositiveInt = 60
    """Steps of each run."""
    log_every: PositiveInt = 10
    """Steps between logged metrics, and of one measured interval; the first one of each run is left out."""
    rounds: PositiveInt = 2
    """Runs of each kind, in turns; medians over their intervals are compared."""
    checkpoint_preset: PresetName | None = "base"
    """Size of the model whose checkpoints are measured; null to leave that out."""
    checkpoint_batch_size: PositiveInt = 4
    """Its global batch."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.steps < 2 * self.log_every:
            raise ValueError(f"steps is {self.steps}; give at least two intervals of log_every {self.log_every}")
        return self


Contestant = Literal["crate_mae", "plain", "vit_mae", "vit_mae_matched"]


class BenchmarkTrainConfig(Settings):
    """Measure training: CRATE-MAE, its equations written out plainly, and ViT-MAE, each in a process of its own."""

    presets: Annotated[tuple[PresetName, ...], Field(min_length=1)] | None = None
    """Sizes of the models. By default all on a GPU, tiny and small on a CPU."""
    precisions: Annotated[tuple[Literal["bf16", "fp32"], ...], Field(min_length=1)] = ("bf16", "fp32")
    """Autocast to bf16, and plain fp32."""
    contestants: Annotated[tuple[Contestant, ...], Field(min_length=1)] = (
        "crate_mae", "plain", "vit_mae", "vit_mae_matched",
    )  # fmt: skip
    """'crate_mae' as we train it, 'plain' for the same function as its equations read, 'vit_mae' of the same width,
    depth and heads, 'vit_mae_matched' of as many parameters."""
    image_size: PositiveInt = 224
    """Side of the images in pixels; a multiple of 16."""
    batch_size: PositiveInt | None = None
    """Images per step. By default 128 on a GPU, 8 on a CPU."""
    image_sizes: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    """Sides at which time and memory are measured, for the first preset and precision; none to leave that out."""
    image_sizes_batch: PositiveInt | None = None
    """Images per step for that. By default 8 on a GPU, 1 on a CPU."""
    seconds: Annotated[float, Field(gt=0)] = 3.0
    """Duration of each measurement in seconds, after two steps to warm up; at least three steps."""
    repeats: PositiveInt = 1
    """Measurements of each contestant, in turns; the fastest counts."""
    compile: Literal["auto", "layers", "off"] = "auto"
    """training.compile of all but 'plain'."""
    activation_checkpointing: bool = False
    """Train all but 'plain' with training.activation_checkpointing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; 'auto' takes a GPU where there is one."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """FLOP/s that count as 100 % in bf16. By default what the GPU's maker states, or, on a CPU or an unknown GPU, the
    rate of a large matrix product; fp32 is always measured."""
    json_file: Annotated[str | None, Field(alias="json")] = None
    """File to write every figure to, as JSON."""
