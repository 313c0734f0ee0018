"""Images with ground-truth foreground masks, and measures of how well maps match them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_ray.data.decode.errors import MAX_PIXELS
from crate_ray.data.decode.transforms import centre_crops
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.read.content import sample_contents
from crate_ray.data.read.shard_reader import ShardReader, Unreadable
from crate_ray.errors import UserError
from crate_ray.evaluation.extraction import read_samples
from crate_ray.evaluation.features import spread
from crate_ray.models.exported import ModelDescription
from crate_ray.serving import load_images

MASK_SUFFIX = "mask.png"


@dataclass(frozen=True)
class MaskedImages:
    """n images and their foreground masks."""

    images: Tensor
    """(n, channels, H, W) as loaded, not normalised."""
    masks: NDArray[np.bool_]
    """(n, H, W), true for foreground."""
    keys: list[str]
    """Keys of the samples."""
    skipped: int
    """Samples that were left out: no readable image or mask, or only foreground or only background in the crop."""


def load_masked(shards: ShardSet, description: ModelDescription, max_samples: int) -> MaskedImages:
    """Load images and masks of at most max_samples samples, evenly spread, with the same centre crop.

    Images are resized as in evaluation, masks by nearest neighbour. Raises UserError if the dataset has no masks.
    """
    uri = shards.storage.uri
    if MASK_SUFFIX not in shards.manifest.suffixes:
        raise UserError(f"{uri} has no members {MASK_SUFFIX!r}; --masks needs a dataset with masks")
    reader, suffixes = ShardReader(shards), shards.manifest.image_suffixes
    samples = read_samples(reader, spread(shards.manifest.num_samples, max_samples))
    found = [s for s in samples if not isinstance(s, Unreadable) and MASK_SUFFIX in s.members]
    images, errors = load_images(sample_contents(found, suffixes, "ignored").encoded, description)
    masks, usable = [], []
    for i, (sample, error) in enumerate(zip(found, errors, strict=True)):
        mask = _load_mask(sample.members[MASK_SUFFIX], description.model.image_hw)
        if error is None and mask is not None and 0 < mask.mean() < 1:
            masks.append(mask)
            usable.append(i)
    if len(usable) < 4:
        raise UserError(
            f"{uri} has {len(usable)} samples with a usable image and a {MASK_SUFFIX} that is neither empty nor full; "
            "--masks needs at least four"
        )
    return MaskedImages(images[usable], np.stack(masks), [found[i].key for i in usable], len(samples) - len(usable))


def _load_mask(content: bytes | memoryview, out_hw: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Centre crop of a PNG mask, at the model's image size; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return None
            picture = opened.convert("L")
    except Exception:  # damaged files can raise anything in Pillow's parsers
        return None
    crop = centre_crops(np.array([picture.height]), np.array([picture.width]), out_hw)
    top, left, height, width = (int(side[0]) for side in crop[:4])
    resized = picture.resize(
        (out_hw[1], out_hw[0]), Image.Resampling.NEAREST, box=(left, top, left + width, top + height)
    )
    return np.asarray(resized) > 127


def top_mass(maps_XN: NDArray[np.float32], mass: float) -> NDArray[np.bool_]:
    """The patches with the largest values that hold a share of a map's mass (DINO, arXiv 2104.14294): (…, N).

    As in DINO's code, patches are added while the sum of the others stays above 1 − mass.
    """
    order = np.argsort(maps_XN, axis=-1, kind="stable")
    total = maps_XN.sum(-1, keepdims=True)
    rising = np.take_along_axis(maps_XN, order, -1) / np.where(total > 0, total, 1)
    selected = np.cumsum(rising, -1) > 1 - mass
    out = np.zeros(maps_XN.shape, bool)
    np.put_along_axis(out, order, selected, -1)
    return out


def above_otsu(maps_XN: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Patches above Otsu's threshold (1979), which maximises the variance between both classes: (…, N).

    The threshold is computed from the values themselves, because a map has fewer patches than a histogram has bins. In
    a constant map, no patch is above it.
    """
    order = np.argsort(maps_XN, axis=-1, kind="stable")
    rising = np.take_along_axis(maps_XN, order, -1).astype(np.float64)
    count = rising.shape[-1]
    below = np.arange(1, count)
    sums = rising.cumsum(-1)
    lower, upper = sums[..., :-1] / below, (sums[..., -1:] - sums[..., :-1]) / (count - below)
    between = below * (count - below) * (upper - lower) ** 2
    between[rising[..., 1:] == rising[..., :-1]] = 0  # never split equal values
    cut = between.argmax(-1)[..., None]
    above = (np.arange(count) > cut) & (rising[..., -1:] > rising[..., :1])
    out = np.zeros(maps_XN.shape, bool)
    np.put_along_axis(out, order, above, -1)
    return out


def orient(maps_Xhw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Choose the sign of maps with an arbitrary sign so that the border is below the mean: (…, h, w).

    This assumes that the foreground seldom touches the border. It does not use the masks.
    """
    border = np.ones(maps_Xhw.shape[-2:], bool)
    border[1:-1, 1:-1] = False
    lower = maps_Xhw[..., border].mean(-1) <= maps_Xhw.mean((-2, -1))
    return np.where(lower[..., None, None], maps_Xhw, -maps_Xhw)


def upsample(patches_Xhw: NDArray[np.bool_], out_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Repeat patches to pixels: (…, H, W)."""
    height, width = patches_Xhw.shape[-2:]
    return patches_Xhw.repeat(out_hw[0] // height, -2).repeat(out_hw[1] // width, -1)


def jaccard(found_XHW: NDArray[np.bool_], true_XHW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Intersection over union of foregrounds: (…,), 0 if both are empty."""
    both = (found_XHW & true_XHW).sum((-2, -1))
    either = (found_XHW | true_XHW).sum((-2, -1))
    return both / np.maximum(either, 1)


def coverage(masks_BHW: NDArray[np.bool_], grid_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Share of foreground in each patch: (B, h, w)."""
    batch, height, width = masks_BHW.shape
    return masks_BHW.reshape(batch, grid_hw[0], height // grid_hw[0], grid_hw[1], width // grid_hw[1]).mean((2, 4))


def to_float_image(images_BCHW: Tensor) -> NDArray[np.float32]:
    """Images as (B, H, W, channels) in 0 … 1. Each channel of grids is scaled by its own range."""
    images = images_BCHW.permute(0, 2, 3, 1).float()
    if images_BCHW.dtype == torch.uint8:
        return (images / 255).numpy()
    low, high = images.amin((0, 1, 2)), images.amax((0, 1, 2))
    return ((images - low) / (high - low).clamp_min(1e-12)).numpy()
