"""The code of the MLflow model. MLflow runs this file when it loads the model (models from code).

It runs in the model's own environment, so it may import only packages that flavor.py lists as requirements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import WEIGHTS_FILE, load_any
from crate_ray.serving import FeatureExtractor, Predictor, load_received

_BATCH = 64


class UnusableInput(MlflowException):
    """An image that the model cannot use. MLflow's server answers with status 400 and this sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self._sentence = sentence

    def serialize_as_json(self) -> str:
        """The body of the answer. MLflow has put the whole input before the sentence."""
        self.message = self._sentence
        return super().serialize_as_json()


class ImageModel(PythonModel):
    """Embeds images (mean of the encoder's patch tokens) or, with a classifier, predicts class probabilities."""

    def load_context(self, context: Any) -> None:
        """Build the model from its two files."""
        model, description = load_any(Path(context.artifacts[WEIGHTS_FILE]).parent)
        self._run: FeatureExtractor | Predictor
        if isinstance(model, Classifier):
            self._run, self._columns = Predictor(model, description), model.config.num_classes
        else:
            self._run, self._columns = FeatureExtractor(model, description), description.model.dim

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Run the model on a data frame whose first column holds images.

        An image is encoded (bytes, or base64 text as HTTP clients send it) or an array of pixels (see
        `received_image`).

        Returns:
            Embeddings (n, dim) or probabilities (n, num_classes).

        Raises:
            UnusableInput: one of the images cannot be decoded.
        """
        items = model_input.iloc[:, 0].tolist()
        if len(items) == 1 and isinstance(items[0], list) and items[0] and isinstance(items[0][0], str):
            (items,) = items  # of {"image": [text, text]} in Python, MLflow makes one row
        parts = [self._load(items, range(i, min(i + _BATCH, len(items)))) for i in range(0, len(items), _BATCH)]
        return np.concatenate([np.empty((0, self._columns), np.float32), *(self._run(part).numpy() for part in parts)])

    def _load(self, items: list[Any], rows: range) -> Tensor:
        images, errors = load_received([items[i] for i in rows], self._run.description)
        for row, error in zip(rows, errors, strict=True):
            if error is not None:
                raise UnusableInput(
                    f"image {row + 1} of {len(items)} cannot be used: {error}; send encoded images in base64, or "
                    "arrays of pixels"
                )
        return images


set_model(ImageModel())
