"""An encoder or image classifier that crate-ray trained, for transformers: CRATE-MAE's or ViT-MAE's encoder.

`crate-ray export --format huggingface` wrote this file; it has crate-ray's license, Apache 2.0. It needs torch and
transformers, not crate-ray. Load the model from the folder of this file:

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder)

Of a folder without a classifier, the second form starts with a new head, for fine-tuning.

Shapes: B batch, C channels, N patches, T = 1 + N tokens (CLS first), D token dimension, K heads, P dimension of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from crate_ray.models.crate import build_layers
from crate_ray.models.patches import patchify, sincos_positions
from crate_ray.models.vit import TransformerLayer


class CrateConfig(PretrainedConfig):
    """Sizes and settings of the encoder, by crate-ray's names; those that both architectures have are attributes."""

    model_type = "crate_ray"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_channels": "channels",
    }

    def __init__(
        self,
        architecture: str = "crate_mae",
        image_size: int | list[int] = 224,
        patch_size: int | list[int] = 16,
        channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        pooling: str = "mean",
        encoder_norm: bool = True,
        positions: str = "sincos",
        patch_norm: bool = False,
        norm_eps: float = 1e-5,
        last_norm_eps: float = 1e-6,
        **others: Any,
    ) -> None:
        self.architecture, self.image_size, self.patch_size = architecture, image_size, patch_size
        self.channels, self.dim, self.depth = channels, dim, depth
        self.pooling, self.encoder_norm = pooling, encoder_norm
        self.positions, self.patch_norm = positions, patch_norm
        self.norm_eps, self.last_norm_eps = norm_eps, last_norm_eps
        super().__init__(**others)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _pair(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Number of patches down and across."""
        return self.image_hw[0] // self.patch_hw[0], self.image_hw[1] // self.patch_hw[1]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class CratePreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = CrateConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, CrateModel):
            nn.init.normal_(module.cls_token, std=0.02)
            if isinstance(module.positions, nn.Parameter):
                nn.init.normal_(module.positions, std=0.02)
        elif hasattr(module, "reset_parameters"):
            cast("Any", module).reset_parameters()


class CrateModel(CratePreTrainedModel):
    """The encoder. `last_hidden_state` holds the tokens, `pooler_output` the mean of the patch tokens (or CLS)."""

    positions: Tensor

    def __init__(self, config: CrateConfig, encoder_norm: bool | None = None) -> None:
        super().__init__(config)
        self.patch_embed = nn.Conv2d(config.channels, config.dim, config.patch_hw, config.patch_hw)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.zeros(1, config.grid_hw[0] * config.grid_hw[1], config.dim))
        else:
            self.register_buffer("positions", sincos_positions(config.dim, config.grid_hw))
        numbers, eps = config.patch_hw[0] * config.patch_hw[1] * config.channels, config.norm_eps
        self.patch_norm = nn.LayerNorm(numbers, eps=eps) if config.patch_norm else None
        self.embedding_norm = nn.LayerNorm(config.dim, eps=eps) if config.patch_norm else None
        self.encoder = nn.ModuleList(_layers(config))
        has_norm = config.encoder_norm if encoder_norm is None else encoder_norm
        self.encoder_norm = nn.LayerNorm(config.dim, eps=config.last_norm_eps) if has_norm else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Encode normalised images (B, C, H, W)."""
        config = self.config
        expected = (config.channels, *config.image_hw)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"the images are {tuple(pixel_values.shape[1:])}, but the model takes {expected}")
        z_BTD = self._embed(pixel_values.to(self.patch_embed.weight.dtype))
        states, maps = [z_BTD], []
        wants_maps = config.output_attentions if output_attentions is None else output_attentions
        for layer in self.encoder:
            if wants_maps:
                maps.append(cast("Any", layer).attention(z_BTD))
            z_BTD = layer(z_BTD)
            states.append(z_BTD)
        z_BTD = self.encoder_norm(z_BTD)
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPooling(
            last_hidden_state=z_BTD,
            pooler_output=z_BTD[:, 0] if config.pooling == "cls" else z_BTD[:, 1:].mean(1),
            hidden_states=tuple(states) if wants_states else None,
            attentions=tuple(maps) if wants_maps else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _embed(self, images: Tensor) -> Tensor:
        kernel_DX = self.patch_embed.weight.permute(0, 2, 3, 1).flatten(1)
        x_BND = patchify(images, self.config.patch_hw)
        if self.patch_norm is not None:
            x_BND = self.patch_norm(x_BND)
        x_BND = F.linear(x_BND, kernel_DX, self.patch_embed.bias)
        if self.embedding_norm is not None:
            x_BND = self.embedding_norm(x_BND)
        x_BND = x_BND + self.positions.to(x_BND.dtype)  # transformers may keep buffers in float32
        return torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)


class CrateForImageClassification(CratePreTrainedModel):
    """The encoder without its last norm, a norm of the pooled tokens, and a linear map to classes."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"encoder_norm\."]

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = CrateModel(config, encoder_norm=False)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **options: Any
    ) -> Any:
        """Classify normalised images (B, C, H, W). With labels (B,), also compute the cross entropy."""
        encoded = self.backbone(pixel_values, **options)
        logits = self.head(self.norm(encoded.pooler_output))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return output.to_tuple() if return_dict is False else output


def _layers(config: CrateConfig) -> Iterable[nn.Module]:
    if config.architecture == "crate_mae":
        return build_layers(config)[0]
    sizes = (config.dim, config.num_heads, config.mlp_ratio, config.qkv_bias)
    return (TransformerLayer(*sizes) for _ in range(config.depth))
