"""Measures of sparsity. Shapes: T tokens, D entries of each; leading dimensions are batches of token sets."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_share(tokens: Tensor, threshold: float = 0.0) -> Tensor:
    """Share of the entries of tokens (…, T, D) whose absolute value is at most a threshold, (…,)."""
    return (tokens.abs() <= threshold).double().mean((-2, -1))


def gini(tokens: Tensor) -> Tensor:
    """Gini index of the absolute values of a token's entries, averaged over the tokens (…, T, D) of a set, (…,).

    0 if all entries of a token are equally large, 1 − 1/D if only one is not zero (Hurley & Rickard 2009, arXiv
    0811.4706). A token of zeros counts as 0.
    """
    sizes = tokens.abs().double().sort(-1).values
    count = sizes.shape[-1]
    rank = torch.arange(1, count + 1, dtype=sizes.dtype, device=sizes.device)
    total = sizes.sum(-1)
    index = (sizes * (2 * rank - count - 1)).sum(-1) / (count * total.clamp_min(torch.finfo(sizes.dtype).tiny))
    return index.mean(-1)
