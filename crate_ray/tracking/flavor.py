"""Log an exported model as an MLflow model: a pyfunc from code, weights in safetensors, nothing pickled."""

from __future__ import annotations

import io
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image

import crate_ray
from crate_ray.addresses import Address
from crate_ray.models.exported import DESCRIPTION_FILE, WEIGHTS_FILE, ModelDescription, read_description
from crate_ray.runs.mlflow_lookup import login
from crate_ray.served_model import InferenceParams, outputs_of

MODEL_NAME = "model"
_CODE = Path(__file__).with_name("pyfunc_model.py")
_PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "safetensors", "pydantic", "pandas")
"""Packages that pyfunc_model.py imports, directly or through crate_ray, in addition to MLflow."""


class _Flavor:
    """MLflow's pyfunc flavor, as `Model.log` calls it."""

    @staticmethod
    def save_model(*, validate_serving_input: bool, **given: Any) -> None:
        """Save a model. `mlflow.pyfunc` does not take the option that `Model.log` reads."""
        mlflow.pyfunc.save_model(**given)


def log_model(uri: Address, run_id: str, exported: Path) -> Any:
    """Log an exported model to a run: as the MLflow model 'model', and its two files as artifacts under 'weights'.

    The input of the MLflow model is a column of encoded images (bytes) or of uint8 arrays (H, W, channels). The output
    is float32: by default embeddings (n, dim), or, for a classifier, class probabilities (n, num_classes). The params
    choose another one; see `ServedModel`.

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
        params=_params(description),
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
            flavor=_Flavor,
            run_id=run_id,
            step=description.step,  # MLflow links the run's metrics of this step to the model
            model_id=model.model_id,
            input_example=_example(description),
            validate_serving_input=False,  # it would load the model in this process
            python_model=_CODE.as_posix(),
            artifacts={name: (exported / name).as_posix() for name in (WEIGHTS_FILE, DESCRIPTION_FILE)},
            code_paths=[Path(crate_ray.__file__).parent.as_posix()],
            signature=signature,
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _PACKAGES],
            metadata=description.model_dump(mode="json", exclude={"model"}) | {"dim": description.model.dim},
        )


def _params(description: ModelDescription) -> ParamSchema:
    """MLflow's form of `InferenceParams`, with the model's own defaults."""
    specs = [ParamSpec("output", DataType.string, outputs_of(description)[0])]
    if description.classifier is None:
        specs.append(ParamSpec("mask_ratio", DataType.double, description.model.mask_ratio))
        specs.append(ParamSpec("seed", DataType.long, InferenceParams.model_fields["seed"].default))
    return ParamSchema(specs)


def _example(description: ModelDescription) -> pd.DataFrame:
    """An input with one encoded sample of the model's size: a ramp from dark to bright, or zeros for grids."""
    config, file = description.model, io.BytesIO()
    height, width = config.image_hw
    if description.kind == "grid":
        np.save(file, np.zeros((config.channels, height, width), np.float32))
    else:
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        picture = Image.fromarray(np.tile(ramp, (height, 1))).convert("L" if config.channels == 1 else "RGB")
        picture.save(file, "PNG")
    return pd.DataFrame({"image": [file.getvalue()]})
