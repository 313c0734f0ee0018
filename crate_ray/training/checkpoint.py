"""Checkpoints: tensors in safetensors, everything else in JSON, made valid by a commit record that is written last.

    <storage>/<run>/run.json                          what the run is: written once, when it starts
    <storage>/<run>/attempt-001/step-00000500-<id>/   model.safetensors  optimizer.safetensors  state.json
    <storage>/<run>/commits/step-00000500-<id>.json   names the directory and the digest of each of its files

A directory without a record does not count, however complete it looks. No file of a run is ever unpickled.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from crate_ray.config import PretrainConfig, Settings
from crate_ray.data.decode import Kind
from crate_ray.data.order import SampleOrder
from crate_ray.data.storage import NotFound, Storage
from crate_ray.errors import UserError

logger = logging.getLogger(__name__)

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
RUN_FILE = "run.json"
_COMMITS = "commits/"


class DamagedCheckpoint(UserError):  # noqa: N818 - named for what it says
    """A file of a committed checkpoint differs from its digest."""


class RunRecord(Settings):
    """What is fixed when a run starts; every resumption must agree with it."""

    run_key: str
    """Random name that identifies the run in MLflow, whatever it is called."""
    config: PretrainConfig
    """Settings at the start."""
    dataset: str
    """Digest of the training data's manifest."""
    order: SampleOrder
    """Data order."""
    kind: Kind
    """What the samples are."""
    mean: tuple[float, ...]
    """Mean per channel that is subtracted from the input."""
    std: tuple[float, ...]
    """Standard deviation per channel that the input is divided by."""
    threads: int
    """Torch threads of each worker; another number rounds differently."""


class CheckpointState(Settings):
    """Everything of a checkpoint that is not a tensor."""

    step: int
    """Optimiser steps done: the position of the run, and of its data."""
    run: RunRecord
    """The run that it belongs to."""
    world_size: int
    """Workers that wrote it."""
    torch_version: str
    """torch.__version__"""


class Commit(Settings):
    """The record that makes a checkpoint count."""

    step: int
    """Optimiser steps done."""
    directory: str
    """Folder of the checkpoint under the run's storage."""
    files: dict[str, str]
    """SHA-256 of each file."""


def write_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: CheckpointState
) -> None:
    """Write a checkpoint's files into a local directory."""
    safetensors.torch.save_file(_on_cpu(model.state_dict()), directory / MODEL_FILE)
    safetensors.torch.save_file(_on_cpu(dict(_optimizer_tensors(model, optimizer))), directory / OPTIMIZER_FILE)
    (directory / STATE_FILE).write_text(state.model_dump_json(indent=2))


def commit_checkpoint(run: Storage, directory: str, local: Path, step: int) -> Commit:
    """Upload a checkpoint's files to `directory` under the run's storage, then write its record."""
    files = {}
    for path in sorted(local.iterdir()):
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        run.write(f"{directory}/{path.name}", path)
    commit = Commit(step=step, directory=directory, files=files)
    run.write(_record_name(commit), commit.model_dump_json(indent=2).encode(), if_absent=True)
    return commit


def _record_name(commit: Commit) -> str:
    return f"{_COMMITS}{commit.directory.rsplit('/', 1)[-1]}.json"


def committed(run: Storage) -> list[Commit]:
    """Records of a run's checkpoints, newest first."""
    found = []
    for info in run.list(_COMMITS):
        try:
            found.append(Commit.model_validate_json(run.read(info.key)))
        except (ValidationError, NotFound) as error:
            logger.warning("%s/%s is not a readable commit record and is left out: %s", run.uri, info.key, error)
    return sorted(found, key=lambda c: (c.step, c.directory), reverse=True)


def read_checkpoint(run: Storage, commit: Commit) -> dict[str, bytes]:
    """Content of a committed checkpoint's files. Raises NotFound or DamagedCheckpoint when they are not all there."""
    missing = {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE} - set(commit.files)
    if missing:
        raise DamagedCheckpoint(f"checkpoint {commit.directory} of {run.uri} has no {min(missing)}")
    files = {name: run.read(f"{commit.directory}/{name}") for name in commit.files}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != commit.files[name]:
            raise DamagedCheckpoint(f"checkpoint {commit.directory} of {run.uri}: {name} differs from its digest")
    return files


def newest_valid(run: Storage) -> Iterator[tuple[Commit, dict[str, bytes]]]:
    """Committed checkpoints with the content of their files, newest first, damaged ones left out with a warning."""
    for commit in committed(run):
        try:
            files = read_checkpoint(run, commit)
        except (NotFound, DamagedCheckpoint) as error:  # not when the storage is away: nothing older is newer then
            logger.warning("%s; trying an older one", error)
            continue
        yield commit, files


def restore_checkpoint(files: dict[str, bytes], model: nn.Module, optimizer: torch.optim.Optimizer) -> CheckpointState:
    """Load a checkpoint's files into a model and its fresh optimiser."""
    model.load_state_dict(safetensors.torch.load(files[MODEL_FILE]))
    tensors = safetensors.torch.load(files[OPTIMIZER_FILE])
    for name, parameter in model.named_parameters():
        prefix = f"{name}/"
        entries = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # AdamW keeps its step counter on the CPU unless it runs fused on an accelerator.
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in entries.items()}
    return CheckpointState.model_validate_json(files[STATE_FILE])


def delete_old_checkpoints(run: Storage, keep: int) -> None:
    """Remove all but the newest checkpoints: the record first, so that half a checkpoint never counts."""
    for commit in committed(run)[keep:]:
        run.delete(_record_name(commit))
        for name in commit.files:
            run.delete(f"{commit.directory}/{name}")


def load_weights(run: Storage) -> tuple[CheckpointState, dict[str, Tensor]]:
    """State and weights of a run's newest valid checkpoint.

    Raises UserError when the run has none.
    """
    for _, files in newest_valid(run):
        return CheckpointState.model_validate_json(files[STATE_FILE]), safetensors.torch.load(files[MODEL_FILE])
    raise UserError(f"{run.uri} holds no checkpoint; give the folder of a run that has written one")


def read_record(run: Storage) -> RunRecord | None:
    """The run's record, None before its first start."""
    try:
        return RunRecord.model_validate_json(run.read(RUN_FILE))
    except NotFound:
        return None
    except ValidationError as error:
        raise UserError(
            f"{run.uri}/{RUN_FILE} cannot be read ({str(error).splitlines()[0]}); restore it, or choose another --name"
        ) from None


def write_record(run: Storage, record: RunRecord) -> None:
    """Store the run's record."""
    run.write(RUN_FILE, record.model_dump_json(indent=2).encode())


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            yield f"{name}/{key}", value


def _on_cpu(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
