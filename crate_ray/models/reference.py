"""CRATE-MAE as the paper writes it: slow and simple, the reference for the tests and for the training benchmark.

Every line follows an equation, numbered as in docs/equations.md. Only the published form is implemented, without the
settings of the ablations. `ReferenceCrateMAE` and `crate.CrateMAE` have the same parameters: the state_dict of one
loads into the other. This module uses nothing from `kernels`.

Shapes: B batch, N patches, T = 1 + N tokens (CLS first), D token dimension (d), K subspaces, P dimension of each (p),
X numbers of one patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_ray.config import CrateMAEConfig
from crate_ray.errors import UserError
from crate_ray.models.autoencoder import MaskedOutput, initialize_weights
from crate_ray.models.patches import sincos_positions


def ssa(coordinates: Tensor) -> Tensor:
    """SSA(Z | U_k) = (U_kᵀZ) softmax((U_kᵀZ)ᵀ(U_kᵀZ) / √p)    (4)

    Maps coordinates U_kᵀZ (…, T, P) to (…, T, P).
    """
    scores = coordinates @ coordinates.transpose(-1, -2) / math.sqrt(coordinates.shape[-1])
    return scores.softmax(dim=-1) @ coordinates


def ista(z: Tensor, dictionary: Tensor, step_size: float, sparsity_lambda: float) -> Tensor:
    """ISTA(Z) = ReLU(Z + η (DᵀZ − DᵀD Z) − η λ)    (6)

    Maps tokens (…, D) to codes (…, D), with three products as in the published code.
    """
    reconstruction = F.linear(z, dictionary)
    gradient = F.linear(z, dictionary.t()) - F.linear(reconstruction, dictionary.t())
    return F.relu(z + step_size * gradient - step_size * sparsity_lambda)


class ReferenceMSSA(nn.Module):
    """MSSA(Z) = W [SSA(Z | U_1); …; SSA(Z | U_K)]    (5)"""

    def __init__(self, dim: int, num_subspaces: int, subspace_dim: int) -> None:
        super().__init__()
        self.num_subspaces, self.subspace_dim = num_subspaces, subspace_dim
        self.subspaces = nn.Parameter(torch.empty(num_subspaces * subspace_dim, dim))
        self.output = nn.Linear(num_subspaces * subspace_dim, dim)

    def reset_parameters(self) -> None:
        """Draw the codebook Xavier-uniform."""
        nn.init.xavier_uniform_(self.subspaces)

    def forward(self, z: Tensor) -> Tensor:
        """Update of every token, (B, T, D)."""
        batch, tokens, _ = z.shape
        w_BTC = F.linear(z, self.subspaces)
        w_BKTP = w_BTC.reshape(batch, tokens, self.num_subspaces, self.subspace_dim).permute(0, 2, 1, 3)
        return self.output(ssa(w_BKTP).permute(0, 2, 1, 3).reshape(batch, tokens, -1))


class ReferenceISTA(nn.Module):
    """`ista` with its dictionary D.    (6)"""

    def __init__(self, dim: int, step_size: float, sparsity_lambda: float) -> None:
        super().__init__()
        self.step_size, self.sparsity_lambda = step_size, sparsity_lambda
        self.dictionary = nn.Parameter(torch.empty(dim, dim))

    def reset_parameters(self) -> None:
        """Draw D Kaiming-uniform."""
        nn.init.kaiming_uniform_(self.dictionary)

    def forward(self, z: Tensor) -> Tensor:
        """Codes (B, T, D)."""
        return ista(z, self.dictionary, self.step_size, self.sparsity_lambda)


class ReferenceEncoderLayer(nn.Module):
    """Z½ = Z + MSSA(LN(Z));  Z' = ISTA(LN(Z½))    (7)"""

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        assert config.subspace_dim is not None
        self.mssa_norm = nn.LayerNorm(config.dim)
        self.mssa = ReferenceMSSA(config.dim, config.num_subspaces, config.subspace_dim)
        self.ista_norm = nn.LayerNorm(config.dim)
        self.ista = ReferenceISTA(config.dim, config.step_size, config.sparsity_lambda)

    def forward(self, z: Tensor) -> Tensor:
        """Tokens (B, T, D) after this layer."""
        z_half_BTD = z + self.mssa(self.mssa_norm(z))
        return self.ista(self.ista_norm(z_half_BTD))


class ReferenceDecoderLayer(nn.Module):
    """Y½ = E LN(Y);  Y' = Y½ − MSSA(LN(Y½))    (8)"""

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        assert config.subspace_dim is not None
        self.expansion_norm = nn.LayerNorm(config.dim)
        self.expansion = nn.Parameter(torch.empty(config.dim, config.dim))
        self.mssa_norm = nn.LayerNorm(config.dim)
        self.mssa = ReferenceMSSA(config.dim, config.num_subspaces, config.subspace_dim)

    def reset_parameters(self) -> None:
        """Draw E Kaiming-uniform."""
        nn.init.kaiming_uniform_(self.expansion)

    def forward(self, y: Tensor) -> Tensor:
        """Tokens (B, T, D) after this layer."""
        y_half_BTD = F.linear(self.expansion_norm(y), self.expansion)
        return y_half_BTD - self.mssa(self.mssa_norm(y_half_BTD))


class ReferenceCrateMAE(nn.Module):
    """CRATE-MAE with the interface, parameter names and initial weights of `crate.CrateMAE`.

    Raises
    ------
    UserError
        If the config has switches other than the published form's.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        if config.unpublished:
            raise UserError(
                f"the reference model has the published form only; leave {', '.join(config.unpublished)} at the default"
            )
        assert config.decoder_depth is not None
        self.config = config
        patch_numbers = math.prod(config.patch_hw) * config.channels
        self.patch_embed = nn.Conv2d(config.channels, config.dim, config.patch_hw, config.patch_hw)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.encoder = nn.ModuleList(ReferenceEncoderLayer(config) for _ in range(config.depth))
        self.encoder_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.decoder = nn.ModuleList(ReferenceDecoderLayer(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.prediction = nn.Linear(config.dim, patch_numbers)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(config.dim, config.grid_hw), persistent=False)
        initialize_weights(self)

    def forward(self, images: Tensor, noise: Tensor, *, return_layers: bool = False) -> MaskedOutput:
        """Mask images (B, C, H, W) by noise (B, N), predict their patches, and compare over the removed ones."""
        mask_BN = self.mask(noise).to(images.dtype)
        z_BTD = self.embed(images, mask_BN)
        encoder_layers, decoder_layers = [], []
        for layer in self.encoder:
            z_BTD = layer(z_BTD)
            encoder_layers.append(z_BTD)
        y_BTD = self.encoder_norm(z_BTD)
        for layer in self.decoder:
            y_BTD = layer(y_BTD)
            decoder_layers.append(y_BTD)
        prediction_BNX = self.prediction(self.decoder_norm(y_BTD)[:, 1:])
        sample_loss_B = self.loss(prediction_BNX, self.target(images), mask_BN)
        layers = (encoder_layers, decoder_layers) if return_layers else (None, None)
        return MaskedOutput(sample_loss_B.mean(), prediction_BNX, mask_BN, sample_loss_B, *layers)

    def mask(self, noise: Tensor) -> Tensor:
        """Ω = all patches but the V with the smallest noise, V = ⌊N (1 − mask ratio)⌋; (B, N) bool.    (9)"""
        rank_BN = noise.argsort(dim=1, stable=True).argsort(dim=1)
        return rank_BN >= self.config.num_visible

    def embed(self, images: Tensor, mask: Tensor) -> Tensor:
        """Z¹ = [CLS, t_1 + pos_1, …, t_N + pos_N]; t_n = P x_n + b for n ∉ Ω, the mask token for n ∈ Ω.    (10)"""
        mask_BN1 = mask.unsqueeze(-1)
        t_BND = self.patch_embed(images).flatten(2).transpose(1, 2)
        t_BND = t_BND * (1 - mask_BN1) + self.mask_token * mask_BN1
        return torch.cat([self.cls_token.expand(len(images), -1, -1), t_BND + self.positions], dim=1)

    def target(self, images: Tensor) -> Tensor:
        """Patches (B, N, X) in the order patch height, patch width, channel; normalised with `norm_pix_loss`."""
        batch, channels = images.shape[:2]
        (rows, columns), (height, width) = self.config.grid_hw, self.config.patch_hw
        target = images.reshape(batch, channels, rows, height, columns, width)
        target_BNX = target.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
        if self.config.norm_pix_loss:
            mean_BN1, variance_BN1 = target_BNX.mean(-1, keepdim=True), target_BNX.var(-1, keepdim=True)
            target_BNX = (target_BNX - mean_BN1) / (variance_BN1 + 1e-6).sqrt()
        return target_BNX

    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """loss = 1 / |Ω| · Σ_{n ∈ Ω} ‖x̂_n − x_n‖² / X of each image, (B,); over all patches if Ω is empty.    (11)"""
        loss_BN = ((prediction - target) ** 2).mean(dim=-1)
        if self.config.num_visible == self.config.num_patches:
            return loss_BN.mean(dim=1)
        return (loss_BN * mask).sum(dim=1) / mask.sum(dim=1)
