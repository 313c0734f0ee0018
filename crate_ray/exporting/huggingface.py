"""Hugging Face: a folder that transformers loads without crate-ray, with the code of the model in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from crate_ray.exporting.source import inline
from crate_ray.models.backbone import Backbone
from crate_ray.models.exported import ModelDescription

MODELING_FILE = "modeling_crate.py"
WEIGHTS_FILE = "model.safetensors"
_CLASSES = {"AutoModel": "CrateModel", "AutoModelForImageClassification": "CrateForImageClassification"}
_BICUBIC = 3  # Pillow's number
_NO_SCALE = 1e30
"""Divisor of a channel that has the same value everywhere. JSON has no infinity."""

_PLAIN = {
    "linear": """def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)""",
    "gram": """def gram(weight: Tensor) -> Tensor:
    return weight.t() @ weight""",
    "attention": """def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)""",
    "self_attention": """def self_attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)""",
}
"""Plain forms of what `models.kernels` computes faster on some devices. They give the same numbers in float32."""


def modeling_source() -> str:
    """The modelling file: huggingface_model.py with the source of the layers in place of its imports of them."""
    template = Path(__file__).with_name("huggingface_model.py").read_text(encoding="utf-8")
    return re.sub(r"\b(?:CrateMAE|ViTMAE)Config\b", "CrateConfig", inline(template, _PLAIN))


def write(backbone: Backbone, description: ModelDescription, folder: Path) -> None:
    """Write config, weights, modelling code and preprocessing into a folder."""
    (folder / MODELING_FILE).write_text(modeling_source())
    for name, content in (
        ("config.json", _config(backbone, description)),
        ("preprocessor_config.json", _preprocessor(description)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    safetensors.torch.save_file(_weights(backbone), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read(folder: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """A written model as a function: the modelling file runs as it stands, with small stand-ins for transformers."""
    config = _Config(**json.loads((folder / "config.json").read_text()))
    names: dict[str, Any] = {"__name__": "modeling_crate", "PretrainedConfig": _Config, "PreTrainedModel": _Model}
    names |= {"BaseModelOutputWithPooling": _Output, "ImageClassifierOutput": _Output}
    source = re.sub(r"^from transformers.*\n", "", (folder / MODELING_FILE).read_text(), flags=re.MULTILINE)
    exec(compile(source, str(folder / MODELING_FILE), "exec"), names)
    settings = names["CrateConfig"](**vars(config))
    model: nn.Module = names[config.architectures[0]](settings).eval()
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))

    def run(images: Tensor) -> dict[str, Tensor]:
        return {name: value for name, value in vars(model(images)).items() if value is not None}

    return run


class _Config:
    """Stands for transformers.PretrainedConfig."""

    architectures: list[str]
    output_attentions = output_hidden_states = False

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)
        self.num_labels = len(settings.get("id2label", ()))


class _Model(nn.Module):
    """Stands for transformers.PreTrainedModel."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        """Weights are loaded, not drawn."""


_Output = SimpleNamespace
"""Stands for the outputs of transformers' models."""


def _config(backbone: Backbone, description: ModelDescription) -> dict[str, Any]:
    head = description.classifier
    module = MODELING_FILE.removesuffix(".py")
    names = (head and head.classes) or [f"LABEL_{i}" for i in range(backbone.num_classes)]
    labels = dict(enumerate(names))
    return {
        "model_type": "crate_ray",
        "architectures": [_CLASSES["AutoModel" if head is None else "AutoModelForImageClassification"]],
        "auto_map": {"AutoConfig": f"{module}.CrateConfig"} | {name: f"{module}.{c}" for name, c in _CLASSES.items()},
        **description.model.model_dump(mode="json"),
        "pooling": "mean" if head is None else head.pooling,
        "encoder_norm": head is None,
        "dtype": "float32",
        **({"id2label": labels, "label2id": {name: i for i, name in labels.items()}} if head else {}),
    }


def _preprocessor(description: ModelDescription) -> dict[str, Any]:
    """Settings of transformers' standard processor: short side, centre crop, bicubic, as in evaluation.

    It can only crop images to squares. For another shape it stretches them.
    """
    model, is_image = description.model, description.kind == "image"
    height, width = model.image_hw
    square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": is_image,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_center_crop": is_image and square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": is_image,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(description.mean),
        "image_std": [value or _NO_SCALE for value in description.std],
        "do_convert_rgb": is_image and model.channels == 3,
    }


def _weights(backbone: Backbone) -> dict[str, Tensor]:
    """Weights by the names in the modelling file."""
    encoder = {"positions": backbone.autoencoder.positions, **backbone.autoencoder.state_dict()}
    if not backbone.num_classes:
        return encoder | {f"encoder_norm.{name}": value for name, value in backbone.norm.state_dict().items()}
    found = {f"backbone.{name}": value for name, value in encoder.items()}
    for part in ("fc_norm", "head"):
        values = backbone.get_submodule(part).state_dict()
        found |= {f"{part.removeprefix('fc_')}.{name}": value for name, value in values.items()}
    return found
