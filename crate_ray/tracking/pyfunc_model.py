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

from crate_ray.errors import UserError
from crate_ray.models.exported import WEIGHTS_FILE
from crate_ray.served_model import ServedModel

_BATCH = 64


class Refused(MlflowException):
    """Input that the model cannot use. MLflow's server answers with status 400 and this sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self._sentence = sentence

    def serialize_as_json(self) -> str:
        """The body of the answer. MLflow has put the whole input before the sentence."""
        self.message = self._sentence
        return super().serialize_as_json()


class ImageModel(PythonModel):
    """Computes features of images, reconstructs them or, with a classifier, predicts class probabilities."""

    def load_context(self, context: Any) -> None:
        """Build the model from its two files."""
        self._model = ServedModel.from_folder(Path(context.artifacts[WEIGHTS_FILE]).parent)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Run the model on a data frame whose first column holds images.

        An image is encoded (bytes, or base64 text as HTTP clients send it) or an array of pixels (see
        `received_image`). The params are those of `InferenceParams`.

        Returns:
            An output of `ServedModel`, one row per image.

        Raises:
            Refused: one of the images cannot be decoded, or the model cannot give what the params ask for.
        """
        items = model_input.iloc[:, 0].tolist()
        if len(items) == 1 and isinstance(items[0], list) and items[0] and isinstance(items[0][0], str):
            (items,) = items  # of {"image": [text, text]} in Python, MLflow makes one row
        try:
            checked = self._model.params(params)
            parts = [
                self._model(self._model.receive(items[i : i + _BATCH], i + 1, len(items)), checked).numpy()
                for i in range(0, len(items) or 1, _BATCH)
            ]
        except UserError as error:
            raise Refused(str(error)) from None
        return np.concatenate(parts)


set_model(ImageModel())
