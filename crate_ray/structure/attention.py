"""Maps over the patches of an image: attention of the CLS token, and principal components of the keys.

Shapes: B images, K heads, T = 1 + N tokens (CLS first), N = h·w patches, C = K·P entries of a key, M components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_ray.models import MaskedAutoencoder


class PatchMaps(NamedTuple):
    """Maps over the patch grid of each image, float32 on the CPU."""

    attention: Tensor
    """Attention of the CLS token to each patch, by layer and head, (B, L, K, h, w)."""
    components: Tensor
    """The last layer's keys projected onto their principal components, (B, M, h, w); signs are arbitrary."""


@torch.no_grad()
def patch_maps(model: MaskedAutoencoder, images: Tensor, num_components: int = 3) -> PatchMaps:
    """CLS attention of every head and key components of whole, normalised images (B, channels, H, W).

    Linear attention may be negative; such a map is shifted so that its minimum is 0.
    """
    encoded = model.encode(images, return_attention=True, return_keys=True)
    assert encoded.attention is not None and encoded.keys is not None
    grid = tuple(model.grid_hw)
    attention_BLKN = torch.stack([layer[:, :, 0, 1:] for layer in encoded.attention], 1).float()
    attention_BLKN = attention_BLKN - attention_BLKN.amin(-1, keepdim=True).clamp(max=0)
    components_BMN = key_components(encoded.keys[-1][:, 1:].float(), num_components)
    return PatchMaps(attention_BLKN.unflatten(-1, grid).cpu(), components_BMN.unflatten(-1, grid).cpu())


def key_components(keys: Tensor, num_components: int) -> Tensor:
    """Coordinates (B, M, N) of keys (B, N, C) along the first principal components of each image's own keys.

    Components beyond the number that a small grid has are 0.
    """
    centred_BNC = keys - keys.mean(1, keepdim=True)
    left_BNR, values_BR, _ = torch.linalg.svd(centred_BNC, full_matrices=False)
    components_BMN = (left_BNR * values_BR.unsqueeze(1)).transpose(1, 2)[:, :num_components]
    missing = num_components - components_BMN.shape[1]
    return torch.nn.functional.pad(components_BMN, (0, 0, 0, missing))
