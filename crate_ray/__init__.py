"""crate-ray: distributed self-supervised pretraining of white-box transformers on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_ray.models.backbone import Backbone
    from crate_ray.runs.references import load_model

__all__ = ["Backbone", "load_model"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import crate_ray` takes no time and needs no torch.
    if name == "load_model":
        from crate_ray.runs.references import load_model

        return load_model
    if name == "Backbone":
        from crate_ray.models.backbone import Backbone

        return Backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
