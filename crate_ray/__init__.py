"""crate-ray: distributed self-supervised pretraining of white-box transformers on Ray."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_ray.models.backbone import Backbone
    from crate_ray.runs.references import load_model

__all__ = ["Backbone", "load_model"]

# Before anything imports MLflow. It would send usage data to its makers, from a thread that changes this process's
# environment while requests of other threads read it: they fail then, with a KeyError.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def __getattr__(name: str) -> Any:
    # Imported on first use: `import crate_ray` takes no time and needs no torch.
    if name == "load_model":
        from crate_ray.runs.references import load_model

        return load_model
    if name == "Backbone":
        from crate_ray.models.backbone import Backbone

        return Backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
