"""Masked completion: everything that CRATE-MAE and ViT-MAE share.

Patches, positions, random masks and the loss as functions, and the autoencoder around a model's layers.
Shapes: B batch, N patches, V visible patches, T = 1 + N or 1 + V tokens (CLS first), D token dimension, X = patch
height · patch width · channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crate_ray.config import ImageModelConfig
from crate_ray.errors import UserError


class Masking(NamedTuple):
    """Which patches a batch keeps."""

    removed: Tensor
    """(B, N) bool, True where a patch is hidden."""
    visible: Tensor
    """Indices of the visible patches by rising noise, (B, V)."""
    rank: Tensor
    """Place of every patch in the order of rising noise, (B, N); the visible ones have 0 … V − 1."""


class Encoded(NamedTuple):
    """What `encode` returns; lists hold one entry per encoder layer and are None unless asked for."""

    tokens: Tensor
    """Tokens after the encoder's last norm, (B, T, D)."""
    masking: Masking | None
    """The mask, None for unmasked images."""
    layers: list[Tensor] | None
    """Output of each layer, (B, T, D)."""
    attention: list[Tensor] | None
    """Attention maps of each layer, (B, K, T, T)."""
    keys: list[Tensor] | None
    """Keys of each layer, all heads side by side, (B, T, K·P); for CRATE the subspace coordinates Uᵀ LN(z)."""


class Decoded(NamedTuple):
    """What `decode` returns."""

    prediction: Tensor
    """Predicted pixels of every patch, (B, N, X)."""
    layers: list[Tensor] | None
    """Output of each decoder layer, (B, 1 + N, decoder's D); None unless asked for."""


class MaskedOutput(NamedTuple):
    """What the forward pass of a masked autoencoder returns."""

    loss: Tensor
    """Mean of `sample_loss`, a scalar."""
    prediction: Tensor
    """Predicted pixels of every patch, (B, N, X)."""
    mask: Tensor
    """(B, N) float, 1 = removed."""
    sample_loss: Tensor
    """Mean squared error over each sample's removed patches, (B,)."""
    encoder_layers: list[Tensor] | None = None
    """Output of each encoder layer, (B, T, D); None unless asked for."""
    decoder_layers: list[Tensor] | None = None
    """Output of each decoder layer, (B, 1 + N, decoder's D); None unless asked for."""


def sincos_positions(dim: int, grid_hw: tuple[int, int]) -> Tensor:
    """MAE's fixed 2-D sine-cosine positions of a grid of patches, float32 (1, N, dim); `dim` is divisible by 4.

    The first half of the features encodes the column, the second the row, each by sines, then cosines, at dim / 4
    frequencies from 1 towards 1 / 10000. Computed in float32, as published, so the last bits depend on NumPy's code
    for the processor (up to 1e-6 on a grid of 14 × 14). The CLS token's position is zero and not part of the table.
    """
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float32) / np.float32(dim / 4))
    rows, columns = np.indices(grid_hw, dtype=np.float32).reshape(2, -1, 1)
    angles = columns * frequencies, rows * frequencies
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32)).unsqueeze(0)


def random_masking(noise_BN: Tensor, num_visible: int) -> Masking:
    """Keep the `num_visible` patches with the smallest noise; of equal ones the first."""
    order_BN = torch.argsort(noise_BN, dim=1, stable=True)
    rank_BN = torch.argsort(order_BN, dim=1)
    return Masking(rank_BN >= num_visible, order_BN[:, :num_visible], rank_BN)


def take_tokens(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Tokens (B, M, D) at each sample's own indices."""
    return x_BND.gather(1, index_BM.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def patchify(images_BCHW: Tensor, patch_hw: tuple[int, int]) -> Tensor:
    """Cut images into patches (B, N, X), row by row; pixels in MAE's order (patch height, patch width, channel)."""
    patch_h, patch_w = patch_hw
    batch, channels, height, width = images_BCHW.shape
    grid = images_BCHW.reshape(batch, channels, height // patch_h, patch_h, width // patch_w, patch_w)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches_BNX: Tensor, grid_hw: tuple[int, int], patch_hw: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: patches (B, N, X) to images (B, C, H, W)."""
    grid = patches_BNX.unflatten(2, (*patch_hw, -1)).unflatten(1, grid_hw)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches_BNX: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, variance + 1e-6) of each patch's pixels, (B, N, 1), as MAE normalises."""
    return patches_BNX.mean(-1, keepdim=True), (patches_BNX.var(-1, keepdim=True) + 1e-6).sqrt()


def sample_losses(prediction_BNX: Tensor, target_BNX: Tensor, removed_BN: Tensor, num_removed: int) -> Tensor:
    """Mean squared error over each sample's removed patches, (B,); over all patches where none is removed."""
    patch_loss_BN = (prediction_BNX - target_BNX).square().mean(-1)
    return (patch_loss_BN * removed_BN).sum(1) / num_removed if num_removed else patch_loss_BN.mean(1)


class _EncoderLayer(Protocol):
    def __call__(self, z_BTD: Tensor) -> Tensor: ...
    def attention(self, z_BTD: Tensor) -> Tensor: ...
    def keys(self, z_BTD: Tensor) -> Tensor: ...


class MaskedAutoencoder(nn.Module):
    """Patch embedding, CLS token, positions, encoder, decoder, prediction of pixels and the masked loss.

    A model gives its layers; weights are left for `layers.initialize_weights`, which the model calls last.

    Parameters
    ----------
    config
        Patch grid and objective.
    encoder, decoder
        The layers. Encoder layers also have `attention` and `keys`, for tokens (B, T, D).
    dim, decoder_dim
        Token dimensions.
    encoder_tokens
        'all': the encoder sees mask tokens in the place of hidden patches. 'visible': it sees CLS and the visible
        patches, and mask tokens enter before the decoder, where positions are added to all patches once more (MAE).
    decoder_embed
        Map from encoder to decoder tokens; by default none.
    norm_eps
        ε of the two outer norms.

    Raises
    ------
    UserError
        If patches of one number are to be normalised.
    """

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
    ) -> None:
        super().__init__()
        patch_h, patch_w = config.patch_hw
        patch_numbers = patch_h * patch_w * config.channels
        if config.norm_pix_loss and patch_numbers == 1:
            raise UserError("norm_pix_loss needs patches of more than one number; use larger patches or switch it off")
        # Plain attributes, so that a compiled forward does not look into pydantic.
        self.channels = config.channels
        self.image_hw = config.image_hw
        self.patch_hw = config.patch_hw
        self.grid_hw = config.grid_hw
        self.num_patches = config.num_patches
        self.num_visible = config.num_visible
        self.norm_pix_loss = config.norm_pix_loss
        self.visible_only = encoder_tokens == "visible"
        self.checkpoint_layers = False
        """Keep only each layer's input for the backward pass, which computes the rest anew: less memory, more time."""

        self.patch_embed = nn.Conv2d(config.channels, dim, kernel_size=config.patch_hw, stride=config.patch_hw)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.encoder = nn.ModuleList(encoder)
        self.encoder_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.decoder_embed = nn.Identity() if decoder_embed is None else decoder_embed
        self.decoder = nn.ModuleList(decoder)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=norm_eps)
        self.prediction = nn.Linear(decoder_dim, patch_numbers)

        self.positions_1ND: Tensor
        self.decoder_positions_1ND: Tensor | None
        self.register_buffer("positions_1ND", sincos_positions(dim, config.grid_hw), persistent=False)
        decoder_positions = sincos_positions(decoder_dim, config.grid_hw) if self.visible_only else None
        self.register_buffer("decoder_positions_1ND", decoder_positions, persistent=False)

    def embed(self, images_BCHW: Tensor, noise_BN: Tensor | None = None) -> tuple[Tensor, Masking | None]:
        """Tokens (B, T, D) that the first encoder layer gets, of whole images or, with noise, of masked ones; the mask.

        Parameters and errors are those of `encode`.
        """
        self._check_images(images_BCHW)
        return self._embed(self.patchify(images_BCHW), noise_BN)

    def _embed(self, patches_BNX: Tensor, noise_BN: Tensor | None) -> tuple[Tensor, Masking | None]:
        # The convolution as the product that it is: its backward pass and, in bf16 on the CPU, the whole of it is
        # faster, and the patches are cut anyway for the loss. Kernel and patches in the order (height, width, channel).
        kernel_DX = self.patch_embed.weight.permute(0, 2, 3, 1).flatten(1)
        x_BND = F.linear(patches_BNX, kernel_DX, self.patch_embed.bias)
        masking = None if noise_BN is None else random_masking(noise_BN, self.num_visible)
        if masking is not None and not self.visible_only:
            x_BND = torch.where(masking.removed.unsqueeze(-1), self.mask_token, x_BND)
        x_BND = x_BND + self.positions_1ND
        if masking is not None and self.visible_only:
            x_BND = take_tokens(x_BND, masking.visible)
        return torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1), masking

    def encode(
        self,
        images_BCHW: Tensor,
        noise_BN: Tensor | None = None,
        *,
        return_layers: bool = False,
        return_attention: bool = False,
        return_keys: bool = False,
    ) -> Encoded:
        """Tokens of images: of whole ones, or, where noise is given, of masked ones.

        Parameters
        ----------
        images_BCHW
            Images (B, C, H, W) of the configured size, on the scale the model was trained on.
        noise_BN
            One number per patch; the patches with the smallest stay visible. None for no mask.
        return_layers, return_attention, return_keys
            Also return what is named, per layer. Attention maps and keys are computed beside the layers' own.

        Raises
        ------
        UserError
            If the images have another size or number of channels.
        """
        z_BTD, masking = self.embed(images_BCHW, noise_BN)
        return self._encode(z_BTD, masking, return_layers, return_attention, return_keys)

    def _encode(
        self,
        z_BTD: Tensor,
        masking: Masking | None,
        return_layers: bool,
        return_attention: bool = False,
        return_keys: bool = False,
    ) -> Encoded:
        layers: list[Tensor] = []
        attention: list[Tensor] = []
        keys: list[Tensor] = []
        for layer in cast("Iterable[_EncoderLayer]", self.encoder):
            if return_attention:
                attention.append(layer.attention(z_BTD))
            if return_keys:
                keys.append(layer.keys(z_BTD))
            z_BTD = self.run_layer(layer, z_BTD)
            if return_layers:
                layers.append(z_BTD)
        return Encoded(
            self.encoder_norm(z_BTD),
            masking,
            layers if return_layers else None,
            attention if return_attention else None,
            keys if return_keys else None,
        )

    def decode(self, tokens_BTD: Tensor, masking: Masking | None = None, *, return_layers: bool = False) -> Decoded:
        """Predicted pixels from the encoder's tokens.

        Parameters
        ----------
        tokens_BTD
            `Encoded.tokens`, or others in their place.
        masking
            `Encoded.masking`: needed where the encoder saw only the visible patches.
        return_layers
            Also return the output of each decoder layer.
        """
        y_BTD = self.decoder_embed(tokens_BTD)
        if self.decoder_positions_1ND is not None:
            cls_B1D, y_BND = y_BTD[:, :1], y_BTD[:, 1:]
            if masking is not None:
                removed = masking.rank.shape[1] - y_BND.shape[1]
                by_rank_BND = torch.cat([y_BND, self.mask_token.expand(y_BND.shape[0], removed, -1)], dim=1)
                y_BND = take_tokens(by_rank_BND, masking.rank)
            y_BTD = torch.cat([cls_B1D, y_BND + self.decoder_positions_1ND], dim=1)
        layers: list[Tensor] = []
        for index in range(len(self.decoder)):
            y_BTD = self.decoder_layer(index, y_BTD)
            if return_layers:
                layers.append(y_BTD)
        prediction_BNX = self.prediction(self.decoder_norm(y_BTD)[:, 1:])
        return Decoded(prediction_BNX, layers if return_layers else None)

    def decoder_layer(self, index: int, y_BTD: Tensor) -> Tensor:
        """Tokens after decoder layer `index`; a model whose decoder uses the encoder's weights passes them here."""
        return self.run_layer(self.decoder[index], y_BTD)

    def run_layer(self, layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Output of a layer, by way of which all layers run; see `checkpoint_layers`."""
        if self.checkpoint_layers and torch.is_grad_enabled():
            # Nothing in a layer is random.
            return cast("Tensor", checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False))
        return layer(*inputs)

    def forward(
        self, images_BCHW: Tensor, noise_BN: Tensor | None = None, *, return_layers: bool = False
    ) -> MaskedOutput:
        """Mask images, predict their pixels, and compare over the removed patches.

        With `mask_ratio` 0 no patch is removed, and the loss is the mean over all patches.

        Parameters
        ----------
        images_BCHW
            Images (B, C, H, W) of the configured size.
        noise_BN
            One number per patch; the patches with the smallest stay visible. By default uniform, from torch's global
            generator of the images' device.
        return_layers
            Also return the output of each encoder and decoder layer.

        Raises
        ------
        UserError
            If the images have another size or number of channels.
        """
        if noise_BN is None:
            noise_BN = torch.rand(images_BCHW.shape[0], self.num_patches, device=images_BCHW.device)
        self._check_images(images_BCHW)
        patches_BNX = self.patchify(images_BCHW)
        encoded = self._encode(*self._embed(patches_BNX, noise_BN), return_layers)
        assert encoded.masking is not None
        decoded = self.decode(encoded.tokens, encoded.masking, return_layers=return_layers)
        removed_BN = encoded.masking.removed
        loss_B = sample_losses(
            decoded.prediction, self._target(patches_BNX), removed_BN, self.num_patches - self.num_visible
        )
        return MaskedOutput(
            loss_B.mean(), decoded.prediction, removed_BN.to(loss_B.dtype), loss_B, encoded.layers, decoded.layers
        )

    def target(self, images_BCHW: Tensor) -> Tensor:
        """What the model is to predict, (B, N, X): pixels, normalised per patch with `norm_pix_loss`."""
        return self._target(self.patchify(images_BCHW))

    def _target(self, patches_BNX: Tensor) -> Tensor:
        if not self.norm_pix_loss:
            return patches_BNX
        mean_BN1, std_BN1 = patch_statistics(patches_BNX)
        return (patches_BNX - mean_BN1) / std_BN1

    def patchify(self, images_BCHW: Tensor) -> Tensor:
        """Patches (B, N, X) of images (B, C, H, W); pixels in the order (patch height, patch width, channel)."""
        return patchify(images_BCHW, self.patch_hw)

    def unpatchify(self, patches_BNX: Tensor) -> Tensor:
        """Images (B, C, H, W) of patches (B, N, X)."""
        return unpatchify(patches_BNX, self.grid_hw, self.patch_hw)

    def reconstruct(self, prediction_BNX: Tensor, images_BCHW: Tensor) -> Tensor:
        """The prediction as pictures (B, C, H, W), on the scale of the images.

        With `norm_pix_loss` each patch gets the mean and variance of the true one, which the model does not predict.
        """
        if self.norm_pix_loss:
            mean_BN1, std_BN1 = patch_statistics(self.patchify(images_BCHW))
            prediction_BNX = prediction_BNX * std_BN1 + mean_BN1
        return self.unpatchify(prediction_BNX)

    def _check_images(self, images_BCHW: Tensor) -> None:
        expected: tuple[Any, ...] = (self.channels, *self.image_hw)
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
            raise UserError(
                f"images have shape {tuple(images_BCHW.shape)}, but the model takes batches of "
                f"(channels, height, width) = {expected}; set image_size and channels in the model's config, or resize "
                "the images"
            )
