"""What each encoder layer does to the tokens of a batch: compression against its codebook, then sparsification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from crate_ray.models import CrateMAE
from crate_ray.models.layers import EncoderLayer
from crate_ray.models.mssa import split_subspaces
from crate_ray.structure.coding_rate import EPSILON, codebook_rates, coding_rate
from crate_ray.structure.sparsity import gini, zero_share


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of each of L encoder layers on each of B images, (L, B) float64; tokens include CLS."""

    rate_before: Tensor
    """R^c(Z | U): coding rate of the layer's input against its codebook, before the compression step."""
    rate_after: Tensor
    """R^c(Z½ | U): the same after the compression step; the paper says that it falls from layer to layer."""
    rate: Tensor
    """R(Z½): coding rate of the compressed tokens by themselves."""
    zero_share: Tensor
    """Share of zeros in Z', the tokens after the sparsification step; the paper says that it rises."""
    gini: Tensor
    """Gini index of Z'."""

    def means(self) -> dict[str, list[float]]:
        """Mean over the images, by measure, layer by layer."""
        return {name: values.mean(1).tolist() for name, values in vars(self).items()}


@torch.no_grad()
def measure_layers(
    model: CrateMAE, images_BCHW: Tensor, noise_BN: Tensor | None = None, epsilon: float = EPSILON
) -> LayerMeasures:
    """Measure the encoder layers of a CRATE-MAE on images, whole or masked by noise.

    The layers' own maps are applied to the tokens as they are in the model: U_k is the k-th block of p rows of the
    codebook, and tokens are normalised by the layer's LayerNorm before they are projected, as its attention does.
    """
    rows: list[list[Tensor]] = []
    z_BTD, _ = model.embed(images_BCHW, noise_BN)
    for module in model.encoder:
        layer = cast(EncoderLayer, module)
        half_BTD = layer.compress(z_BTD)
        before_BKTP, after_BKTP = (split_subspaces(layer.keys(x), layer.mssa.num_subspaces) for x in (z_BTD, half_BTD))
        z_BTD = layer.sparsify(half_BTD)
        rows.append(
            [
                codebook_rates(before_BKTP, epsilon).sum(-1),
                codebook_rates(after_BKTP, epsilon).sum(-1),
                coding_rate(layer.mssa_norm(half_BTD), epsilon),
                zero_share(z_BTD),
                gini(z_BTD),
            ]
        )
    return LayerMeasures(*(torch.stack(column) for column in zip(*rows, strict=True)))
