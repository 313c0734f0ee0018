"""Uniform numbers for crops, as random_crops asks for them, from a table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crate_ray.data.decode.transforms import CropUniforms, Int64


def from_table(u: NDArray[np.float64]) -> CropUniforms:
    """Those of a table (images, CROP_UNIFORMS)."""

    def numbers(rows: slice | Int64, columns: Int64) -> NDArray[np.float64]:
        return u[rows][:, columns]

    return numbers
