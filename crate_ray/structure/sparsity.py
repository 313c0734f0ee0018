"""How sparse codes are. Shapes: T tokens, D numbers of each; leading dimensions are batches."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_share(z_TD: Tensor, threshold: float = 0.0) -> Tensor:
    """Share of numbers whose absolute value is at most a threshold, of each set of tokens, (...,)."""
    return (z_TD.abs() <= threshold).double().mean((-2, -1))


def gini(z_TD: Tensor) -> Tensor:
    """Gini index of the absolute values of a token, mean over each set of tokens, (...,).

    0 where all numbers of a token are equally large, 1 − 1/D where one alone is not zero (Hurley & Rickard 2009,
    arXiv 0811.4706). A token of zeros counts as 0.
    """
    sizes = z_TD.abs().double().sort(-1).values
    count = sizes.shape[-1]
    rank = torch.arange(1, count + 1, dtype=sizes.dtype, device=sizes.device)
    total = sizes.sum(-1)
    index = (sizes * (2 * rank - count - 1)).sum(-1) / (count * total.clamp_min(torch.finfo(sizes.dtype).tiny))
    return index.mean(-1)
