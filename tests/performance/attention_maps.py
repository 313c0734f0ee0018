"""Does query = key = value explain the masked loss of the white box? A diagnosis, not a variant of the model.

Trains the white box of cifar10.yaml, or a ViT-MAE with as many parameters, with one map for query, key and value (as
MSSA has) or with three (as a ViT has). Prints parameters, masked loss on the held-out images, linear probe and k-NN.

python -m tests.performance.attention_maps --model white-box --maps 3 --train FOLDER --validation FOLDER [--steps 2000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from crate_ray.config import EvaluateConfig, ModelConfig, PretrainConfig, ProbeConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.evaluation.classification import classify_by
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.crate import MSSA
from crate_ray.models.kernels.attention import merge_heads, split_heads
from crate_ray.models.vit import TransformerLayer
from crate_ray.runs.export import describe
from crate_ray.runs.metrics import VALIDATION_LOSS
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import open_storage
from crate_ray.training.bare_loop import train
from crate_ray.training.display import ProgressDisplay
from crate_ray.training.pretraining import PretrainTask

ROOT = Path(__file__).parents[2]
_BUILT_BY = "crate_ray.training.pretraining.build_model"

_VIT: dict[str, Any] = {
    "architecture": "vit_mae", "image_size": 32, "patch_size": 4, "norm_pix_loss": True, "dim": 128, "num_heads": 8,
    "depth": 3, "decoder_depth": 3,
}  # fmt: skip
_SIZES: dict[tuple[str, int], dict[str, Any]] = {
    ("white-box", 1): {"dim": 332},
    ("white-box", 3): {"dim": 256},
    ("vit-mae", 3): {**_VIT, "mlp_ratio": 3.96875},
    ("vit-mae", 1): {**_VIT, "mlp_ratio": 4.96875},
}
"""By model and number of maps, model settings with which all have as many parameters."""


class OneMap(TransformerLayer):
    """A ViT layer whose query is its key and its value."""

    def _query_key_value(self, z_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = split_heads(self.qkv(self.attention_norm(z_BTD)), self.num_heads)
        return query, query, query


class ThreeMaps(MSSA):
    """MSSA with keys and values of their own."""

    key: nn.Parameter
    value: nn.Parameter

    def forward(self, z: Tensor, subspaces: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Update of every token; see MSSA."""
        assert self.output is not None
        maps = (self._codebook(subspaces), self.key, self.value)
        query, key, value = (split_heads(self.product(z, each), self.num_subspaces) for each in maps)
        allowed_BKTT = None
        if visible is not None:  # a token attends to the visible tokens and to itself
            own = torch.eye(visible.shape[1], dtype=torch.bool, device=z.device)
            allowed_BKTT = (visible[:, None, :] | own)[:, None]
        o_BKTP = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed_BKTT)
        return self.product(merge_heads(o_BKTP), self.output.weight, self.output.bias)


def changed(model: MaskedAutoencoder, maps: int) -> MaskedAutoencoder:
    """The model with another number of maps in each layer, if it is not its own."""
    for layer in (*model.encoder, *model.decoder):
        if isinstance(layer, TransformerLayer) and maps == 1:
            layer.__class__ = OneMap
            layer.qkv = nn.Linear(layer.qkv.in_features, layer.qkv.in_features)
            nn.init.xavier_uniform_(layer.qkv.weight)
            nn.init.zeros_(layer.qkv.bias)
        elif not isinstance(layer, TransformerLayer) and maps == 3:
            layer.mssa.__class__ = ThreeMaps
            for name in ("key", "value"):
                setattr(layer.mssa, name, nn.Parameter(0.02 * torch.randn_like(layer.mssa.subspaces)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=["white-box", "vit-mae"])
    parser.add_argument("--maps", required=True, type=int, choices=[1, 3], help="maps for query, key and value")
    parser.add_argument("--train", required=True, help="labelled training images of 32 × 32")
    parser.add_argument("--validation", required=True, help="labelled held-out images")
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    values = yaml.safe_load((ROOT / "jobs/configs/cifar10.yaml").read_text())
    sizes = _SIZES[given.model, given.maps]
    values["model"] = sizes if given.model == "vit-mae" else {**values["model"], **sizes}
    values["data"] |= {"train": given.train, "validation": given.validation}
    values["training"] |= {"epochs": None, "steps": given.steps}
    values["scaling"] = {"workers": 1}

    def build(config: ModelConfig) -> MaskedAutoencoder:
        return changed(build_model(config), given.maps)

    with tempfile.TemporaryDirectory() as storage:
        config = PretrainConfig.model_validate({**values, "storage": storage})
        run = open_run(config)
        with mock.patch(_BUILT_BY, build), ProgressDisplay(0, run.total_steps) as display:
            done = train(PretrainTask, config, run.record, run.total_steps, listeners=[display])
        description = describe(run.record, run.total_steps)
    model = build(config.model)
    model.load_state_dict(done.weights)
    parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(f"{given.model}, maps: {given.maps}, parameters: {parameters:,}")
    print(f"masked loss {done.held_out[VALIDATION_LOSS]:.4f}", flush=True)
    train_images, held_out = (load_dataset(open_storage(uri, S3Config())) for uri in (given.train, given.validation))
    probe = ProbeConfig(train=given.train, test=given.validation, max_samples=10_000)
    settings = EvaluateConfig(model=given.model, probe=probe, all_layers=False)
    evaluated = EvaluatedModel("trained", model, description)
    scores = classify_by(evaluated, train_images, held_out, settings, probe, InProcess()).standard
    print(f"linear probe {scores.linear.accuracy:.1%}, k-NN {scores.knn.value:.1%}")


if __name__ == "__main__":
    main()
