"""Log an exported model as an MLflow model: a pyfunc from code, weights in safetensors, nothing pickled."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

import crate_ray
from crate_ray.addresses import Address
from crate_ray.models.exported import DESCRIPTION_FILE, WEIGHTS_FILE, read_description
from crate_ray.runs.mlflow_lookup import login

MODEL_NAME = "model"
_CODE = Path(__file__).with_name("pyfunc_model.py")
_PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "safetensors", "pydantic", "pandas")
"""Packages that pyfunc_model.py imports, directly or through crate_ray, in addition to MLflow."""


def log_model(uri: Address, run_id: str, exported: Path) -> Any:
    """Log an exported model to a run: as the MLflow model 'model', and its two files as artifacts under 'weights'.

    The input of the MLflow model is a column of encoded images (bytes) or of uint8 arrays (H, W, channels). The output
    is float32: embeddings (n, dim), or, for a classifier, class probabilities (n, num_classes).

    Returns:
        MLflow's ModelInfo.
    """
    store = login(uri)
    mlflow.set_tracking_uri(store)
    description = read_description(exported)
    classifier = description.classifier
    columns = description.model.dim if classifier is None else classifier.num_classes
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, columns))]),
    )
    client = mlflow.MlflowClient(store)
    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        client.log_artifact(run_id, (exported / name).as_posix(), "weights")
    # Not in mlflow.start_run, which would change the run's status and the time of its end.
    run = client.get_run(run_id)
    model = client.create_logged_model(run.info.experiment_id, MODEL_NAME, run_id, params=run.data.params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        return Model.log(
            artifact_path=None,  # the old name of `name`
            name=MODEL_NAME,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            model_id=model.model_id,
            python_model=_CODE.as_posix(),
            artifacts={name: (exported / name).as_posix() for name in (WEIGHTS_FILE, DESCRIPTION_FILE)},
            code_paths=[Path(crate_ray.__file__).parent.as_posix()],
            signature=signature,
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _PACKAGES],
            metadata=description.model_dump(mode="json", exclude={"model"}) | {"dim": description.model.dim},
        )
