"""Settings of `crate-ray export`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from crate_ray.config.base import Advanced, Settings
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig

ExportFormat = Literal["onnx", "torch-export", "safetensors", "huggingface"]
ExportFeature = Literal["cls", "mean", "patch"]
PixelType = Literal["uint8", "float32"]


class ExportConfig(Settings):
    """Write a model in a form that other tools load: ONNX, torch.export, safetensors or Hugging Face."""

    model: str
    """Model to export: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation loss), a
    checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors)."""
    format: ExportFormat
    """onnx (needs crate-ray[onnx]) and torch-export: a graph from pixels to features; huggingface: a folder that
    transformers loads; safetensors: the weights, for crate_ray.load_model. All but safetensors leave out the decoder:
    they hold the encoder, which sees all tokens, or the classifier."""
    output: str
    """New or empty local folder, or s3://bucket/prefix."""
    feature: tuple[ExportFeature, ...] = ("cls", "mean", "patch")
    """Outputs of onnx and torch-export: the CLS token, the mean of the patch tokens, the patch tokens. A classifier
    also returns its logits."""
    pixels: Advanced[PixelType] = "uint8"
    """Type of the input of onnx and torch-export, for a model of images. The values are 0 to 255 in either case."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, for models:/ and runs:/."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_feature(self) -> Self:
        if len(set(self.feature)) < len(self.feature):
            raise ValueError("feature names an output twice; name each once")
        for name in ("feature", "pixels"):
            if name in self.model_fields_set and self.format not in ("onnx", "torch-export"):
                raise ValueError(f"{name} is for the formats onnx and torch-export; {self.format} keeps all tokens")
        return self
