"""Export a checkpoint of a run as a model (see models/exported.py)."""

from __future__ import annotations

from pathlib import Path

from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.runs.commits import Which, load_weights
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import Storage


def describe(record: RunRecord, step: int) -> ModelDescription:
    """Description of a run's model at a step."""
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


def export_run(run: Storage, folder: Path, which: Which = None) -> ModelDescription:
    """Write a checkpoint of a run (see commits.Which; by default the newest) into a local folder as a model.

    Raises:
        UserError: the run has no such checkpoint.
    """
    state, weights = load_weights(run, which)
    description = describe(state.run, state.step)
    export_model(folder, weights, description)
    return description
