"""Checkpoints in a run's storage. A checkpoint is valid once its commit record exists, which is written last.

    <run>/attempt-001/step-00000500-<id>/       files of checkpoint_files.py, and for each worker, written after its
                                                files: uploaded-00001-of-00002.json, the record of them
    <run>/commits/step-00000500-<id>.json       the commit record: folder, size and digest of every file

A folder without a commit record is not a valid checkpoint, even if it looks complete.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import FiniteFloat, StringConstraints, ValidationError
from torch import Tensor

from crate_ray.config import Record, Settings
from crate_ray.config.identifiers import Count, FileName, Sha256
from crate_ray.errors import UserError, invalid_value
from crate_ray.runs.checkpoint_files import (
    MODEL_PART,
    OPTIMIZER_PART,
    STATE_FILE,
    CheckpointState,
    read_state,
    read_tensors,
)
from crate_ray.runs.quality import Quality, ranking, read_qualities
from crate_ray.storage.interface import NotFound, Storage, TooLarge
from crate_ray.storage.node_folders import file_digest

logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = r"attempt-[0-9]+/step-[0-9]+[0-9A-Za-z_.-]*"
"""Form of a checkpoint's folder in its run."""

_COMMITS = "commits/"

_ATTEMPT = re.compile(r"attempt-([0-9]{1,9})/")

BEST: Literal["best"] = "best"
Which = int | str | None
"""Which checkpoint of a run: None for the newest, a step, BEST for the best (see `best_first`), or its folder."""


class DamagedCheckpoint(UserError):  # noqa: N818 - named for what it reports
    """A file of a committed checkpoint is missing or differs from its digest."""


class FileRecord(Settings):
    """Expected size and digest of a file."""

    size: Count
    """Bytes."""
    sha256: Sha256
    """SHA-256 of its content."""


class Commit(Record):
    """The record that makes a checkpoint valid."""

    step: Count
    """Optimizer steps done."""
    directory: Annotated[str, StringConstraints(pattern=f"^{CHECKPOINT_FOLDER}$")]
    """Folder of the checkpoint, relative to the run."""
    files: dict[FileName, FileRecord]
    """Its files by name."""
    time: FiniteFloat
    """Time of the commit in seconds since 1970."""
    validation_loss: float | None = None
    """Validation loss at its step, if it was measured."""


class _Uploaded(Settings):
    """Record of one worker's uploaded files. Written after the files themselves."""

    files: dict[FileName, FileRecord]


# --- Write ----------------------------------------------------------------------------------------------------------


def upload_part(run: Storage, directory: str, folder: Path, rank: int, world_size: int) -> None:
    """Upload a worker's files to `directory` in the run's storage, then a record of them."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = FileRecord(size=path.stat().st_size, sha256=file_digest(path))
        run.write(f"{directory}/{path.name}", path)
    record = _Uploaded(files=files).model_dump_json(indent=2).encode()
    run.write(f"{directory}/{_uploaded_name(rank, world_size)}", record)


def new_attempt(storage: Storage) -> str:
    """A new folder for this start's checkpoints. Commit records, not folders, say which checkpoint is the newest."""
    earlier = [int(match[1]) for i in storage.list("attempt-") if (match := _ATTEMPT.match(i.key))]
    return f"attempt-{max(earlier, default=0) + 1:03d}"


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
    """Wait until all workers have uploaded their parts, call `before`, then write the commit record.

    Raises:
        TimeoutError: a worker did not upload its part within the timeout, in seconds.
    """
    files: dict[str, FileRecord] = {}
    deadline = time.monotonic() + timeout
    for rank in range(world_size):
        files |= _wait_for_upload(run, directory, rank, world_size, deadline, timeout).files
    before()
    commit = Commit(step=step, directory=directory, files=files, time=time.time(), validation_loss=validation_loss)
    run.write(record_name(commit), commit.model_dump_json(indent=2).encode())
    return commit


def record_name(commit: Commit) -> str:
    """Name of a commit record, relative to the run."""
    return f"{_COMMITS}{commit.directory.rsplit('/', 1)[-1]}.json"


def _wait_for_upload(
    run: Storage, directory: str, rank: int, world_size: int, deadline: float, timeout: float
) -> _Uploaded:
    pause = 0.05
    while True:
        try:
            return _Uploaded.model_validate_json(run.read_small(f"{directory}/{_uploaded_name(rank, world_size)}"))
        except NotFound:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"worker {rank} did not upload its part of checkpoint {directory} within {timeout:.0f} s"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


# --- Find -----------------------------------------------------------------------------------------------------------


def committed(run: Storage) -> list[Commit]:
    """The commit records of a run, newest first."""
    found = []
    for info in run.list(_COMMITS):
        try:
            commit = Commit.model_validate_json(run.read_small(info.key))
        except (ValidationError, NotFound, TooLarge) as error:
            cause = invalid_value(error) if isinstance(error, ValidationError) else error
            logger.warning("skipping %s/%s, which is not a readable commit record: %s", run.uri, info.key, cause)
            continue
        if info.key != record_name(commit):  # or deleting this record would delete another one
            logger.warning("skipping %s/%s, the commit record of %s", run.uri, info.key, commit.directory)
            continue
        found.append(commit)
    return sorted(found, key=lambda c: (c.step, c.directory), reverse=True)


def best_first(commits: Sequence[Commit], qualities: Mapping[int, Quality]) -> list[Commit]:
    """The rated checkpoints, the best first: by the accuracy that the run compares, else by validation loss.

    If two are equal, the later step comes first.
    """
    if (steps := ranking(qualities)) is not None:
        return sorted((c for c in commits if c.step in steps), key=lambda c: steps.index(c.step))
    rated = [c for c in commits if c.validation_loss is not None and not math.isnan(c.validation_loss)]
    return sorted(rated, key=lambda c: (c.validation_loss, -c.step))


def newest_complete(run: Storage) -> Commit | None:
    """The newest checkpoint whose files all exist with their full size. Their content is not read."""
    for commit in committed(run):
        try:
            _check_complete(run, commit)
        except DamagedCheckpoint as error:
            logger.warning("%s; trying an older one", error)
            continue
        return commit
    return None


# --- Read -----------------------------------------------------------------------------------------------------------


def fetch_checkpoint(run: Storage, commit: Commit, folder: Path, part: Literal["all", "model"] = "all") -> None:
    """Copy a committed checkpoint, or only its state and weights, into an empty local folder.

    Raises:
        NotFound, DamagedCheckpoint: a file is missing or differs from its record.
    """
    _check_complete(run, commit)
    for name, record in commit.files.items():
        if part == "model" and name.startswith(OPTIMIZER_PART):
            continue
        run.download(f"{commit.directory}/{name}", folder / name)
        if file_digest(folder / name) != record.sha256:
            raise DamagedCheckpoint(f"checkpoint {commit.directory} of {run.uri}: {name} differs from its digest")


def fetch_newest(
    run: Storage, folder: Path, part: Literal["all", "model"] = "all", step: int | None = None
) -> Commit | None:
    """Copy the newest valid checkpoint, or the one of a step, into a local folder. Returns None if there is none.

    Damaged checkpoints are skipped with a warning.
    """
    return _fetch_first(run, _select(committed(run), step), folder, part)


def load_weights(run: Storage, which: Which = None) -> tuple[CheckpointState, dict[str, Tensor]]:
    """Load state and weights of a checkpoint of a run (see Which), on the CPU.

    Damaged checkpoints are skipped with a warning: the next one in line is loaded.

    Raises:
        UserError: the run has no such checkpoint.
    """
    commits = committed(run)
    qualities = read_qualities(run) if which == BEST else {}
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        folder = Path(temporary) / "checkpoint"
        if _fetch_first(run, _select(commits, which, qualities), folder, "model"):
            return read_state(folder), read_tensors(folder)
    steps = ", ".join(str(commit.step) for commit in reversed(commits)) or "none"
    if which is None:
        raise UserError(f"{run.uri} holds no checkpoint; give the folder of a run that has written one")
    if which == BEST:
        raise UserError(
            f"{run.uri} holds no valid checkpoint with a validation loss or accuracy, so none is the best; give a step "
            f"instead (it has {steps}), or train with --data.validation"
        )
    name = f"of step {which}" if isinstance(which, int) else which
    raise UserError(f"{run.uri} holds no valid checkpoint {name}; it has those of the steps {steps}")


def _select(
    commits: Sequence[Commit], which: Which, qualities: Mapping[int, Quality] = MappingProxyType({})
) -> list[Commit]:
    """Select from commits (newest first) those to try, in order."""
    if which is None:
        return list(commits)
    if which == BEST:
        return best_first(commits, qualities)
    return [commit for commit in commits if which in (commit.step, commit.directory)]


def _fetch_first(run: Storage, commits: Iterable[Commit], folder: Path, part: Literal["all", "model"]) -> Commit | None:
    """Copy the first valid checkpoint of several into a local folder."""
    for commit in commits:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fetch_checkpoint(run, commit, folder, part)
        except (NotFound, DamagedCheckpoint) as error:  # other errors, such as an unreachable storage, are raised
            logger.warning("%s; trying another one", error)
            shutil.rmtree(folder)
            continue
        return commit
    return None


def _check_complete(run: Storage, commit: Commit) -> None:
    """Raise DamagedCheckpoint unless all files of a checkpoint exist with their full size."""
    where = f"checkpoint {commit.directory} of {run.uri}"
    if STATE_FILE not in commit.files or not any(name.startswith(MODEL_PART) for name in commit.files):
        raise DamagedCheckpoint(f"{where} has a commit record that lists no files")
    sizes = {info.key.rsplit("/", 1)[-1]: info.size for info in run.list(f"{commit.directory}/")}
    for name, record in commit.files.items():
        if name not in sizes:
            raise DamagedCheckpoint(f"{where} has no {name}")
        if sizes[name] != record.size:
            raise DamagedCheckpoint(f"{where}: {name} has {sizes[name]} bytes instead of {record.size}")


def _uploaded_name(rank: int, world_size: int) -> str:
    return f"uploaded-{rank + 1:05d}-of-{world_size:05d}.json"
