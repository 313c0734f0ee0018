"""A trained model as servers use it: images as clients send them, and outputs by name.

MLflow's pyfunc model and `crate-ray serve` share it. It needs no storage, no MLflow and no Ray.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor, nn

from crate_ray.config import Settings
from crate_ray.errors import UserError, invalid_value
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.autoencoder import EncoderLayerProtocol
from crate_ray.models.classifier import Classifier, class_probabilities
from crate_ray.models.exported import ModelDescription, Normalizer, load_any
from crate_ray.serving import load_all, load_received

Output = Literal["mean", "cls", "patch", "attention", "reconstruction", "probabilities"]

_FEATURES: tuple[Output, ...] = ("mean", "cls", "patch", "attention")


class InferenceParams(Settings):
    """What a client asks of a model: MLflow's inference params."""

    output: Output
    """Name of the output; see `ServedModel.__call__`."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the patches that 'reconstruction' hides."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Chooses the hidden patches: the same for all images with the same seed."""


class ServedModel:
    """A masked autoencoder or a classifier with its preprocessing and its outputs.

    Args:
        model: the model.
        description: how its input is normalised.
        device: where to compute.
    """

    def __init__(
        self,
        model: MaskedAutoencoder | Classifier,
        description: ModelDescription,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.description = model.to(device).eval(), description
        self.outputs = outputs_of(description, has_decoder=getattr(model, "has_decoder", True))
        """What the model gives; the default comes first."""
        self._device = torch.device(device)
        self._normalizer = Normalizer.of(description.mean, description.std, device)
        self._autoencoder: MaskedAutoencoder = model.autoencoder if isinstance(model, Classifier) else model
        self._norm: nn.Module = nn.Identity() if isinstance(model, Classifier) else model.encoder_norm

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device | str = "cpu") -> ServedModel:
        """Load an exported model from a local folder."""
        return cls(*load_any(folder), device)

    def params(self, given: Mapping[str, Any] | None = None) -> InferenceParams:
        """Check params of a client. What is missing or None has its default.

        Raises:
            UserError: there is no such parameter, a value is wrong, or the model lacks the output.
        """
        values = {"output": self.outputs[0], "mask_ratio": self.description.model.mask_ratio}
        values |= {name: value for name, value in (given or {}).items() if value is not None}
        if unknown := sorted(values.keys() - InferenceParams.model_fields.keys()):
            raise UserError(
                f"there is no parameter {unknown[0]!r}; the parameters are {', '.join(InferenceParams.model_fields)}"
            )
        if values["output"] not in self.outputs:
            lacks = ""
            if values["output"] == "reconstruction":
                lacks = "this model has no decoder, so it reconstructs nothing; "
            elif values["output"] == "probabilities":
                lacks = "this model is an encoder without classes; "
            raise UserError(f"{lacks}output {values['output']!r} is not one of {', '.join(self.outputs)}")
        try:
            params = InferenceParams.model_validate(values)
        except ValidationError as error:
            raise UserError(f"the parameter {invalid_value(error)}") from None
        if self._visible(params.mask_ratio) < 1:
            raise UserError(
                f"mask_ratio {params.mask_ratio} leaves none of the {self._autoencoder.num_patches} patches visible; "
                "lower it"
            )
        return params

    def load(self, items: Sequence[bytes | NDArray[Any]]) -> Tensor:
        """Decode images for the model; see `load_all`."""
        return load_all(items, self.description)

    def receive(self, values: Sequence[Any], first: int = 1, total: int | None = None) -> Tensor:
        """Decode images as clients send them; see `received_image`.

        Args:
            values: the images.
            first: number of the first of them, for messages.
            total: how many the client sent; by default those given.

        Raises:
            UserError: one of them cannot be used.
        """
        images, errors = load_received(values, self.description)
        for number, error in enumerate(errors, first):
            if error is not None:
                raise UserError(
                    f"image {number} of {len(values) if total is None else total} cannot be used: {error}; send "
                    "encoded images in base64, or arrays of pixels"
                )
        return images

    def blank(self) -> Tensor:
        """A batch of one black image, or of a grid of zeros."""
        config = self.description.model
        dtype = torch.float32 if self.description.kind == "grid" else torch.uint8
        return torch.zeros(1, config.channels, *config.image_hw, dtype=dtype)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, params: InferenceParams | None = None) -> Tensor:
        """Compute an output of loaded images (uint8, or float32 grids) of the model's size.

        Returns:
            float32 on the CPU, by params.output:
            mean: mean of the patch tokens, (B, D), after the encoder's last norm (a classifier has no such norm).
            cls: CLS token, (B, D).
            patch: patch tokens, (B, N, D), row by row.
            attention: attention of the CLS token to the patches in the last layer, by head, (B, K, rows, columns).
            reconstruction: the images with the hidden patches as the model predicts them, in the form of pixels as
                clients send them: (B, H, W, C) from 0 to 255, or (B, C, H, W) for grids.
            probabilities: of a classifier's classes, (B, classes).
        """
        params = params or self.params()
        images = self._normalizer(images_BCHW.to(self._device))
        if params.output == "probabilities":
            assert isinstance(self.model, Classifier)
            return class_probabilities(self.model, images).cpu()
        if params.output == "reconstruction":
            return self._reconstruction(images, params).float().cpu()
        if params.output == "attention":
            return self._attention(images).float().cpu()
        z_BTD = self._tokens(images)
        if params.output == "patch":
            return z_BTD[:, 1:].float().cpu()
        return (z_BTD[:, 0] if params.output == "cls" else z_BTD[:, 1:].mean(1)).float().cpu()

    def _tokens(self, images: Tensor) -> Tensor:
        z_BTD, _ = self._autoencoder.embed(images)
        for layer in self._autoencoder.encoder:
            z_BTD = self._autoencoder.run_layer(layer, z_BTD)
        tokens: Tensor = self._norm(z_BTD)
        return tokens

    def _attention(self, images: Tensor) -> Tensor:
        z_BTD, _ = self._autoencoder.embed(images)
        *before, last = self._autoencoder.encoder
        for layer in before:
            z_BTD = self._autoencoder.run_layer(layer, z_BTD)
        maps = cast("EncoderLayerProtocol", last).attention(z_BTD)[:, :, 0, 1:]
        return maps.unflatten(-1, self._autoencoder.grid_hw)

    def _reconstruction(self, images: Tensor, params: InferenceParams) -> Tensor:
        # A shallow copy has the same weights, so another request may use the model with another ratio meanwhile.
        model = copy.copy(self._autoencoder)
        model.num_visible = self._visible(params.mask_ratio)
        noise_N = torch.rand(model.num_patches, generator=torch.Generator().manual_seed(params.seed))
        output = model(images, noise_N.to(self._device).expand(len(images), -1))
        predicted_BNX = model.patchify(model.reconstruct(output.prediction.float(), images))
        completed_BNX = torch.where(output.mask.bool().unsqueeze(-1), predicted_BNX, model.patchify(images))
        completed = self._normalizer.undo(model.unpatchify(completed_BNX))
        if self.description.kind == "image":
            return (255 * completed).clamp(0, 255).permute(0, 2, 3, 1)
        return completed

    def _visible(self, mask_ratio: float) -> int:
        """Number of visible patches, as `num_visible` of a model's config."""
        return int(self._autoencoder.num_patches * (1 - mask_ratio))


def outputs_of(description: ModelDescription, has_decoder: bool = True) -> tuple[Output, ...]:
    """The outputs that a model gives; the default comes first."""
    if description.classifier is not None:
        return "probabilities", *_FEATURES
    return (*_FEATURES, "reconstruction") if has_decoder else _FEATURES
