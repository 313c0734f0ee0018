"""The masked autoencoder around a model's layers: embedding, encoder, decoder, prediction and loss.

CRATE-MAE and ViT-MAE share it. Shapes: B batch, C channels, N patches, V visible patches, T = 1 + N or 1 + V tokens
(CLS first), D token dimension, K heads, P dimension of a head, X numbers of one patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crate_ray.config import ImageModelConfig
from crate_ray.errors import UserError
from crate_ray.models.kernels.linear import product_dtype
from crate_ray.models.patches import (
    Masking,
    patch_statistics,
    patchify,
    put_tokens,
    random_masking,
    sample_losses,
    sincos_positions,
    take_tokens,
    unpatchify,
)
from crate_ray.models.preprocess import Preprocess


class Encoded(NamedTuple):
    """Result of `MaskedAutoencoder.encode`. A list has one entry per encoder layer; it is None unless requested."""

    tokens: Tensor
    """Tokens after the encoder's last norm, (B, T, D)."""
    masking: Masking | None
    """The mask; None for whole images."""
    layers: list[Tensor] | None
    """Output of each layer, (B, T, D)."""
    attention: list[Tensor] | None
    """Attention maps of each layer, (B, K, T, T)."""
    keys: list[Tensor] | None
    """Keys of each layer with all heads side by side, (B, T, K·P); for CRATE the coordinates Uᵀ LN(z)."""


class Decoded(NamedTuple):
    """Result of `MaskedAutoencoder.decode`."""

    prediction: Tensor
    """Predicted patches, (B, N, X); or (B, M, X), if the mask has M `decoded` patches."""
    layers: list[Tensor] | None
    """Output of each decoder layer, (B, 1 + N or 1 + M, decoder's D); None unless requested."""


class MaskedOutput(NamedTuple):
    """Result of a masked autoencoder's forward pass."""

    loss: Tensor
    """Mean of `sample_loss`, a scalar."""
    prediction: Tensor
    """Predicted patches, (B, N, X). With `predicted_share`, 0 for those that were not decoded in this training step."""
    mask: Tensor
    """(B, N) float; 1 for a removed patch, 0 for a visible one."""
    sample_loss: Tensor
    """Loss of each image, (B,); see `patches.sample_losses`."""
    encoder_layers: list[Tensor] | None = None
    """Output of each encoder layer, (B, T, D); None unless requested."""
    decoder_layers: list[Tensor] | None = None
    """Output of each decoder layer, (B, 1 + N, decoder's D); None unless requested."""


class EncoderLayerProtocol(Protocol):
    """Interface of an encoder layer."""

    def __call__(self, z: Tensor) -> Tensor:
        """Tokens (B, T, D) to tokens (B, T, D)."""

    def attention(self, z: Tensor, **masked: Tensor) -> Tensor:
        """Attention maps, (B, K, T, T). For masked images, `MaskedAutoencoder.encoder_mask` gives more arguments."""

    def keys(self, z: Tensor) -> Tensor:
        """Keys of all heads side by side, (B, T, K·P)."""


class MaskedAutoencoder(nn.Module):
    """Patch embedding, CLS token, positions, encoder, decoder, prediction of patches, and the masked loss.

    A model passes in its layers and calls `initialize_weights` at the end of its own `__init__`.

    Parameters
    ----------
    config
        Patch grid and objective.
    encoder, decoder
        The layers; see `EncoderLayerProtocol`. A decoder layer maps tokens to tokens.
    dim, decoder_dim
        Token dimensions.
    encoder_tokens
        'all': the encoder sees all N + 1 tokens, with the mask token in place of each removed patch. 'visible': the
        encoder sees CLS and the visible patches only. Mask tokens then enter before the decoder, which adds positions
        to all patches again (MAE).
    decoder_embed
        Map from encoder to decoder tokens; the identity by default.
    norm_eps
        ε of the encoder's and the decoder's last norm.
    learned_positions
        Learn the encoder's positions. The decoder's stay sine-cosine.
    patch_norm_eps
        ε of LayerNorms of each patch, before and after its embedding; by default there are none.

    Without decoder layers the model is an encoder alone: `has_decoder` is False, and it has no mask token.

    Raises
    ------
    UserError
        If patches of a single number are to be normalised.
    """

    preprocess: Preprocess
    """Turns pictures into the input. `crate_ray.load_model` sets it; a model that is built has none."""

    def __init__(
        self,
        config: ImageModelConfig,
        *,
        encoder: Iterable[nn.Module],
        decoder: Iterable[nn.Module],
        dim: int,
        decoder_dim: int,
        encoder_tokens: Literal["all", "visible"],
        decoder_embed: nn.Module | None = None,
        norm_eps: float = 1e-6,
        learned_positions: bool = False,
        patch_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        patch_h, patch_w = config.patch_hw
        patch_numbers = patch_h * patch_w * config.channels
        if config.norm_pix_loss and patch_numbers == 1:
            raise UserError("norm_pix_loss needs patches of more than one number; use larger patches or switch it off")
        # Plain attributes: torch.compile does not trace into pydantic models.
        self.channels = config.channels
        self.image_hw = config.image_hw
        self.patch_hw = config.patch_hw
        self.grid_hw = config.grid_hw
        self.num_patches = config.num_patches
        self.num_visible = config.num_visible
        self.num_predicted = config.num_patches - config.num_visible
        """Removed patches that the decoder predicts in a training step. By default these are all of them."""
        self.norm_pix_loss = config.norm_pix_loss
        self.visible_only = encoder_tokens == "visible"
        self.has_decoder = True
        """False for an encoder alone, as many published checkpoints are."""
        self.checkpoint_layers = False
        """Activation checkpointing: keep only each layer's input, and recompute the layer in the backward pass."""
        self.bf16_tokens = False
        """Under autocast, give the encoder's layers tokens in autocast's dtype; their outputs then have it as well."""

        self.patch_embed = nn.Conv2d(config.channels, dim, kernel_size=config.patch_hw, stride=config.patch_hw)
        self.patch_norm = None if patch_norm_eps is None else nn.LayerNorm(patch_numbers, eps=patch_norm_eps)
        self.embedding_norm = None if patch_norm_eps is None else nn.LayerNorm(dim, eps=patch_norm_eps)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.encoder = nn.ModuleList(encoder)
        self.encoder_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.decoder_embed = nn.Identity() if decoder_embed is None else decoder_embed
        self.decoder = nn.ModuleList(decoder)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=norm_eps)
        self.prediction = nn.Linear(decoder_dim, patch_numbers)

        self.positions: Tensor
        self.decoder_positions: Tensor | None
        if learned_positions:
            self.positions = nn.Parameter(torch.empty(1, config.num_patches, dim))
        else:
            self.register_buffer(
                "positions", sincos_positions(dim, config.grid_hw, config.position_grid), persistent=False
            )
        decoder_positions = None
        if self.visible_only:
            decoder_positions = sincos_positions(decoder_dim, config.grid_hw, config.position_grid)
        self.register_buffer("decoder_positions", decoder_positions, persistent=False)
        if not len(self.decoder):
            self.drop_decoder()
            self.decoder = nn.ModuleList()
            self.has_decoder = False

    def forward(self, images: Tensor, noise: Tensor | None = None, *, return_layers: bool = False) -> MaskedOutput:
        """Mask images, predict their patches, and compute the loss over the removed ones.

        With `mask_ratio` 0 no patch is removed, and the loss is the mean over all patches.

        Parameters
        ----------
        images
            Images (B, C, H, W) of the configured size.
        noise
            One number per patch, (B, N); the patches with the smallest stay visible. The default is uniform noise from
            torch's global generator of the images' device.
        return_layers
            Also return the output of each encoder and decoder layer.

        Raises
        ------
        UserError
            If the images have another size or number of channels, or the model has no decoder.
        """
        if noise is None:
            noise = torch.rand(images.shape[0], self.num_patches, device=images.device)
        self._check_images(images)
        self._check_decoder()
        patches_BNX = self.patchify(images)
        z_BTD, masking = self._embed(patches_BNX, noise)
        encoded = self._encode(z_BTD, masking, return_layers=return_layers)
        decoded = self.decode(encoded.tokens, masking, return_layers=return_layers)
        assert masking is not None
        prediction_BNX, target_BNX = decoded.prediction, self._target(patches_BNX)
        if masking.decoded is None:
            num_removed = self.num_patches - self.num_visible
            loss_B = sample_losses(prediction_BNX, target_BNX, masking.removed, num_removed)
        else:
            predicted_BM = masking.removed.gather(1, masking.decoded)
            loss_B = sample_losses(
                prediction_BNX, take_tokens(target_BNX, masking.decoded), predicted_BM, self.num_predicted
            )
            prediction_BNX = put_tokens(prediction_BNX, masking.decoded, self.num_patches)
        mask_BN = masking.removed.to(loss_B.dtype)
        return MaskedOutput(loss_B.mean(), prediction_BNX, mask_BN, loss_B, encoded.layers, decoded.layers)

    def embed(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Masking | None]:
        """Z¹ = [CLS, t_1 + pos_1, …, t_N + pos_N]; t_n = P x_n + b for n ∉ Ω, the mask token for n ∈ Ω.    (10)

        Returns the input tokens (B, T, D) of the first encoder layer, and the mask. x_n is a patch, P and b are the
        patch embedding, and Ω holds the removed patches. With 'visible' encoder tokens, removed patches are left out
        instead. Parameters and errors are those of `encode`.
        """
        self._check_images(images)
        return self._embed(self.patchify(images), noise)

    def encode(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        *,
        return_layers: bool = False,
        return_attention: bool = False,
        return_keys: bool = False,
    ) -> Encoded:
        """Encode whole images or, if noise is given, masked ones.

        Parameters
        ----------
        images
            Images (B, C, H, W) of the configured size, normalised as in training.
        noise
            One number per patch, (B, N); the patches with the smallest stay visible. None for no mask.
        return_layers, return_attention, return_keys
            Also return the outputs, attention maps or keys of each layer. Maps and keys are computed separately, in
            addition to the layer's own pass.

        Raises
        ------
        UserError
            If the images have another size or number of channels.
        """
        z_BTD, masking = self.embed(images, noise)
        return self._encode(
            z_BTD,
            masking,
            return_layers=return_layers,
            return_attention=return_attention,
            return_keys=return_keys,
        )

    def decode(self, tokens: Tensor, masking: Masking | None = None, *, return_layers: bool = False) -> Decoded:
        """Predict patches from the encoder's tokens.

        Parameters
        ----------
        tokens
            `Encoded.tokens`, (B, T, D), or other tokens of that shape.
        masking
            `Encoded.masking`; needed if the encoder saw only the visible patches of masked images, or if the decoder
            attends to these only. Without it, all patches count as visible.
        return_layers
            Also return the output of each decoder layer.

        Raises
        ------
        UserError
            If the model has no decoder.
        """
        self._check_decoder()
        y_BTD = self.decoder_embed(tokens)
        if self.visible_only:
            y_BTD = self.restore_removed(y_BTD, masking)
        layers: list[Tensor] = []
        masked = self.decoder_mask(masking)
        for index in range(len(self.decoder)):
            y_BTD = self.decoder_layer(index, y_BTD, **masked)
            if return_layers:
                layers.append(y_BTD)
        prediction_BNX = self.prediction(self.decoder_norm(y_BTD)[:, 1:])
        return Decoded(prediction_BNX, layers if return_layers else None)

    def decoder_layer(self, index: int, y: Tensor, **masked: Tensor) -> Tensor:
        """Tokens after decoder layer `index`. Models whose decoder uses the encoder's weights override this."""
        return self.run_layer(self.decoder[index], y, **masked)

    def encoder_mask(self, masking: Masking | None) -> dict[str, Tensor]:
        """What an encoder layer needs to know of a mask, as keyword arguments. Most models' layers need nothing."""
        return {}

    def decoder_mask(self, masking: Masking | None) -> dict[str, Tensor]:
        """The same for a decoder layer."""
        return {}

    def run_layer(self, layer: Callable[..., Tensor], *inputs: Tensor, **masked: Tensor) -> Tensor:
        """Output of a layer. All layers run through this method, which applies `checkpoint_layers`."""
        if self.checkpoint_layers and torch.is_grad_enabled():
            # Layers use no random numbers, so there is no generator state to preserve.
            layer = partial(layer, **masked)
            return cast("Tensor", checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False))
        return layer(*inputs, **masked)

    def target(self, images: Tensor) -> Tensor:
        """Target of the prediction: the patches (B, N, X). With `norm_pix_loss` each patch is normalised by itself."""
        return self._target(self.patchify(images))

    def patchify(self, images: Tensor) -> Tensor:
        """Patches (B, N, X) of images (B, C, H, W); see `patches.patchify`."""
        return patchify(images, self.patch_hw)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Images (B, C, H, W) of patches (B, N, X)."""
        return unpatchify(patches, self.grid_hw, self.patch_hw)

    def reconstruct(self, prediction: Tensor, images: Tensor) -> Tensor:
        """The predicted patches (B, N, X) as images (B, C, H, W), on the scale of the input images.

        With `norm_pix_loss` each patch is given the mean and variance of the true patch, which the model does not
        predict.
        """
        if self.norm_pix_loss:
            mean_BN1, std_BN1 = patch_statistics(self.patchify(images))
            prediction = prediction * std_BN1 + mean_BN1
        return self.unpatchify(prediction)

    def drop_decoder(self) -> None:
        """Delete what only the decoder needs. What is left can `embed` and `encode` images without a mask."""
        for name in ("mask_token", "decoder_embed", "decoder", "decoder_norm", "prediction"):
            if hasattr(self, name):
                delattr(self, name)

    def _embed(self, patches_BNX: Tensor, noise_BN: Tensor | None) -> tuple[Tensor, Masking | None]:
        # Compute the convolution as a matrix product. The backward pass is faster, and so is the forward pass in bf16
        # on the CPU. The loss needs the patches anyway. Kernel and patches are in the order height, width, channel.
        kernel_DX = self.patch_embed.weight.permute(0, 2, 3, 1).flatten(1)
        if self.patch_norm is not None:
            patches_BNX = self.patch_norm(patches_BNX)
        x_BND = F.linear(patches_BNX, kernel_DX, self.patch_embed.bias)
        if self.embedding_norm is not None:
            x_BND = self.embedding_norm(x_BND)
        masking = None
        if noise_BN is not None:
            num_decoded = self.num_visible + self.num_predicted
            partial_decoding = self.training and num_decoded < self.num_patches
            masking = random_masking(noise_BN, self.num_visible, num_decoded if partial_decoding else None)
        if masking is not None and not self.visible_only:
            self._check_decoder()  # the mask token came with it
            x_BND = torch.where(masking.removed.unsqueeze(-1), self.mask_token, x_BND)
        x_BND = x_BND + self.positions
        if masking is not None and self.visible_only:
            x_BND = take_tokens(x_BND, masking.visible)
        z_BTD = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        return z_BTD.to(product_dtype(z_BTD)) if self.bf16_tokens else z_BTD, masking

    def _encode(
        self,
        z_BTD: Tensor,
        masking: Masking | None,
        *,
        return_layers: bool,
        return_attention: bool = False,
        return_keys: bool = False,
    ) -> Encoded:
        layers: list[Tensor] = []
        attention: list[Tensor] = []
        keys: list[Tensor] = []
        masked = self.encoder_mask(masking)
        for layer in cast("Iterable[EncoderLayerProtocol]", self.encoder):
            if return_attention:
                attention.append(layer.attention(z_BTD, **masked))
            if return_keys:
                keys.append(layer.keys(z_BTD))
            z_BTD = self.run_layer(layer, z_BTD, **masked)
            if return_layers:
                layers.append(z_BTD)
        return Encoded(
            self.encoder_norm(z_BTD),
            masking,
            layers if return_layers else None,
            attention if return_attention else None,
            keys if return_keys else None,
        )

    def restore_removed(self, tokens: Tensor, masking: Masking | None) -> Tensor:
        """Put mask tokens in place of the removed patches and add positions to all patches, (B, 1 + N, D).

        If the mask has `decoded` patches, these only, in their order.
        """
        assert self.decoder_positions is not None
        cls_B1D, y_BND = tokens[:, :1], tokens[:, 1:]
        positions = self.decoder_positions
        if masking is not None:
            kept = masking.rank if masking.decoded is None else masking.decoded
            num_removed = kept.shape[1] - y_BND.shape[1]
            y_BND = torch.cat([y_BND, self.mask_token.expand(y_BND.shape[0], num_removed, -1)], dim=1)  # by rank
            if masking.decoded is None:
                y_BND = take_tokens(y_BND, masking.rank)
            else:
                positions = take_tokens(positions.expand(y_BND.shape[0], -1, -1), masking.decoded)
        return torch.cat([cls_B1D, y_BND + positions], dim=1)

    def _target(self, patches_BNX: Tensor) -> Tensor:
        if not self.norm_pix_loss:
            return patches_BNX
        mean_BN1, std_BN1 = patch_statistics(patches_BNX)
        return (patches_BNX - mean_BN1) / std_BN1

    def _check_decoder(self) -> None:
        if not self.has_decoder:
            raise UserError(
                "this model is an encoder without a decoder, so it predicts no patches; probe it, fine-tune it or use "
                "its embeddings"
            )

    def _check_images(self, images: Tensor) -> None:
        expected: tuple[Any, ...] = (self.channels, *self.image_hw)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UserError(
                f"images have shape {tuple(images.shape)}, but the model takes batches of "
                f"(channels, height, width) = {expected}; set image_size and channels in the model's config, or resize "
                "the images"
            )


def initialize_weights(model: nn.Module) -> None:
    """Draw all weights of a model from torch's global generator, as the published code does.

    Linear maps are Xavier-uniform with zero biases. The patch embedding's kernel is Xavier-uniform as the linear map of
    a flattened patch; its bias is PyTorch's default. CLS token, mask token and learned positions are normal with
    standard deviation 0.02. Every other module with a `reset_parameters` method draws its own: LayerNorm 1 and 0, and
    the layers of CRATE.
    """
    if next(model.parameters()).is_meta:
        return  # there is nothing to draw, and torch would import its compiler for it
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()
            nn.init.xavier_uniform_(module.weight.flatten(1))
        elif hasattr(module, "reset_parameters"):
            cast("Any", module).reset_parameters()
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "mask_token", "positions"):
            nn.init.normal_(parameter, std=0.02)
