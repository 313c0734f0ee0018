"""Reconstruction errors on held-out images by mask ratio, compared with controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import Record
from crate_ray.data.batch import Batch
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.intervals import Estimate, mean
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.patches import patch_statistics, random_masking
from crate_ray.training.pictures import value_range
from crate_ray.training.step import probe_noise

VISIBLE_MEAN = "visible"
Scale = tuple[Tensor, Tensor]
_BATCH = 64
_PICTURES = 8
_PICTURE_RATIOS = (0.5, 0.75, 0.9)
_SSIM_WINDOW = 7
_FLAT = 0.01


class RatioErrors(Record):
    """Errors at one mask ratio: means over images with intervals."""

    mask_ratio: float
    """Requested mask ratio."""
    hidden_patches: int
    """Number of masked patches."""
    normalised_mse: Estimate | None
    """Squared error relative to each true patch's variance (MAE's normalised targets), over masked patches that are not
    flat (standard deviation above 0.01 for values in 0 … 1); None if all are flat."""
    pixel_mse: Estimate
    """Squared error over masked patches, for pixels in 0 … 1. Each channel of grids is scaled by its range over the
    images."""
    psnr: Estimate
    """Peak signal-to-noise ratio over masked patches in dB."""
    ssim: Estimate | None
    """Structural similarity of the whole image, with the true visible patches, in windows of 7 × 7 pixels. Windows are
    smaller for smaller images. None for images below 3 × 3."""


class Predictor(Record):
    """Errors of one model or control."""

    title: str
    """Name of the model or control."""
    given_patch_statistics: bool
    """Whether its pixels get the true patch's mean and variance, because models with normalised targets do not predict
    them."""
    ratios: tuple[RatioErrors, ...]
    """By increasing mask ratio."""


class Reconstruction(Record):
    """Reconstruction errors on one held-out dataset."""

    data: str
    """Address of the dataset."""
    images: int
    """Number of images. All models get the same masks."""
    mask_ratio: float
    """Mask ratio in training."""
    skipped_ratios: tuple[float, ...]
    """Mask ratios that would leave no patch visible."""
    predictors: dict[str, Predictor]
    """By name: 'trained', 'untrained', 'baseline', 'visible' (the mean of the visible pixels)."""

    def metrics(self) -> dict[str, float]:
        """The trained model's errors for MLflow."""
        return {
            f"reconstruction_{name}_{round(100 * errors.mask_ratio)}": estimate.value
            for errors in self.predictors["trained"].ratios
            for name in ("normalised_mse", "psnr", "ssim")
            if (estimate := getattr(errors, name)) is not None
        }


class Pictures(NamedTuple):
    """Images for a figure of the trained model: (B, channels, H, W) in 0 … 1."""

    original: Tensor
    """Held-out images."""
    rows: list[tuple[float, Tensor, Tensor]]
    """Mask ratio, images with masked patches in grey, images with predicted patches."""


class _Errors(NamedTuple):
    """(B,) each."""

    normalised_mse: NDArray[np.float64]
    pixel_mse: NDArray[np.float64]
    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]


def measure_reconstruction(
    all_evaluated: Sequence[EvaluatedModel],
    batches: Sequence[Batch],
    ratios: Sequence[float],
    uri: str,
    device: torch.device,
) -> tuple[Reconstruction, Pictures]:
    """Errors of models on loaded images, and pictures of the first model's predictions.

    Masks depend only on the sample. The mask of a larger ratio contains the masks of smaller ratios.
    """
    evaluated = all_evaluated[0]
    num_patches = evaluated.description.model.num_patches
    possible = sorted({ratio for ratio in ratios if int(num_patches * (1 - ratio)) >= 1})
    images = torch.cat([batch.images for batch in batches])
    noise = probe_noise(np.concatenate([batch.samples for batch in batches]), num_patches)
    scale = _scale(images, device)
    predictors = {}
    for one in all_evaluated:
        model_of = _with_ratio(one, device)
        predictors[one.name] = Predictor(
            title=one.title,
            given_patch_statistics=one.model.norm_pix_loss,
            ratios=tuple(_measure(model_of(ratio), one, images, noise, ratio, scale, device) for ratio in possible),
        )
    predictors[VISIBLE_MEAN] = Predictor(
        title="mean of the visible pixels",
        given_patch_statistics=False,
        ratios=tuple(_measure(None, evaluated, images, noise, ratio, scale, device) for ratio in possible),
    )
    result = Reconstruction(
        data=uri,
        images=len(images),
        mask_ratio=evaluated.description.model.mask_ratio,
        skipped_ratios=tuple(sorted(set(ratios) - set(possible))),
        predictors=predictors,
    )
    return result, _pictures(evaluated, images[:_PICTURES], noise[:_PICTURES], possible, scale, device)


def _scale(images_BCHW: Tensor, device: torch.device) -> Scale:
    """Values of black and white of each channel, (channels, 1, 1), on the scale of `Normalizer.undo`."""
    low_C11, high_C11 = value_range(images_BCHW)
    return low_C11.to(device), high_C11.to(device)


def _with_ratio(evaluated: EvaluatedModel, device: torch.device) -> Callable[[float], MaskedAutoencoder]:
    def build(ratio: float) -> MaskedAutoencoder:
        with torch.random.fork_rng(devices=[]):
            model = build_model(evaluated.description.model.model_copy(update={"mask_ratio": ratio}))
        model.load_state_dict(evaluated.model.state_dict())
        return model.to(device).eval()

    return build


def _measure(
    model: MaskedAutoencoder | None,
    evaluated: EvaluatedModel,
    images: Tensor,
    noise: Tensor,
    ratio: float,
    scale: Scale,
    device: torch.device,
) -> RatioErrors:
    parts = [
        _errors(model, evaluated, images[i : i + _BATCH], noise[i : i + _BATCH], ratio, scale, device)
        for i in range(0, len(images), _BATCH)
    ]
    errors = _Errors(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    num_patches = evaluated.description.model.num_patches
    return RatioErrors(
        mask_ratio=ratio,
        hidden_patches=num_patches - int(num_patches * (1 - ratio)),
        normalised_mse=_mean_of_known(errors.normalised_mse),
        pixel_mse=mean(errors.pixel_mse),
        psnr=mean(errors.psnr),
        ssim=_mean_of_known(errors.ssim),
    )


@torch.no_grad()
def _errors(
    model: MaskedAutoencoder | None,
    evaluated: EvaluatedModel,
    images: Tensor,
    noise_BN: Tensor,
    ratio: float,
    scale: Scale,
    device: torch.device,
) -> _Errors:
    original, composed, removed_BN = _complete(model, evaluated, images, noise_BN, ratio, scale, device)
    # For PSNR and SSIM, predictions beyond black and white are clipped.
    shown = composed.clamp(0, 1)
    patchify = evaluated.model.patchify
    true_BNX = patchify(original)
    _, std_BN1 = patch_statistics(true_BNX)
    error_BN = (patchify(composed) - true_BNX).square().mean(-1) / std_BN1.squeeze(-1).square()
    uneven_BN = removed_BN & (std_BN1.squeeze(-1) > _FLAT)
    pixel_B = ((patchify(shown) - true_BNX).square().mean(-1) * removed_BN).sum(1).double() / removed_BN.sum(1)
    ssim_B = structural_similarity(original, shown)
    return _Errors(
        ((error_BN * uneven_BN).sum(1).double() / uneven_BN.sum(1)).numpy(),  # NaN if all patches are flat
        pixel_B.numpy(),
        (-10 * pixel_B.clamp_min(1e-10).log10()).numpy(),
        np.full(len(pixel_B), np.nan) if ssim_B is None else ssim_B.numpy(),
    )


def _mean_of_known(values: NDArray[np.float64]) -> Estimate | None:
    known = values[np.isfinite(values)]
    return mean(known) if len(known) > 1 else None


@torch.no_grad()
def _complete(
    model: MaskedAutoencoder | None,
    evaluated: EvaluatedModel,
    images: Tensor,
    noise_BN: Tensor,
    ratio: float,
    scale: Scale,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Original and completed images, (B, channels, H, W) in 0 … 1, and which patches were masked, (B, N)."""
    normalizer = evaluated.normalizer(device)
    normalised = normalizer(images.to(device))

    def unit(values: Tensor) -> Tensor:
        return (normalizer.undo(values) - scale[0]) / (scale[1] - scale[0])

    original = unit(normalised)
    if model is None:
        removed_BN = random_masking(noise_BN.to(device), int(noise_BN.shape[1] * (1 - ratio))).removed
        shown = _mask_image(evaluated.model, ~removed_BN)
        filled = (original * shown).sum((2, 3), keepdim=True) / shown.sum((2, 3), keepdim=True)
        composed = torch.where(shown, original, filled)
    else:
        output = model(normalised, noise_BN.to(device))
        removed_BN = output.mask.bool()
        predicted = unit(model.reconstruct(output.prediction.float(), normalised))
        composed = torch.where(_mask_image(model, removed_BN), predicted, original)
    return original.cpu(), composed.cpu(), removed_BN.cpu()


def _mask_image(model: MaskedAutoencoder, patches_BN: Tensor) -> Tensor:
    """Repeat a mask of patches to pixels: (B, 1, H, W)."""
    patch_h, patch_w = model.patch_hw
    return patches_BN.unflatten(1, model.grid_hw).repeat_interleave(patch_h, 1).repeat_interleave(patch_w, 2)[:, None]


def structural_similarity(a_BCHW: Tensor, b_BCHW: Tensor, window: int = _SSIM_WINDOW) -> Tensor | None:
    """Structural similarity (Wang et al. 2004) of images in 0 … 1: (B,) float64; None if they are smaller than 3 × 3.

    Gives the same as scikit-image by default (uniform 7 × 7 windows or the largest odd side that fits, unbiased
    covariances, mean over windows and channels), but for all images at once and about 20 times as fast.
    """
    side = min(window, *a_BCHW.shape[2:])
    side -= 1 - side % 2
    if side < 3:
        return None
    a, b = a_BCHW.double(), b_BCHW.double()

    def smooth(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1)

    unbiased = side**2 / (side**2 - 1)
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = (unbiased * (smooth(x * x) - m * m) for x, m in ((a, mean_a), (b, mean_b)))
    covariance = unbiased * (smooth(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def _pictures(
    evaluated: EvaluatedModel,
    images: Tensor,
    noise: Tensor,
    ratios: Sequence[float],
    scale: Scale,
    device: torch.device,
) -> Pictures:
    chosen = [ratio for ratio in _PICTURE_RATIOS if ratio in ratios] or list(ratios[:1])
    model_of, rows = _with_ratio(evaluated, device), []
    original = torch.empty(0)
    for ratio in chosen:
        original, composed, removed_BN = _complete(model_of(ratio), evaluated, images, noise, ratio, scale, device)
        grey = torch.where(_mask_image(evaluated.model, removed_BN), 0.5, original)
        rows.append((ratio, grey, composed.clamp(0, 1)))
    return Pictures(original, rows)
