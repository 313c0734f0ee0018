"""Checkpoints as the workers of a run write them, made by one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from crate_ray.runs.checkpoint_files import STATE_FILE, CheckpointState, own_part, write_part
from crate_ray.runs.commits import commit_checkpoint, upload_part
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import Storage


def upload(
    run: Storage,
    tensors: Mapping[str, Tensor],
    state: CheckpointState,
    directory: str,
    rank: int,
    scratch: Path,
) -> None:
    """What one worker writes of tensors that all workers hold; scratch is for its local files."""
    local = scratch / "local" / directory / str(rank)
    write_part(local, own_part(tensors, rank, state.world_size), rank, state.world_size)
    if rank == 0:
        (local / STATE_FILE).write_text(state.model_dump_json())
    upload_part(run, directory, local, rank, state.world_size)


def save(
    run: Storage,
    tensors: Mapping[str, Tensor],
    record: RunRecord,
    step: int,
    scratch: Path,
    name: str = "",
    world_size: int = 1,
    validation_loss: float | None = None,
) -> str:
    """A whole checkpoint, committed; its folder in the run."""
    directory = f"attempt-001/step-{step:08d}{name}"
    state = CheckpointState(step=step, run=record, world_size=world_size, torch_version="2")
    for rank in range(world_size):
        upload(run, tensors, state, directory, rank, scratch)
    commit = commit_checkpoint(run, directory, step, world_size, validation_loss=validation_loss, timeout=0)
    assert commit.directory == directory
    return directory
