"""CRATE-MAE: the white-box masked autoencoder of arXiv 2404.02446, with the switches of its ablations."""

from __future__ import annotations

from typing import Any, Self, cast

from torch import Tensor

from crate_ray.config import CrateMAEConfig
from crate_ray.models.autoencoder import MaskedAutoencoder
from crate_ray.models.layers import DecoderLayer, EncoderLayer, initialize_weights


class CrateMAE(MaskedAutoencoder):
    """CRATE-MAE. See `MaskedAutoencoder` for what it computes around its layers, and `CrateMAEConfig` for its settings.

    Every parameter has a gradient in `forward`, for every setting. With `decoder_maps` 'tied' decoder layer l uses the
    codebook U and Dᵀ of encoder layer L − 1 − l; each tensor is stored once.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        assert config.decoder_depth is not None  # filled in by the config's validation
        super().__init__(
            config,
            encoder=(EncoderLayer(config) for _ in range(config.depth)),
            decoder=(DecoderLayer(config) for _ in range(config.decoder_depth)),
            dim=config.dim,
            decoder_dim=config.dim,
            encoder_tokens=config.encoder_tokens,
        )
        self.config = config
        self.tied_decoder = config.decoder_maps == "tied"
        self.unused_published: dict[str, Tensor] = {}
        """Tensors of an imported checkpoint that nothing uses, kept for the export; see `published`."""
        initialize_weights(self)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """A published size ('tiny', 'small', 'base', 'large') with fresh weights; overrides are config fields."""
        return cls(CrateMAEConfig.model_validate({"preset": preset, **overrides}))

    def decoder_layer(self, index: int, y_BTD: Tensor) -> Tensor:
        """Tokens after decoder layer `index`, with the mirrored encoder layer's maps where they are tied."""
        if not self.tied_decoder:
            return super().decoder_layer(index, y_BTD)
        mirrored = cast("EncoderLayer", self.encoder[len(self.encoder) - 1 - index])
        codebook_CD = cast("Tensor", mirrored.mssa.subspaces)
        return self.run_layer(self.decoder[index], y_BTD, mirrored.ista.dictionary.t(), codebook_CD)
