"""Memory that a training step takes, estimated on the meta device, which has shapes but no data."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from crate_ray.config import CrateMAEConfig, ModelConfig, OptimizerName
from crate_ray.models import build_model
from crate_ray.models.flops import by_layers
from crate_ray.models.parameters import is_layer_matrix

_REALLY_KEPT = 0.4
"""Share of the counted activations that a step keeps at least. Autocast halves some, and fused kernels recompute
others. On the CPU, CRATE-MAE and ViT-MAE kept 0.42 to 1.1 times the count."""


def least_training_bytes(
    config: ModelConfig, images: int, *, checkpoint_layers: bool = False, optimizer: OptimizerName = "adamw"
) -> int:
    """Bytes that one worker needs at least to train a model: weights, optimizer state, and activations.

    Args:
        config: the model.
        images: images in the largest forward pass.
        checkpoint_layers: whether layers are computed again in the backward pass; then only their inputs are kept.
        optimizer: optim.optimizer of the settings.
    """
    if isinstance(config, CrateMAEConfig):  # λ and η change no sizes
        config = config.model_copy(update={"sparsity_lambda": 0.5, "step_size": 0.1})
    return _least_training_bytes(config, images, checkpoint_layers, optimizer)


@lru_cache(maxsize=1024)
def _least_training_bytes(config: ModelConfig, images: int, checkpoint_layers: bool, optimizer: OptimizerName) -> int:
    def state(model: nn.Module) -> int:
        return sum(
            p.nbytes * (2 + _states(optimizer, is_layer_matrix(name, p)))  # with weights and gradients
            for name, p in model.named_parameters()
        )

    def kept(model: nn.Module) -> int:
        model.checkpoint_layers = checkpoint_layers  # type: ignore[assignment]
        return _kept_for_backward(model, config, images)

    return by_layers(build_model, config, state) + int(_REALLY_KEPT * by_layers(build_model, config, kept))


def _states(optimizer: OptimizerName, layer_matrix: bool) -> int:
    """Numbers that an optimizer stores for each number of a parameter: one momentum, or AdamW's two moments."""
    return 1 if optimizer == "lion" or (optimizer == "muon" and layer_matrix) else 2


def _kept_for_backward(model: nn.Module, config: ModelConfig, images: int) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, without the weights."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other tensor gets its address
        return tensor

    shape = config.channels, *config.image_hw
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(
            torch.empty(images, *shape, device="meta"), torch.empty(images, config.num_patches, device="meta")
        )
    assert output is not None
    return sum(storage.nbytes() for storage in kept.values())
