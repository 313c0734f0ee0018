"""A run's checkpoint as an exported model (see models/exported.py)."""

from __future__ import annotations

from pathlib import Path

from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.runs.checkpoint import RunRecord, load_weights
from crate_ray.storage.interface import Storage


def describe(record: RunRecord, step: int) -> ModelDescription:
    """Description of a run's model after some steps."""
    return ModelDescription(
        model=record.model,
        classifier=record.finetune.classifier if record.finetune else None,
        mean=record.mean,
        std=record.std,
        kind=record.kind,
        dataset=record.dataset,
        run_key=record.run_key,
        step=step,
    )


def export_run(run: Storage, folder: Path, step: int | None = None) -> ModelDescription:
    """Write the weights of a run's newest checkpoint, or of that of a step, into a local folder as a model.

    Raises UserError when the run has no such checkpoint.
    """
    state, weights = load_weights(run, step)
    description = describe(state.run, state.step)
    export_model(folder, weights, description)
    return description
