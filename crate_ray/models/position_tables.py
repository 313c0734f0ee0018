"""Position tables in checkpoints of other code. Ours are computed, so those of a checkpoint are only compared."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from crate_ray.errors import UserError
from crate_ray.models.patches import sincos_positions

_TOLERANCE = 1e-6
_MOST_PATCHES = 2**16
"""Other grids than squares are tried up to this number of patches."""


def position_table(dim: int, grid_hw: tuple[int, int]) -> Tensor:
    """The table (1, 1 + N, D) of the published code: a zero position for the CLS token, then the grid's."""
    return torch.nn.functional.pad(sincos_positions(dim, grid_hw), (0, 0, 1, 0))


def table_grid(name: str, table: Tensor, dim: int, grid_hw: tuple[int, int]) -> tuple[int, int]:
    """The grid of patches that a table holds sine-cosine positions of: `grid_hw` if possible, or another one.

    Args:
        name: name of the table, for messages.
        table: (1, 1 + N, D).
        dim: D.
        grid_hw: the model's grid, which is tried first.

    Raises:
        UserError: they are not sine-cosine positions, so the model would see patches at other places.
    """
    if table.ndim != 3 or table.shape[::2] != (1, dim):
        raise UserError(f"{name} of the checkpoint has shape {tuple(table.shape)}, not (1, 1 + N, {dim})")
    patches = table.shape[1] - 1
    tolerance = _TOLERANCE
    if table.is_floating_point():  # a checkpoint in half precision rounds its tables
        tolerance = max(tolerance, torch.finfo(table.dtype).eps if table.element_size() < 4 else 0)
    differences: dict[tuple[int, int], float] = {}
    for grid in dict.fromkeys(_grids(patches, grid_hw)):
        difference = (table.double() - position_table(dim, grid).double()).abs().max().item()
        if difference <= tolerance:
            return grid
        differences.setdefault(grid, difference)
    if not differences:
        raise UserError(f"{name} of the checkpoint has {patches} patches, which are no grid")
    (height, width), difference = next(iter(differences.items()))
    raise UserError(
        f"{name} of the checkpoint differs by up to {difference:.2g} from the sine-cosine positions of a grid of "
        f"{height} × {width} patches; models with learned positions cannot be loaded"
    )


def _grids(patches: int, first: tuple[int, int]) -> Iterator[tuple[int, int]]:
    if first[0] * first[1] == patches:
        yield first
    if patches < 1 or patches > max(_MOST_PATCHES, first[0] * first[1]):
        return
    side = math.isqrt(patches)
    for height in range(side, 0, -1):
        if patches % height == 0:
            yield height, patches // height
            yield patches // height, height
