"""Where an encoder looks: attention of the CLS token, and the main directions of the keys, as maps of patches.

Shapes: B images, K heads, T = 1 + N tokens (CLS first), N = h·w patches, C = K·P key numbers, M components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_ray.models import MaskedAutoencoder


class PatchMaps(NamedTuple):
    """Maps over the patch grid of each image, float32 on the CPU."""

    attention: Tensor
    """Attention of the CLS token to each patch, by layer and head, (B, L, K, h, w), without what it gives itself."""
    components: Tensor
    """Projections of the last layer's keys onto their first directions, (B, M, h, w); signs are arbitrary."""


@torch.no_grad()
def patch_maps(model: MaskedAutoencoder, images_BCHW: Tensor, num_components: int = 3) -> PatchMaps:
    """CLS attention of every head, and components of the last keys, of whole normalised images.

    Where attention is linear it may be negative; such maps start at their smallest number.
    """
    encoded = model.encode(images_BCHW, return_attention=True, return_keys=True)
    assert encoded.attention is not None and encoded.keys is not None
    grid = tuple(model.grid_hw)
    attention_BLKN = torch.stack([layer[:, :, 0, 1:] for layer in encoded.attention], 1).float()
    attention_BLKN = attention_BLKN - attention_BLKN.amin(-1, keepdim=True).clamp(max=0)
    components_BMN = key_components(encoded.keys[-1][:, 1:].float(), num_components)
    return PatchMaps(attention_BLKN.unflatten(-1, grid).cpu(), components_BMN.unflatten(-1, grid).cpu())


def key_components(keys_BNC: Tensor, num_components: int) -> Tensor:
    """Coordinates of each image's patches along the first principal directions of its own keys, (B, M, N)."""
    centred_BNC = keys_BNC - keys_BNC.mean(1, keepdim=True)
    left_BNR, values_BR, _ = torch.linalg.svd(centred_BNC, full_matrices=False)
    components_BMN = (left_BNR * values_BR.unsqueeze(1)).transpose(1, 2)[:, :num_components]
    missing = num_components - components_BMN.shape[1]  # of very small grids
    return torch.nn.functional.pad(components_BMN, (0, 0, 0, missing))
