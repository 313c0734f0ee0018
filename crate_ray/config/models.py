"""Settings of the models, and their published sizes."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from crate_ray.config.base import Advanced, PositiveInt, Settings

PresetName = Literal["tiny", "small", "base", "large"]


CRATE_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"dim": 384, "depth": 12, "num_subspaces": 6},
    "small": {"dim": 576, "depth": 12, "num_subspaces": 12},
    "base": {"dim": 768, "depth": 12, "num_subspaces": 12},
    "large": {"dim": 1024, "depth": 24, "num_subspaces": 16},
}
"""The four published sizes (arXiv 2404.02446, appendix). The decoder is as deep as the encoder, and p = d / K. Both are
defaults of their fields, so they follow an override of depth or num_subspaces."""


VIT_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 384, "depth": 12, "num_heads": 6, "decoder_depth": 8, "qkv_bias": False},
    "small": {"dim": 576, "depth": 12, "num_heads": 12, "decoder_depth": 8, "qkv_bias": False},
    "base": {
        "dim": 768, "depth": 12, "num_heads": 12, "decoder_depth": 8, "decoder_num_heads": 16, "qkv_bias": False,
    },
    "large": {
        "dim": 1024, "depth": 24, "num_heads": 16, "decoder_depth": 8, "decoder_num_heads": 16, "qkv_bias": False,
    },
    "tiny-matched": {"dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.125},
    "small-matched": {"dim": 288, "depth": 12, "num_heads": 6},
    "base-matched": {"dim": 384, "depth": 12, "num_heads": 6},
    "large-matched": {"dim": 512, "depth": 24, "num_heads": 8},
}  # fmt: skip
"""Sizes of the baseline. 'base' and 'large' are the ViT-MAE that the authors of CRATE-MAE compare with (their
mae_vit_base has 143.79 M parameters with its frozen tables): 8 decoder layers at the encoder's width and no qkv bias.
'tiny' and 'small' follow the same pattern. '-matched' has the depths of a CRATE-MAE preset at half its width, because a
ViT layer has about 12 d² parameters and a CRATE layer 3 d²."""


def fill_from_preset(values: Any, presets: dict[str, dict[str, int]]) -> Any:
    """Fill fields that were not set explicitly with a preset's sizes."""
    if isinstance(values, dict) and values.get("preset") in presets:
        return {**presets[values["preset"]], **values}
    return values


def whole_number(value: Any) -> Any:
    """Convert a whole number that was given as text or as a float; return anything else unchanged."""
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


_GridSide = Annotated[int, Field(gt=0, le=2**16)]


class ImageModelConfig(Settings):
    """Settings that CRATE-MAE and ViT-MAE share: the patch grid and the masked-completion objective."""

    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """Image side in pixels, or [height, width]."""
    patch_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 16
    """Patch side in pixels, or [height, width]; divides the image size."""
    channels: Advanced[PositiveInt] = 3
    """Number of channels of the input: 3 for colour images, 1 for grayscale, any number for .npy grids."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of patches that are removed; floor(N (1 - mask_ratio)) of N patches stay visible."""
    norm_pix_loss: Advanced[bool] = False
    """Predict patches that are normalised by their own mean and variance, as in MAE, instead of plain pixels."""

    position_grid: Advanced[tuple[_GridSide, _GridSide] | None] = None
    """[rows, columns] of the patches that the model was pretrained with, if its images had another size: sine-cosine
    positions are interpolated from theirs. `evaluate` and `finetune` set it for their image_size."""

    @field_validator("image_size", "patch_size", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size, self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Number of patches down and across."""
        return self.image_hw[0] // self.patch_hw[0], self.image_hw[1] // self.patch_hw[1]

    @property
    def num_patches(self) -> int:
        """Number N of patches in an image."""
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def num_visible(self) -> int:
        """Number of patches that stay visible: ⌊N (1 − mask_ratio)⌋ (published code)."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        for side, image, patch in zip(("height", "width"), self.image_hw, self.patch_hw, strict=True):
            if image % patch:
                near = dict.fromkeys((image // patch * patch or patch, (image // patch + 1) * patch))
                raise ValueError(
                    f"image {side} {image} is not divisible by patch {side} {patch}; "
                    f"use an image size of {' or '.join(map(str, near))}"
                )
        if self.num_visible < 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} leaves none of the {self.num_patches} patches visible; lower it"
            )
        return self


class CrateMAEConfig(ImageModelConfig):
    """CRATE-MAE (arXiv 2404.02446). The defaults are the published base model for 224 × 224 pixels."""

    architecture: Literal["crate_mae"] = "crate_mae"
    """Which model this is."""
    preset: PresetName | None = None
    """Published size. Fields that are set explicitly override its values."""
    dim: Advanced[PositiveInt] = 768
    """Token dimension d; divisible by 4, for 2-D sine-cosine positions."""
    depth: Advanced[PositiveInt] = 12
    """Number of encoder layers."""
    decoder_depth: Advanced[Annotated[int, Field(ge=0)] | None] = None
    """Number of decoder layers; by default the same as in the encoder. 0: the model is an encoder alone, as published
    checkpoints of CRATE and CRATE-α are, and cannot be pretrained."""
    num_subspaces: Advanced[PositiveInt] = 12
    """Number K of subspaces in the codebook U_[K], which are the attention heads."""
    subspace_dim: Advanced[PositiveInt | None] = None
    """Dimension p of each subspace; by default d / K. K·p may differ from d."""
    sparsity_lambda: Advanced[Annotated[float, Field(ge=0)]] = 0.5
    """λ, the weight of the sparsity penalty in ISTA (published code of CRATE-MAE: 0.5; supervised CRATE: 0.1)."""
    step_size: Advanced[Annotated[float, Field(gt=0)]] = 0.1
    """η, the step size of ISTA (published code: 0.1)."""
    output_map: Advanced[Literal["learned", "tied"]] = "learned"
    """Output map W of MSSA: 'learned' with a bias (published), or 'tied' to [U_1 … U_K], as in the derivation of the
    compression step."""
    output_bias: Advanced[bool] = True
    """Bias of a learned output map W (CRATE-MAE and CRATE: yes; CRATE-α: no)."""
    attention: Advanced[Literal["softmax", "linear"]] = "softmax"
    """Subspace attention: 'softmax' (published), or 'linear', the gradient of R^c before it is approximated by a
    softmax."""
    decoder_maps: Advanced[Literal["free", "tied"]] = "free"
    """Maps of a decoder layer: 'free' (published), or 'tied' to those of the mirrored encoder layer (V = U, E = Dᵀ),
    the strict form of the discretised time reversal. 'tied' needs decoder_depth = depth."""
    encoder_tokens: Advanced[Literal["all", "visible"]] = "all"
    """Tokens that the encoder sees: 'all' N + 1, with mask tokens for removed patches (published), or only the
    'visible' ones, as in MAE."""
    attend_to: Advanced[Literal["all", "visible"]] = "all"
    """Tokens that a token attends to in the encoder: 'all' (published), or the 'visible' ones and itself, so that mask
    tokens are no keys."""
    decoder_attend_to: Advanced[Literal["all", "visible"]] = "all"
    """Tokens that a token attends to in the decoder: 'all' (published), or the 'visible' ones and itself."""
    predicted_share: Advanced[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Share of the removed patches that the decoder predicts in a training step, drawn at random. A smaller share saves
    time. Needs decoder_attend_to 'visible' and encoder_tokens 'visible'."""
    initialization: Advanced[Literal["published", "small"]] = "published"
    """Initial weights of MSSA: 'published' (Xavier-uniform), or 'small', normal with standard deviation 0.02 as in
    CRATE-α, which keeps tokens apart in deep stacks."""
    residual: Advanced[Literal["attention", "all"]] = "attention"
    """Residual connections: around 'attention' (published), or 'all' branches: Z' = Z½ + ISTA(LN(Z½)) in the encoder
    and Y½ = Y + E LN(Y) in the decoder."""
    layer_scale: Advanced[Annotated[float, Field(gt=0)] | None] = None
    """Initial value of a learned factor per channel on each residual branch (LayerScale); by default there is none
    (published)."""
    dictionary: Advanced[Literal["square", "overcomplete"]] = "square"
    """Dictionary of a layer: 'square' D ∈ R^{d×d} with one step of ISTA (published), or 'overcomplete' as in CRATE-α
    (arXiv 2405.20299), with two steps and a second dictionary that maps codes back to tokens, also in the decoder. It
    needs residual 'all'."""
    dictionary_expansion: Advanced[PositiveInt] = 4
    """Atoms of an overcomplete dictionary, as a multiple of dim."""
    threshold: Advanced[Literal["fixed", "learned"]] = "fixed"
    """Threshold of ISTA: 'fixed' at ηλ (published), or 'learned' for each code, starting at ηλ."""
    decoder_activation: Advanced[Literal["none", "relu"]] = "none"
    """Function after the decoder's map E: 'none' (published) or 'relu'."""
    positions: Advanced[Literal["sincos", "learned"]] = "sincos"
    """Positions of patches in the encoder: 'sincos', fixed 2-D sine-cosine positions (published), or 'learned', as in
    CRATE and CRATE-α. Learned ones are for one image size."""
    patch_norm: Advanced[bool] = False
    """Normalise each patch (LayerNorm) before and after its embedding, as CRATE does."""
    norm_eps: Advanced[Annotated[float, Field(gt=0)]] = 1e-5
    """ε of the LayerNorms of layers and patches (CRATE-MAE and CRATE: 1e-5; CRATE-α: 1e-6)."""
    last_norm_eps: Advanced[Annotated[float, Field(gt=0)]] = 1e-6
    """ε of the encoder's and the decoder's last LayerNorm (CRATE-MAE: 1e-6; CRATE and CRATE-α: 1e-5)."""

    form: ClassVar[tuple[str, ...]] = (
        "output_map", "output_bias", "attention", "decoder_maps", "encoder_tokens", "attend_to", "decoder_attend_to",
        "residual", "layer_scale", "dictionary", "threshold", "decoder_activation", "positions", "position_grid",
        "patch_norm", "norm_eps", "last_norm_eps",
    )  # fmt: skip
    """Settings that change the equations; their defaults are the published form."""

    @property
    def num_predicted(self) -> int:
        """Number of removed patches that the decoder predicts in a training step, at least 1 if any is removed."""
        removed = self.num_patches - self.num_visible
        return min(removed, max(1, round(removed * self.predicted_share)))

    @property
    def unpublished(self) -> list[str]:
        """The settings in which the model differs from the published form."""
        return [name for name in self.form if getattr(self, name) != type(self).model_fields[name].default]

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        values = fill_from_preset(values, CRATE_PRESETS)
        if isinstance(values, dict):
            values = dict(values)
            if values.get("decoder_depth") is None:
                values["decoder_depth"] = values.get("depth", cls.model_fields["depth"].default)
            if values.get("subspace_dim") is None:
                values.pop("subspace_dim", None)
                dim = whole_number(values.get("dim", cls.model_fields["dim"].default))
                count = whole_number(values.get("num_subspaces", cls.model_fields["num_subspaces"].default))
                if isinstance(dim, int) and isinstance(count, int) and count > 0 and dim % count == 0:
                    values["subspace_dim"] = dim // count
        return values

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.dim % 4:
            raise ValueError(f"dim {self.dim} is not divisible by 4, which 2-D sine-cosine positions need")
        if self.subspace_dim is None:
            raise ValueError(
                f"dim {self.dim} is not divisible by num_subspaces {self.num_subspaces}; set subspace_dim explicitly"
            )
        if self.decoder_maps == "tied" and self.decoder_depth != self.depth:
            raise ValueError(
                f"decoder_maps 'tied' needs decoder_depth equal to depth, got {self.decoder_depth} and {self.depth}"
            )
        if self.dictionary == "overcomplete" and (self.residual != "all" or self.decoder_maps != "free"):
            raise ValueError("dictionary 'overcomplete' needs residual 'all' and decoder_maps 'free'")
        if self.dictionary == "overcomplete" and self.decoder_activation != "none":
            raise ValueError("decoder_activation needs dictionary 'square': an overcomplete decoder has no map E")
        if self.attend_to == "visible" and (self.attention != "softmax" or self.encoder_tokens != "all"):
            raise ValueError("attend_to 'visible' needs attention 'softmax' and encoder_tokens 'all'")
        if self.decoder_attend_to == "visible" and self.attention != "softmax":
            raise ValueError("decoder_attend_to 'visible' needs attention 'softmax'")
        if self.predicted_share < 1 and "all" in (self.decoder_attend_to, self.encoder_tokens):
            raise ValueError("predicted_share below 1 needs decoder_attend_to 'visible' and encoder_tokens 'visible'")
        if self.threshold == "learned" and self.sparsity_lambda == 0:
            raise ValueError("threshold 'learned' starts at ηλ, so sparsity_lambda cannot be 0")
        return self


class ViTMAEConfig(ImageModelConfig):
    """ViT-MAE, the baseline (arXiv 2111.06377), with the sizes or the parameter count of a CRATE-MAE preset."""

    architecture: Literal["vit_mae"] = "vit_mae"
    """Which model this is."""
    preset: (
        Literal["tiny", "small", "base", "large", "tiny-matched", "small-matched", "base-matched", "large-matched"]
        | None
    ) = None
    """Width, encoder depth and heads of a CRATE-MAE preset; '-matched' has that preset's parameter count within 2 %.
    Fields that are set explicitly override its values."""
    dim: Advanced[PositiveInt] = 768
    """Token dimension of the encoder; divisible by 4 and by num_heads."""
    depth: Advanced[PositiveInt] = 12
    """Number of encoder layers."""
    num_heads: Advanced[PositiveInt] = 12
    """Number of attention heads of the encoder."""
    decoder_dim: Advanced[PositiveInt | None] = None
    """Token dimension of the decoder; by default the encoder's."""
    decoder_depth: Advanced[Annotated[int, Field(ge=0)] | None] = None
    """Number of decoder layers; by default the same as in the encoder. 0: the model is an encoder alone, as published
    checkpoints are, and cannot be pretrained."""
    decoder_num_heads: Advanced[PositiveInt | None] = None
    """Number of attention heads of the decoder; by default the encoder's."""
    mlp_ratio: Advanced[Annotated[float, Field(gt=0)]] = 4.0
    """Hidden width of the MLP as a multiple of the token dimension."""
    qkv_bias: Advanced[bool] = True
    """Use biases in the query, key and value projections (MAE: yes; ViT-MAE of the CRATE-MAE authors: no)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        values = fill_from_preset(values, VIT_PRESETS)
        if isinstance(values, dict):
            values = dict(values)
            for name in ("dim", "depth", "num_heads"):
                if values.get(f"decoder_{name}") is None:
                    values[f"decoder_{name}"] = values.get(name, cls.model_fields[name].default)
        return values

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        sizes = (("", self.dim, self.num_heads), ("decoder_", self.decoder_dim or 0, self.decoder_num_heads or 1))
        for part, dim, heads in sizes:
            if dim % 4:
                raise ValueError(f"{part}dim {dim} is not divisible by 4, which 2-D sine-cosine positions need")
            if dim % heads:
                raise ValueError(f"{part}dim {dim} is not divisible by {part}num_heads {heads}")
        return self


def _default_architecture(value: Any) -> Any:
    return {"architecture": "crate_mae", **value} if isinstance(value, dict) else value


# ViT-MAE first: for a field of both models, --help shows the default of the last one.
ModelConfig = Annotated[
    ViTMAEConfig | CrateMAEConfig, Field(discriminator="architecture"), BeforeValidator(_default_architecture)
]
