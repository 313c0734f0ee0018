"""Compares what was exported with the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from crate_ray.errors import UserError

BATCH_SIZES = (1, 2, 5)


def largest_difference(
    what: str,
    expected: Callable[[Tensor], Mapping[str, Tensor]],
    found: Callable[[Tensor], Mapping[str, Tensor]],
    images: Callable[[int], Tensor],
    tolerance: float,
) -> float:
    """Largest difference between outputs for batches of several sizes, relative to the largest value if that exceeds 1.

    Args:
        what: the exported form, for the message.
        expected: outputs of the model, by name.
        found: outputs of what was exported.
        images: makes a batch of a size.
        tolerance: largest difference that is accepted.

    Raises:
        UserError: the difference is larger, or an output has another shape.
    """
    largest = 0.0
    for size in BATCH_SIZES:
        batch = images(size)
        with torch.no_grad():
            theirs, ours = found(batch), expected(batch)
        for name, value in ours.items():
            if theirs[name].shape != value.shape:
                raise UserError(
                    f"the {what} returns {name} of shape {tuple(theirs[name].shape)} instead of {tuple(value.shape)} "
                    f"for a batch of {size}; nothing was written; please report it"
                )
            scale = max(1.0, value.abs().max().item())
            difference = (theirs[name] - value).abs().max().item() / scale
            if not difference <= tolerance:  # also if it is not a number
                raise UserError(
                    f"the {what} differs from the model by {difference:.2g} in {name}, more than {tolerance:.0e}; "
                    "nothing was written; please report it"
                )
            largest = max(largest, difference)
    return largest
