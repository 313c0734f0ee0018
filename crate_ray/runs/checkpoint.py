"""Checkpoints: tensors in safetensors, everything else in JSON, made valid by a commit record that is written last.

    <storage>/<run>/run.json                          what the run is: written once, when it starts
    <storage>/<run>/attempt-001/step-00000500-<id>/   model-00001-of-00002.safetensors      each worker's part, by
                                                      optimizer-00001-of-00002.safetensors  torch.distributed.checkpoint
                                                      uploaded-00001-of-00002.json          what the worker has uploaded
                                                      state.json
    <storage>/<run>/commits/step-00000500-<id>.json   names the directory and the size and digest of each of its files
    <storage>/<run>/initial/model.safetensors         weights that the run starts from, where it was given some

A directory without a record does not count, however complete it looks. No file of a run is ever unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from crate_ray.config import (
    ClassifierConfig,
    CrateMAEConfig,
    FinetuneConfig,
    Kind,
    ModelConfig,
    PretrainConfig,
    Settings,
    ViTMAEConfig,
)
from crate_ray.data.order.sequence import SampleOrder
from crate_ray.errors import UserError
from crate_ray.storage.interface import NotFound, Storage

logger = logging.getLogger(__name__)

STATE_FILE, RUN_FILE, INITIAL_WEIGHTS = "state.json", "run.json", "initial/model.safetensors"
MODEL_PART, OPTIMIZER_PART = "model", "optimizer"
_COMMITS = "commits/"
_PART_OF_INDEX = {1: MODEL_PART, 2: OPTIMIZER_PART}  # of the files that torch.distributed.checkpoint numbers

# Each worker writes and reads its part by itself, so that nothing in the background waits for another worker.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class DamagedCheckpoint(UserError):  # noqa: N818 - named for what it says
    """A file of a committed checkpoint is missing, or differs from its digest."""


class Parent(Settings):
    """The model that a fine-tuning began with."""

    reference: str
    """How the settings refer to it."""
    run_key: str | None = None
    """The run that trained it, where that is known."""
    dataset: str | None = None
    """Digest of what it was trained on."""
    step: int = 0
    """Optimiser steps behind it."""


class FinetuneStart(Settings):
    """What a fine-tuning is about, beside its settings."""

    encoder: ModelConfig
    """Architecture of the encoder."""
    classifier: ClassifierConfig
    """What is put on top of it."""
    parent: Parent | None = None
    """Where the encoder's weights come from; None for random ones."""


class RunRecord(Settings):
    """What is fixed when a run starts; every resumption must agree with it."""

    run_key: str
    """Random name that identifies the run in MLflow, whatever it is called."""
    config: PretrainConfig | FinetuneConfig
    """Settings at the start."""
    finetune: FinetuneStart | None = None
    """Of a fine-tuning: what it is about."""
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
    initial_weights: str | None = None
    """SHA-256 of the weights that the run starts from, where it was given some."""

    @property
    def model(self) -> CrateMAEConfig | ViTMAEConfig:
        """Architecture of the model, or of the encoder that is fine-tuned."""
        if isinstance(self.config, PretrainConfig):
            return self.config.model
        assert self.finetune is not None
        return self.finetune.encoder


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
    arithmetic: tuple[str, ...] = ()
    """How their layers computed (see task.Assembled); empty where that was not kept."""


class FileRecord(Settings):
    """What a file of a checkpoint must be."""

    size: int
    """Bytes."""
    sha256: str
    """Digest of its content."""


class Commit(Settings):
    """The record that makes a checkpoint count."""

    step: int
    """Optimiser steps done."""
    directory: str
    """Folder of the checkpoint under the run's storage."""
    files: dict[str, FileRecord]
    """Its files, by name."""
    time: float
    """When it was committed, in seconds since 1970."""
    validation_loss: float | None = None
    """Validation loss after its step, where it was measured."""


class _Uploaded(Settings):
    """What one worker has uploaded; written after the files themselves."""

    files: dict[str, FileRecord]


# --- Tensors to files and back --------------------------------------------------------------------------------------


def checkpoint_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a checkpoint holds: weights by their name, optimiser state as <name of the weight>/<entry>."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def own_part(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors that a worker writes: its shards of sharded ones, and of the others an equal share of the bytes."""
    loads = [0] * world_size
    part: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            part[name] = tensor
            continue
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            part[name] = tensor.contiguous()  # safetensors knows no memory format
    return part


def write_part(folder: Path, part: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    """Write a worker's part of a checkpoint's tensors into a local folder: at most one file each for the weights and
    the optimiser."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {name: 2 if "/" in name else 1 for name in part}
    writer = HuggingFaceStorageWriter(folder.as_posix(), index, save_distributed=True)
    writer.sync_files = False  # what counts is the upload
    with _plain_errors():
        dcp.save(dict(part), storage_writer=writer, no_dist=True)
    for path in list(folder.glob("shard-*-model-*.safetensors")):
        kind = _PART_OF_INDEX[int(path.name.split("-")[3])]
        path.rename(folder / f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong, without what torch.distributed.checkpoint puts around it, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a local folder, put together from all workers' parts, on the CPU."""
    reader = HuggingFaceStorageReader(folder.as_posix())
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with _plain_errors():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def restore_weights(folder: Path, model: nn.Module) -> None:
    """Load weights from the safetensors files in a local folder into a model, sharded or not, however they were
    written."""
    with _plain_errors():
        dcp.load(dict(model.state_dict()), storage_reader=HuggingFaceStorageReader(folder.as_posix()), no_dist=True)


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> CheckpointState:
    """Load a checkpoint's files into a model and its fresh optimiser, sharded or not, however they were written."""
    reader = HuggingFaceStorageReader(folder.as_posix())
    saved = reader.read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        prefix = f"{name}/"
        for key in [key.removeprefix(prefix) for key in saved if key.startswith(prefix)]:
            entry = saved[prefix + key]
            assert isinstance(entry, TensorStorageMetadata)
            # Counters have no dimension; they are on the parameter's device, where the fused optimiser wants them.
            scalar = not len(entry.size)
            dtype = entry.properties.dtype
            empty = torch.zeros((), dtype=dtype, device=parameter.device)
            optimizer.state[parameter][key] = empty if scalar else torch.zeros_like(parameter, dtype=dtype)
    with _plain_errors():
        dcp.load(checkpoint_tensors(model, optimizer), storage_reader=reader, no_dist=True)
    return CheckpointState.model_validate_json((folder / STATE_FILE).read_bytes())


def check_arithmetic(state: CheckpointState, now: tuple[str, ...], world_size: int, device: torch.device) -> None:
    """Compare how the workers compute with how a checkpoint was computed.

    Raises UserError where the resumed run would not end with the bits that it is promised to end with, those of a run
    that nothing disturbed: on the CPU, with as many workers. Elsewhere a difference is logged.
    """
    if not state.arithmetic or state.arithmetic == now:
        return
    then = " and ".join(state.arithmetic)
    sentence = f"the checkpoint of step {state.step} comes from {then}, and the workers now have {' and '.join(now)}"
    if device.type == "cpu" and world_size == state.world_size and len(state.arithmetic) == 1:
        raise UserError(
            f"{sentence}, which round differently; set training.compile and training.precision to what it comes from, "
            "on machines that can do that, or begin another run with its weights: another --name and --init-from"
        )
    logger.warning("%s, which round differently", sentence)


# --- Files to the storage and back ----------------------------------------------------------------------------------


def upload_part(run: Storage, directory: str, folder: Path, rank: int, world_size: int) -> None:
    """Upload a worker's files to `directory` under the run's storage, and last a record of them."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = FileRecord(size=path.stat().st_size, sha256=_digest(path))
        run.write(f"{directory}/{path.name}", path)
    record = _Uploaded(files=files).model_dump_json(indent=2).encode()
    run.write(f"{directory}/{_uploaded_name(rank, world_size)}", record)


def commit_checkpoint(
    run: Storage,
    directory: str,
    step: int,
    world_size: int,
    *,
    validation_loss: float | None = None,
    timeout: float = 1800.0,
    before: Callable[[], None] = lambda: None,
) -> Commit:
    """Wait until all workers have uploaded their parts, then write the record that makes the checkpoint count.

    What is to be done between the two, `before` does.
    Raises TimeoutError when they have not within the timeout, in seconds.
    """
    files: dict[str, FileRecord] = {}
    deadline = time.monotonic() + timeout
    for rank in range(world_size):
        pause = 0.05
        while True:
            try:
                record = run.read(f"{directory}/{_uploaded_name(rank, world_size)}")
                break
            except NotFound:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"worker {rank} did not upload its part of checkpoint {directory} within {timeout:.0f} s"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
        files |= _Uploaded.model_validate_json(record).files
    before()
    commit = Commit(step=step, directory=directory, files=files, time=time.time(), validation_loss=validation_loss)
    run.write(record_name(commit), commit.model_dump_json(indent=2).encode())
    return commit


def record_name(commit: Commit) -> str:
    """Name of a commit record under the run's storage."""
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


def fetch_checkpoint(run: Storage, commit: Commit, folder: Path, part: Literal["all", "model"] = "all") -> None:
    """Copy a committed checkpoint's files, or only state and weights of it, into an empty local folder.

    Raises NotFound or DamagedCheckpoint when they are not all there as they were written.
    """
    _check_complete(run, commit)
    for name, record in commit.files.items():
        if part == "model" and name.startswith(OPTIMIZER_PART):
            continue
        run.download(f"{commit.directory}/{name}", folder / name)
        if _digest(folder / name) != record.sha256:
            raise DamagedCheckpoint(f"checkpoint {commit.directory} of {run.uri}: {name} differs from its digest")


def fetch_newest(
    run: Storage, folder: Path, part: Literal["all", "model"] = "all", step: int | None = None
) -> Commit | None:
    """Copy the newest valid checkpoint (of a step, where one is given) into a local folder.

    Damaged ones are passed over with a warning. None when there is no valid one.
    """
    for commit in committed(run):
        if step not in (None, commit.step):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fetch_checkpoint(run, commit, folder, part)
        except (NotFound, DamagedCheckpoint) as error:  # not when the storage is away: nothing older is newer then
            logger.warning("%s; trying an older one", error)
            shutil.rmtree(folder)
            continue
        return commit
    return None


def newest_complete(run: Storage) -> Commit | None:
    """Record of the newest checkpoint whose files are all there in their full size; their content is not read."""
    for commit in committed(run):
        try:
            _check_complete(run, commit)
        except DamagedCheckpoint as error:
            logger.warning("%s; trying an older one", error)
            continue
        return commit
    return None


def load_weights(run: Storage, step: int | None = None) -> tuple[CheckpointState, dict[str, Tensor]]:
    """State and weights of a run's newest valid checkpoint, or of that of a step, on the CPU.

    Raises UserError when the run has none.
    """
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        folder = Path(temporary) / "checkpoint"
        if fetch_newest(run, folder, "model", step):
            return CheckpointState.model_validate_json((folder / STATE_FILE).read_bytes()), read_tensors(folder)
    if step is None:
        raise UserError(f"{run.uri} holds no checkpoint; give the folder of a run that has written one")
    steps = ", ".join(str(commit.step) for commit in reversed(committed(run))) or "none"
    raise UserError(f"{run.uri} holds no valid checkpoint of step {step}; it has those of the steps {steps}")


def write_initial_weights(run: Storage, weights: Mapping[str, Tensor]) -> str:
    """Store the weights that a run is to start from; returns their digest, for its record."""
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        path = Path(temporary) / "model.safetensors"
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        run.write(INITIAL_WEIGHTS, path)
        return _digest(path)


def fetch_initial_weights(run: Storage, digest: str, folder: Path) -> None:
    """Copy the weights that a run is to start from into a local folder.

    Raises DamagedCheckpoint when they are others by now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    run.download(INITIAL_WEIGHTS, path)
    if _digest(path) != digest:
        raise DamagedCheckpoint(
            f"{run.uri}/{INITIAL_WEIGHTS}, which the run starts from, differs from its digest; delete it, and the next "
            "start makes it again"
        )


def _check_complete(run: Storage, commit: Commit) -> None:
    """Raise DamagedCheckpoint unless a checkpoint has all its files in their full size."""
    where = f"checkpoint {commit.directory} of {run.uri}"
    if STATE_FILE not in commit.files or not any(name.startswith(MODEL_PART) for name in commit.files):
        raise DamagedCheckpoint(f"{where} has a record without its files")
    sizes = {info.key.rsplit("/", 1)[-1]: info.size for info in run.list(f"{commit.directory}/")}
    for name, record in commit.files.items():
        if name not in sizes:
            raise DamagedCheckpoint(f"{where} has no {name}")
        if sizes[name] != record.size:
            raise DamagedCheckpoint(f"{where}: {name} has {sizes[name]} bytes instead of {record.size}")


def _uploaded_name(rank: int, world_size: int) -> str:
    return f"uploaded-{rank + 1:05d}-of-{world_size:05d}.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- The run's record -----------------------------------------------------------------------------------------------


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
