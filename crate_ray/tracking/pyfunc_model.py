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
from crate_ray.finetuning.predict import Predictor
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import WEIGHTS_FILE, load_any

_BATCH = 64


class ImageModel(PythonModel):
    """Embeddings of images, the mean of the encoder's patch tokens; of a classifier, probabilities of the classes."""

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
        """Rows (n, dim) or (n, num_classes) of a data frame whose first column holds encoded images or uint8 arrays."""
        items = model_input.iloc[:, 0].tolist()
        parts = [self._run.load(items[i : i + _BATCH]) for i in range(0, len(items), _BATCH)]
        return np.concatenate([np.empty((0, self._columns), np.float32), *(self._run(part).numpy() for part in parts)])


set_model(ImageModel())
