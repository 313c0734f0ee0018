"""A classifier on the encoder of a masked autoencoder: pooled tokens, LayerNorm, and a linear map to classes.

Shapes: B batch, T tokens, D token dimension, C classes, P residual branches of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_ray.config import ClassifierConfig, CrateMAEConfig, ViTMAEConfig
from crate_ray.models.autoencoder import MaskedAutoencoder
from crate_ray.models.crate import CrateMAE
from crate_ray.models.preprocess import Preprocess
from crate_ray.models.vit import ViTMAE


@dataclass(frozen=True)
class Targets:
    """Targets of a batch, and its samples' drop-path factors. A slice of it slices the tensors."""

    classes: Tensor
    """Target probability of each class, (B, C); one-hot for a single label."""
    scales: Tensor | None = None
    """Factor of each residual branch, (B, P): 0 for a skipped branch. None if no branch is skipped."""

    def __getitem__(self, part: slice) -> Targets:
        return Targets(self.classes[part], None if self.scales is None else self.scales[part])


class ClassifierOutput(NamedTuple):
    """Result of a classifier's forward pass."""

    scores: Tensor
    """Logits of the classes, (B, C) float32."""
    sample_loss: Tensor | None
    """Cross entropy of each sample, (B,); None without targets."""


class Classifier(nn.Module):
    """The encoder of CRATE-MAE or ViT-MAE with a head on the last layer's CLS token or mean patch token.

    As in the published fine-tuning, the encoder's last norm is left out, and the head has its own. All weights are
    fresh, from torch's global generator; `load_encoder` loads those of a pretrained model.
    """

    preprocess: Preprocess
    """Turns pictures into the input. `crate_ray.load_model` sets it; a model that is built has none."""

    def __init__(self, encoder: CrateMAEConfig | ViTMAEConfig, config: ClassifierConfig) -> None:
        super().__init__()
        autoencoder = CrateMAE(encoder) if isinstance(encoder, CrateMAEConfig) else ViTMAE(encoder)
        autoencoder.drop_decoder()
        del autoencoder.encoder_norm
        self.autoencoder: MaskedAutoencoder = autoencoder
        """The model without its decoder; only `embed` and `run_layer` work."""
        self.encoder_config, self.config = encoder, config
        self.norm = nn.LayerNorm(encoder.dim, eps=1e-6)
        self.head = nn.Linear(encoder.dim, config.num_classes)
        # Small, so that the first steps change the head more than the encoder; from MAE.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    @property
    def encoder(self) -> nn.ModuleList:
        """The encoder's layers."""
        return self.autoencoder.encoder

    @property
    def decoder(self) -> nn.ModuleList:
        """Empty: a classifier has no decoder."""
        return nn.ModuleList()

    @property
    def branches(self) -> list[int]:
        """Number of residual branches of each layer."""
        return [cast("Any", layer).num_branches for layer in self.encoder]

    def load_encoder(self, pretrained: MaskedAutoencoder) -> None:
        """Load the encoder's weights of a pretrained model with the same config."""
        weights = pretrained.state_dict()
        self.autoencoder.load_state_dict({name: weights[name] for name in self.autoencoder.state_dict()})

    def forward(self, images: Tensor, targets: Targets | Tensor | None = None) -> ClassifierOutput:
        """Classify normalised images (B, channels, H, W). With targets, also compute the loss.

        A tensor of target probabilities (B, C) stands for targets without drop path. Raises UserError for images of
        another size.
        """
        targets = Targets(targets) if isinstance(targets, Tensor) else targets
        scales = None if targets is None or targets.scales is None else targets.scales.split(self.branches, 1)
        z_BTD, _ = self.autoencoder.embed(images)
        for index, layer in enumerate(self.encoder):
            z_BTD = self.autoencoder.run_layer(layer, z_BTD, *(() if scales is None else (scales[index],)))
        pooled_BD = z_BTD[:, 0] if self.config.pooling == "cls" else z_BTD[:, 1:].mean(1)
        scores_BC = self.head(self.norm(pooled_BD)).float()
        loss_B = None if targets is None else F.cross_entropy(scores_BC, targets.classes, reduction="none")
        return ClassifierOutput(scores_BC, loss_B)


def encoder_of(model: MaskedAutoencoder | Classifier) -> MaskedAutoencoder:
    """The encoder of a model, for features. A classifier's tokens are those of its last layer, without a norm."""
    if isinstance(model, MaskedAutoencoder):
        return model
    setattr(model.autoencoder, "encoder_norm", nn.Identity())  # noqa: B010 - of another type than a trained norm
    return model.autoencoder


@torch.no_grad()
def class_probabilities(model: Classifier, images: Tensor) -> Tensor:
    """Class probabilities (B, C) float32 of normalised images (B, channels, H, W)."""
    return model(images).scores.softmax(1)
