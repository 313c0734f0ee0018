"""The code of the MLflow model. MLflow runs this file when it loads the model (models from code).

It runs in the model's own environment, so it may import only packages that flavor.py lists as requirements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray

from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import WEIGHTS_FILE, load_any
from crate_ray.serving import FeatureExtractor, Predictor

_BATCH = 64


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
        """Run the model on a data frame whose first column holds encoded images or uint8 arrays.

        Returns:
            Embeddings (n, dim) or probabilities (n, num_classes).
        """
        items = model_input.iloc[:, 0].tolist()
        parts = [self._run.load(items[i : i + _BATCH]) for i in range(0, len(items), _BATCH)]
        return np.concatenate([np.empty((0, self._columns), np.float32), *(self._run(part).numpy() for part in parts)])


set_model(ImageModel())
