"""Checkpoints on a worker: restores the state that training starts from, and saves checkpoints while it trains."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from crate_ray.config import CheckpointConfig
from crate_ray.errors import UserError
from crate_ray.runs.checkpoint_files import (
    STATE_FILE,
    CheckpointState,
    check_arithmetic,
    checkpoint_tensors,
    own_part,
    restore_checkpoint,
    restore_weights,
    write_part,
)
from crate_ray.runs.commits import Commit, commit_checkpoint, fetch_checkpoint, fetch_newest, upload_part
from crate_ray.runs.initial_weights import fetch_initial_weights
from crate_ray.runs.record import RunRecord
from crate_ray.runs.retention import delete_old_checkpoints, delete_unfinished
from crate_ray.storage.interface import Storage
from crate_ray.training.staging import HostCopies
from crate_ray.training.task import Assembled

logger = logging.getLogger(__name__)

_RETRY_SECONDS = (1.0, 5.0, 25.0)  # pauses between retries of an upload, in addition to the storage's own retries
_UPLOAD_TIMEOUT = 3600.0


class UploadFailed(OSError):  # noqa: N818 - named for what happened
    """A checkpoint could not be saved, even after retries."""


class SaveEvents(Protocol):
    """Receives the events of a save in the background. All calls come from another thread."""

    def flush(self) -> None:
        """Wait until all reports of this rank have arrived. Called before the rank's part counts as uploaded."""

    def wait_until_recorded(self) -> None:
        """Wait until the reports of all ranks are recorded. Called on rank 0 before the checkpoint is committed.

        A run that resumes from this checkpoint does not send these reports again.
        """

    def checkpoint(self, step: int, seconds: float) -> None:
        """Report how long the save took in the background. Called on rank 0 after the commit."""


@dataclass(frozen=True)
class Peers:
    """This worker among the workers of a run."""

    group: str
    """Unique id of the workers that were started together."""
    rank: int
    world_size: int
    is_first_of_node: bool
    scratch: Path
    """Local folder of this worker."""
    node_scratch: Path
    """Local folder of the first worker on this node."""
    barrier: Callable[[], None]
    broadcast: Callable[[Any], Any]
    """Returns rank 0's argument on every rank. A collective call."""


class WorkerCheckpoints:
    """Checkpoints of one worker. All workers make the same calls; `restore` and `save` are collective.

    A worker holds its part of at most one checkpoint, once in memory and once on its local disk.

    Args:
        run: the run's folder.
        attempt: folder in it for the checkpoints of this start of the driver.
        record: the run's record.
        config: which checkpoints to keep.
        peers: this worker among the others.
        events: receives the events of a save.
        device: the device that trains.
    """

    def __init__(
        self,
        run: Storage,
        attempt: str,
        record: RunRecord,
        config: CheckpointConfig,
        peers: Peers,
        events: SaveEvents,
        device: torch.device,
    ) -> None:
        self._run, self._attempt, self._record, self._config = run, attempt, record, config
        self._peers, self._events = peers, events
        self._copies = HostCopies(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None

    def restore(self, assembled: Assembled) -> int:
        """Load the newest valid checkpoint, else the run's initial weights, if any. Returns the step to start at.

        Raises UserError if the workers compute differently from the checkpoint (see checkpoint_files.check_arithmetic).
        """
        model = assembled.task.model
        commit = self._newest_commit()
        if commit is None and self._record.initial_weights is None:
            return 0
        with self._fetched(commit) as folder:
            if commit is None:
                restore_weights(folder, model)
                return 0
            state = restore_checkpoint(folder, model, assembled.optimizer)
        check_arithmetic(state, assembled.arithmetic, self._peers.world_size, next(model.parameters()).device)
        return state.step

    def save(self, step: int, assembled: Assembled, validation_loss: float | None = None) -> None:
        """Copy the state and return. The copy is written, uploaded and committed in the background.

        Waits for the previous save. Raises UploadFailed if that save has failed.
        """
        self._wait()
        tensors = checkpoint_tensors(assembled.task.model, assembled.optimizer)
        part = self._copies.copy(own_part(tensors, self._peers.rank, self._peers.world_size))
        state = CheckpointState(
            step=step,
            run=self._record,
            world_size=self._peers.world_size,
            torch_version=torch.__version__,
            arithmetic=assembled.arithmetic,
        )
        self._upload = self._thread.submit(self._upload_and_commit, part, state, validation_loss)

    def raise_failure(self) -> None:
        """Raise UploadFailed if the save in the background has failed."""
        if self._upload is not None and self._upload.done():
            self._wait()

    def finish(self) -> None:
        """Wait until everything is uploaded. Raises UploadFailed if the upload has failed."""
        self._wait()
        self._thread.shutdown()
        self._copies.close()

    def _newest_commit(self) -> Commit | None:
        """The newest valid checkpoint. Rank 0 finds and fetches it, and broadcasts it to all ranks."""
        commit = None
        if self._peers.rank == 0:
            delete_unfinished(self._run)
            commit = fetch_newest(self._run, self._peers.node_scratch / "restore")
        chosen = self._peers.broadcast(commit.model_dump() if commit else None)
        return None if chosen is None else Commit.model_validate(chosen)

    @contextmanager
    def _fetched(self, commit: Commit | None) -> Iterator[Path]:
        """Fetch a checkpoint's files, or those of the initial weights, to a temporary local folder, once per node."""
        peers, folder = self._peers, self._peers.node_scratch / "restore"
        if commit is None:
            if peers.is_first_of_node:
                fetch_initial_weights(self._run, self._record.initial_weights or "", folder)
        elif peers.is_first_of_node and peers.rank != 0:  # rank 0 has fetched it
            folder.mkdir()
            fetch_checkpoint(self._run, commit, folder)
        peers.barrier()
        yield folder
        peers.barrier()
        if peers.is_first_of_node:
            shutil.rmtree(folder)

    def _wait(self) -> None:
        if self._upload is None:
            return
        try:
            self._upload.result(_UPLOAD_TIMEOUT)
        except TimeoutError:
            if self._upload.done():  # the upload itself raised this error
                raise
            raise TimeoutError(
                f"the upload of a checkpoint to {self._run.uri} takes more than {_UPLOAD_TIMEOUT:.0f} s"
            ) from None

    def _upload_and_commit(
        self, part: dict[str, Tensor], state: CheckpointState, validation_loss: float | None
    ) -> None:
        began, rank = time.perf_counter(), self._peers.rank
        name = f"step-{state.step:08d}-{self._peers.group}"  # unique, because a group saves a step only once
        directory, local = f"{self._attempt}/{name}", self._peers.scratch / name
        try:
            self._events.flush()
            _retry(lambda: self._upload_part(directory, local, part, state), directory)
            if rank == 0:
                _retry(lambda: self._commit(directory, state.step, validation_loss), directory)
                self._events.checkpoint(state.step, time.perf_counter() - began)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _upload_part(self, directory: str, local: Path, part: dict[str, Tensor], state: CheckpointState) -> None:
        rank, world_size = self._peers.rank, self._peers.world_size
        shutil.rmtree(local, ignore_errors=True)
        write_part(local, part, rank, world_size)
        if rank == 0:
            (local / STATE_FILE).write_text(state.model_dump_json(indent=2))
        upload_part(self._run, directory, local, rank, world_size)

    def _commit(self, directory: str, step: int, validation_loss: float | None) -> None:
        commit_checkpoint(
            self._run,
            directory,
            step,
            self._peers.world_size,
            validation_loss=validation_loss,
            before=self._events.wait_until_recorded,
        )
        try:
            delete_old_checkpoints(self._run, self._config)
        except UserError as error:  # the next save tries again
            logger.warning("old checkpoints are not deleted yet: %s", error)


def _retry(action: Callable[[], None], directory: str) -> None:
    """Call a function, and retry a few times if it fails, for example while a disk is full or storage is unavailable.

    Raises UploadFailed after the last retry, and TimeoutError at once.
    """
    for pause in (*_RETRY_SECONDS, None):
        try:
            return action()
        except TimeoutError:
            raise
        except (OSError, UserError) as error:
            if pause is None:
                raise UploadFailed(f"checkpoint {directory} cannot be saved: {error}") from error
            logger.warning("checkpoint %s: %s; trying again in %.0f s", directory, error, pause)
            time.sleep(pause)
    return None
