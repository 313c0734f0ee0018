"""Masked completion of patches, as functions: positions, random masks, patches of images, and the loss.

Shapes: B batch, N patches of an image, V visible patches, D token dimension, X = patch height · patch width · channels
numbers of one patch. A pair `_hw` is (height, width).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Masking(NamedTuple):
    """Which patches of each image are removed, and which stay visible."""

    removed: Tensor
    """(B, N) bool, True for a removed patch."""
    visible: Tensor
    """Indices of the visible patches in the order of their noise, smallest first, (B, V)."""
    rank: Tensor
    """Rank of each patch's noise, (B, N); visible patches have the ranks 0 to V − 1."""
    decoded: Tensor | None = None
    """Indices of the M patches that the decoder gets, (B, M), in the order of their noise. The first V are visible.
    None if it gets all patches in their order."""


def random_masking(noise: Tensor, num_visible: int, num_decoded: int | None = None) -> Masking:
    """Ω = all patches but the V with the smallest noise, V = ⌊N (1 − mask ratio)⌋; Ω is removed.    (9)

    Parameters
    ----------
    noise
        One number per patch, (B, N). Of equal numbers the first patch counts as smaller.
    num_visible
        V.
    num_decoded
        M, if the decoder gets only the M patches with the smallest noise: the visible ones and M − V removed ones,
        which are a random subset of Ω.
    """
    order_BN = torch.argsort(noise, dim=1, stable=True)
    rank_BN = torch.argsort(order_BN, dim=1)
    decoded_BM = None if num_decoded is None else order_BN[:, :num_decoded]
    return Masking(rank_BN >= num_visible, order_BN[:, :num_visible], rank_BN, decoded_BM)


def sample_losses(prediction: Tensor, target: Tensor, removed: Tensor, num_removed: int) -> Tensor:
    """loss = 1 / |Ω| · Σ_{n ∈ Ω} ‖x̂_n − x_n‖² / X of each image, (B,).    (11)

    This is the mean squared error over the removed patches. If none is removed, it is the mean over all patches.

    Parameters
    ----------
    prediction, target
        Patches x̂ and x, (B, N, X).
    removed
        `Masking.removed`, (B, N).
    num_removed
        |Ω| = N − V, the same for each image.
    """
    patch_loss_BN = (prediction - target).square().mean(-1)
    return (patch_loss_BN * removed).sum(1) / num_removed if num_removed else patch_loss_BN.mean(1)


def sincos_positions(dim: int, grid_hw: tuple[int, int], spread_hw: tuple[int, int] | None = None) -> Tensor:
    """Fixed 2-D sine-cosine positions of a grid of patches, (1, N, dim) float32, as in MAE.

    The first half of the features encodes the column and the second half the row. Each half holds sines, then cosines,
    at dim / 4 frequencies from 1 towards 1 / 10000. The CLS token's position is zero and not part of this table.

    The table is computed in float32, as in the published code. Its last bits therefore depend on NumPy's code for the
    processor (differences of up to 1e-6 on a grid of 14 × 14).

    Parameters
    ----------
    dim
        Divisible by 4.
    grid_hw
        Patches down and across.
    spread_hw
        Another grid, whose positions are interpolated for this one: patch i of n is at (i + ½) m / n − ½, for m patches
        of the other grid on the same side. So a model that was trained on it sees no new positions, but finer ones.
    """
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float32) / np.float32(dim / 4))
    rows, columns = np.indices(grid_hw, dtype=np.float32).reshape(2, -1, 1)
    if spread_hw is not None:
        scales = np.divide(spread_hw, grid_hw, dtype=np.float32)
        rows, columns = ((axis + 0.5) * scale - 0.5 for axis, scale in zip((rows, columns), scales, strict=True))
    angles = columns * frequencies, rows * frequencies
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32)).unsqueeze(0)


def patchify(images: Tensor, patch_hw: tuple[int, int]) -> Tensor:
    """Patches (B, N, X) of images (B, C, H, W), row by row.

    Numbers of a patch are in MAE's order: patch height, patch width, channel.
    """
    patch_h, patch_w = patch_hw
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch_h, patch_h, width // patch_w, patch_w)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid_hw: tuple[int, int], patch_hw: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) of patches (B, N, X): the inverse of `patchify`."""
    grid = patches.unflatten(2, (*patch_hw, -1)).unflatten(1, grid_hw)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch of (B, N, X), both (B, N, 1), as MAE normalises patches.

    The variance is the unbiased one plus 1e-6.
    """
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, M, D) of (B, N, D) at each image's own indices (B, M)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def put_tokens(tokens: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Tokens (B, N, D) that hold the tokens (B, M, D) at each image's own indices (B, M), and 0 elsewhere."""
    empty_BND = tokens.new_zeros(tokens.shape[0], num_tokens, tokens.shape[2])
    return empty_BND.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)
