"""A trained model for images of another size than those it was trained on."""

from __future__ import annotations

from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from crate_ray.errors import UserError, invalid_value
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import ModelDescription

ImageSize = int | tuple[int, int]


def at_image_size(
    model: MaskedAutoencoder, description: ModelDescription, image_size: ImageSize
) -> tuple[MaskedAutoencoder, ModelDescription]:
    """The model for images of another size: as many pixels in a patch, more or fewer patches, the same weights.

    Sine-cosine positions are computed between those of the training (see patches.sincos_positions). Learned positions
    are resized bicubically, as usual for vision transformers.

    Args:
        model: the model, on the CPU.
        description: its description.
        image_size: side in pixels, or height and width.

    Returns:
        The model in the mode of the given one, and its description. These are the arguments if the size is the same.

    Raises:
        UserError: the image size is no multiple of the patch size.
    """
    before = description.model
    try:
        after = type(before).model_validate({**before.model_dump(), "image_size": image_size, "position_grid": None})
    except ValidationError as error:
        raise UserError(f"the model cannot take images of size {image_size}: {invalid_value(error)}") from None
    if after.image_hw == before.image_hw:
        return model, description
    weights = model.state_dict()
    if "positions" in weights:
        weights["positions"] = _resized(weights["positions"], before.grid_hw, after.grid_hw)
    if after.grid_hw != (trained_hw := before.position_grid or before.grid_hw):  # of the decoder, if not of the encoder
        after = after.model_copy(update={"position_grid": trained_hw})
    resized = build_model(after)
    resized.load_state_dict(weights)
    return resized.train(model.training), description.model_copy(update={"model": after})


def _resized(positions_1ND: Tensor, before_hw: tuple[int, int], after_hw: tuple[int, int]) -> Tensor:
    grid_1DHW = positions_1ND.transpose(1, 2).unflatten(2, before_hw)
    resized_1DHW = F.interpolate(grid_1DHW, size=after_hw, mode="bicubic", antialias=True)
    return resized_1DHW.flatten(2).transpose(1, 2)
