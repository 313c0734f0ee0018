"""A trained encoder or classifier with the interface of timm's models, for code that expects one.

Shapes: B batch, C channels, N patches, T = 1 + N tokens (CLS first), D token dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from crate_ray.errors import UserError
from crate_ray.models.autoencoder import MaskedAutoencoder
from crate_ray.models.classifier import Classifier
from crate_ray.models.preprocess import Preprocess


class Backbone(nn.Module):
    """An encoder that sees all tokens, or a classifier, with timm's names. The decoder is left out.

    It is a copy: training it does not change `model`.

        backbone = crate_ray.Backbone(crate_ray.load_model("runs/mine"))

    Parameters
    ----------
    model
        A masked autoencoder or a classifier.
    """

    preprocess: Preprocess
    """Turns pictures into the input, if the model has it."""

    num_prefix_tokens = 1

    def __init__(self, model: MaskedAutoencoder | Classifier) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        if hasattr(model, "preprocess"):
            self.preprocess = model.preprocess
        if isinstance(model, Classifier):
            self.autoencoder = model.autoencoder
            self.norm: nn.Module = nn.Identity()  # a classifier's encoder has no last norm
            self.fc_norm: nn.Module = model.norm
            self.head: nn.Module = model.head
            self.global_pool = {"cls": "token", "mean": "avg"}[model.config.pooling]
            self.num_classes = model.config.num_classes
        else:
            self.norm, self.fc_norm, self.head = model.encoder_norm, nn.Identity(), nn.Identity()
            model.drop_decoder()
            del model.encoder_norm
            self.autoencoder = model
            self.global_pool, self.num_classes = "avg", 0
        self.num_features = self.embed_dim = self.autoencoder.cls_token.shape[-1]

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's layers."""
        return self.autoencoder.encoder

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What `timm.data.resolve_model_data_config` reads: size, mean and standard deviation of the input."""
        return {
            "input_size": (self.autoencoder.channels, *self.autoencoder.image_hw),
            "mean": self.preprocess.mean,
            "std": self.preprocess.std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "num_classes": self.num_classes,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of normalised images (B, C, H, W); for a classifier logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens (B, T, D) after the encoder's last norm. A classifier has none: its tokens are the last layer's."""
        z_BTD, _ = self.autoencoder.embed(images)
        for layer in self.blocks:
            z_BTD = self.autoencoder.run_layer(layer, z_BTD)
        return cast("Tensor", self.norm(z_BTD))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean of the patch tokens (B, D), or the CLS token if `global_pool` is 'token'; of a classifier the logits.

        `pre_logits` leaves out the map to the classes.
        """
        pooled_BD = self.fc_norm(tokens[:, 0] if self.global_pool == "token" else tokens[:, 1:].mean(1))
        return cast("Tensor", pooled_BD if pre_logits else self.head(pooled_BD))

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Patch tokens of several layers, in their order.

        Parameters
        ----------
        images
            Normalised images (B, C, H, W).
        n
            The last n layers, or the numbers of layers from 0. Negative ones count from the end.
        reshape
            Return maps (B, D, rows, columns) instead of tokens (B, N, D).
        return_prefix_tokens
            Return pairs of the patch tokens and the CLS token, (B, 1, D).
        norm
            Apply the encoder's last norm.

        Raises
        ------
        UserError
            If there is no such layer.
        """
        depth = len(self.blocks)
        wanted = self._layer_numbers(range(depth - n, depth) if isinstance(n, int) else n)
        found: list[Any] = []
        z_BTD, _ = self.autoencoder.embed(images)
        for number, layer in enumerate(self.blocks[: wanted[-1] + 1]):
            z_BTD = self.autoencoder.run_layer(layer, z_BTD)
            if number not in wanted:
                continue
            tokens_BTD = self.norm(z_BTD) if norm else z_BTD
            patches = tokens_BTD[:, 1:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, self.autoencoder.grid_hw)
            found.append((patches, tokens_BTD[:, :1]) if return_prefix_tokens else patches)
        return found

    def features_only(self, out_indices: Sequence[int] | None = None) -> FeatureMaps:
        """A module that returns maps of layers, by default of four layers at equal distances. See `FeatureMaps`."""
        depth = len(self.blocks)
        quarters = sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
        return FeatureMaps(self, self._layer_numbers(quarters if out_indices is None else out_indices))

    def _layer_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Numbers of layers from 0, in order."""
        depth = len(self.blocks)
        if wrong := [number for number in numbers if not -depth <= number < depth]:
            raise UserError(f"there is no layer {wrong[0]}; the model's layers are 0 to {depth - 1}")
        if not numbers:
            raise UserError(f"no layer is named; the model's layers are 0 to {depth - 1}")
        return sorted({number % depth for number in numbers})


class FeatureInfo(NamedTuple):
    """What a consumer of maps has to know, as in timm."""

    out_indices: list[int]
    """Layers, from 0."""
    num_chs: int
    """Channels of each map."""
    patch: int | tuple[int, int]
    """Pixels of an image per pixel of a map."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [self.num_chs] * len(self.out_indices)

    def reduction(self) -> list[int | tuple[int, int]]:
        """Pixels of an image per pixel of each map; a pair (height, width) if they differ."""
        return [self.patch] * len(self.out_indices)

    def module_name(self) -> list[str]:
        """Layers, by name."""
        return [f"blocks.{index}" for index in self.out_indices]


class FeatureMaps(nn.Module):
    """Maps (B, D, rows, columns) of layers of a backbone, without the last norm, as a list: timm's `features_only`.

    All have the same size, since the layers do not pool.
    """

    def __init__(self, backbone: Backbone, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.out_indices = backbone, list(out_indices)
        height, width = backbone.autoencoder.patch_hw
        patch = height if height == width else (height, width)
        self.feature_info = FeatureInfo(self.out_indices, backbone.num_features, patch)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of normalised images (B, C, H, W)."""
        return self.backbone.get_intermediate_layers(images, self.out_indices, reshape=True)
