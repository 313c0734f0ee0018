"""The files of a checkpoint: tensors in safetensors, everything else in JSON. No file is ever unpickled.

    model-00001-of-00002.safetensors       the part of the weights that each worker writes
    optimizer-00001-of-00002.safetensors   the part of the optimizer state
    state.json                             everything that is not a tensor

Works on local folders. commits.py moves them to and from the run's storage.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from crate_ray.bounded import read_small
from crate_ray.config import PositiveInt, Settings
from crate_ray.config.identifiers import Count
from crate_ray.errors import UserError, invalid_value
from crate_ray.models.fit import safetensors_shapes
from crate_ray.runs.record import RunRecord

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
MODEL_PART, OPTIMIZER_PART = "model", "optimizer"
_PART_OF_INDEX = {1: MODEL_PART, 2: OPTIMIZER_PART}  # torch.distributed.checkpoint numbers its files

# Every worker writes and reads by itself, so that background work never waits for another worker.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointState(Settings):
    """Content of a checkpoint that is not a tensor."""

    step: Count
    """Number of optimizer steps done. This is also the position in the data."""
    run: RunRecord
    """The run that wrote it."""
    world_size: PositiveInt
    """Number of workers that wrote it."""
    torch_version: str
    """torch.__version__"""
    arithmetic: tuple[str, ...] = ()
    """How the layers were computed (see task.Assembled). Empty in old checkpoints, which do not store it."""


# --- Write ----------------------------------------------------------------------------------------------------------


def checkpoint_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name: weights as <parameter>, optimizer state as <parameter>/<entry>."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def own_part(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors that a worker writes: its shards of sharded tensors, and an equal share of the others' bytes."""
    loads = [0] * world_size
    part: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            part[name] = tensor
            continue
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            part[name] = tensor.contiguous()  # safetensors has no memory formats
    return part


def write_part(folder: Path, part: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    """Write a worker's tensors to a local folder: at most one file for the weights and one for the optimizer."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {name: 2 if "/" in name else 1 for name in part}
    writer = HuggingFaceStorageWriter(folder.as_posix(), index, save_distributed=True)
    writer.sync_files = False  # only the uploaded copy has to survive a crash
    with _original_errors():
        dcp.save(dict(part), storage_writer=writer, no_dist=True)
    for path in list(folder.glob("shard-*-model-*.safetensors")):
        kind = _PART_OF_INDEX[int(path.name.split("-")[3])]
        path.rename(folder / f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors")


# --- Read -----------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a local folder, merged from the parts of all workers, on the CPU.

    Raises UserError if a file is damaged.
    """
    try:
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for path in folder.glob("*.safetensors"):
            safetensors_shapes(path)  # of many workers, some may hold an empty part of a small tensor
        reader = HuggingFaceStorageReader(folder.as_posix())
        entries = {
            name: entry
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        if sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values()) > stored:
            raise ValueError("its files state more numbers than they hold")
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        with _original_errors():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:  # torch raises anything for damaged metadata
        cause = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the checkpoint's tensors cannot be read ({type(error).__name__}: {cause}); give another checkpoint"
        ) from None
    return tensors


def read_state(folder: Path) -> CheckpointState:
    """Read the part of a checkpoint that is not tensors from a local folder. Raises UserError if it is damaged."""
    try:
        return CheckpointState.model_validate_json(read_small(folder / STATE_FILE))
    except (ValidationError, OSError) as error:
        cause = invalid_value(error) if isinstance(error, ValidationError) else error.strerror
        raise UserError(
            f"the checkpoint's {STATE_FILE} cannot be read ({cause}); delete this checkpoint, or give an older one"
        ) from None


def restore_weights(folder: Path, model: nn.Module) -> None:
    """Load the weights in a local folder into a model. Model and files may be sharded differently."""
    with _original_errors():
        dcp.load(dict(model.state_dict()), storage_reader=HuggingFaceStorageReader(folder.as_posix()), no_dist=True)


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> CheckpointState:
    """Load the checkpoint in a local folder into a model and its new optimizer. They may be sharded differently."""
    reader = HuggingFaceStorageReader(folder.as_posix())
    saved = reader.read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        prefix = f"{name}/"
        for key in [key.removeprefix(prefix) for key in saved if key.startswith(prefix)]:
            entry = saved[prefix + key]
            assert isinstance(entry, TensorStorageMetadata)
            # Step counters are scalars. The fused optimizer needs them on the parameter's device.
            scalar = not len(entry.size)
            dtype = entry.properties.dtype
            empty = torch.zeros((), dtype=dtype, device=parameter.device)
            optimizer.state[parameter][key] = empty if scalar else torch.zeros_like(parameter, dtype=dtype)
    with _original_errors():
        dcp.load(checkpoint_tensors(model, optimizer), storage_reader=reader, no_dist=True)
    return read_state(folder)


def check_arithmetic(state: CheckpointState, now: tuple[str, ...], world_size: int, device: torch.device) -> None:
    """Check that the workers compute in the same way as those that saved the checkpoint.

    On the CPU, with the same number of workers, a resumed run gives bitwise the same result as an uninterrupted run.
    Different arithmetic would break this, so it is an error there. In all other cases a difference is only logged.

    Raises:
        UserError: the resumed run would not give bitwise the same result.
    """
    if not state.arithmetic or state.arithmetic == now:
        return
    then = " and ".join(state.arithmetic)
    sentence = f"the checkpoint of step {state.step} was computed with {then}, the workers now use {' and '.join(now)}"
    if device.type == "cpu" and world_size == state.world_size and len(state.arithmetic) == 1:
        raise UserError(
            f"{sentence}, which rounds differently; set training.compile, precision and bf16_tokens as before, on "
            "machines that support them, or start a new run from these weights with another --name and --init-from"
        )
    logger.warning("%s, which rounds differently", sentence)


@contextmanager
def _original_errors() -> Iterator[None]:
    """Raise the original error instead of torch's CheckpointException, which is not an Exception."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
