"""Weighted k-nearest-neighbour classification by cosine similarity, which needs no fitting."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

NEIGHBOURS, TEMPERATURE = 20, 0.07  # those of DINO (arXiv 2104.14294)
_SIMILARITIES = 2**24  # entries of one block of the similarity matrix


def knn_predict(
    train_x_ND: NDArray[np.float32],
    train_y_N: NDArray[np.int64],
    test_x_MD: NDArray[np.float32],
    *,
    train_rows: NDArray[np.int64] | None = None,
    test_rows: NDArray[np.int64] | None = None,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> NDArray[np.int64]:
    """Class (M,) with the largest sum of exp(cosine / τ) over the k most similar training samples.

    Method and defaults of k and τ: DINO (arXiv 2104.14294), instance discrimination (arXiv 1805.01978).

    Args:
        train_x_ND, train_y_N: training features, one copy of which is held in memory, and labels.
        test_x_MD: test features, read in blocks.
        train_rows, test_rows: numbers of the rows to use; all by default.
        neighbours: k.
        temperature: τ.
        device: where to compute.
    """
    train_rows = np.arange(len(train_x_ND)) if train_rows is None else train_rows
    test_rows = np.arange(len(test_x_MD)) if test_rows is None else test_rows
    train = torch.from_numpy(np.asarray(train_x_ND[train_rows], np.float32)).to(device)
    train = F.normalize(train, dim=1, out=train)
    labels = torch.from_numpy(train_y_N[train_rows]).to(device)
    neighbours, classes = min(neighbours, len(train)), int(labels.max()) + 1
    size = max(1, _SIMILARITIES // len(train))
    found = []
    for start in range(0, len(test_rows), size):
        test = torch.from_numpy(np.asarray(test_x_MD[test_rows[start : start + size]], np.float32)).to(device)
        cosine, nearest = (F.normalize(test, dim=1) @ train.T).topk(neighbours, dim=1)
        # Divide by the nearest neighbour's weight: exp(1 / τ) overflows float32 for a small τ.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = torch.zeros(len(test), classes, device=device).scatter_add_(1, labels[nearest], weight)
        found.append(votes.argmax(1).cpu())
    return torch.cat(found).numpy() if found else np.empty(0, np.int64)
