"""The code of the MLflow model: MLflow runs this file when the model is loaded (models from code)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray

from crate_ray.evaluation.features import FeatureExtractor
from crate_ray.training.export import WEIGHTS_FILE

_BATCH = 64


class Embedder(PythonModel):
    """Embeddings of images: mean of the encoder's patch tokens, or the CLS token with params={'feature': 'cls'}."""

    def load_context(self, context: Any) -> None:
        """Build the encoder from its two files."""
        self._extractor = FeatureExtractor.from_folder(Path(context.artifacts[WEIGHTS_FILE]).parent)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Embeddings (n, dim) of a data frame whose first column holds encoded images or uint8 arrays."""
        items = model_input.iloc[:, 0].tolist()
        parts = [self._extractor.load(items[i : i + _BATCH]) for i in range(0, len(items), _BATCH)]
        dim = self._extractor.description.model.dim
        return np.concatenate([np.empty((0, dim), np.float32), *(self._extractor(part).numpy() for part in parts)])


set_model(Embedder())
