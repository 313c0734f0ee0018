"""A worker's side of its run's checkpoints: where it starts from, and what it saves while it trains."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import barrier, broadcast_from_rank_zero
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

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

logger = logging.getLogger(__name__)

_PAUSES = (1.0, 5.0, 25.0)  # seconds before each repetition of an upload, after the storage's own
_UPLOAD_TIMEOUT = 3600.0


class UploadFailed(OSError):  # noqa: N818 - named for what happened
    """A checkpoint could not be saved, however often that was tried."""


class WorkerCheckpoints:
    """Checkpoints of one worker. All workers make the same calls; restore and save are collective.

    At any time a worker holds one checkpoint's part in memory, and once more on its local disk.

    Args:
        run: the run's folder.
        attempt: folder under it for the checkpoints of this start of the driver.
        record: the run's record.
        arithmetic: how the workers compute; see task.Assembled.
        config: what to keep.
        spaces: local folder of this worker, and that of the first worker on its node.
        sent: called from another thread before a rank's part counts as uploaded; returns when the driver's mailbox has
            all that this rank told.
        recorded: called on rank 0, from another thread, when all parts are uploaded, before the checkpoint is
            committed; returns when what was told up to it is safe, as a run that goes on from there does not tell it
            again.
        told: hears, on rank 0 and from another thread, how long the background part of a save took: step and seconds.
    """

    def __init__(
        self,
        run: Storage,
        attempt: str,
        record: RunRecord,
        arithmetic: tuple[str, ...],
        config: CheckpointConfig,
        spaces: tuple[Path, Path],
        sent: Callable[[], None],
        recorded: Callable[[], None],
        told: Callable[[int, float], None],
    ) -> None:
        self._run, self._attempt, self._record, self._config = run, attempt, record, config
        self._sent, self._recorded, self._told = sent, recorded, told
        self._arithmetic = arithmetic
        self._space, self._node_space = spaces
        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._is_first_of_node = context.get_local_rank() == 0
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._idle = threading.Event()  # no upload is under way
        self._idle.set()
        self._failure: Exception | None = None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest valid checkpoint, else the weights that the run is to start from, if any; returns its step.

        Rank 0 decides which one is valid; one worker of each node fetches the files for all of them. Raises UserError
        where the workers compute otherwise than it was computed (see checkpoint_files.check_arithmetic).
        """
        folder = self._node_space / "restore"
        commit = None
        if self._rank == 0:
            delete_unfinished(self._run)
            commit = fetch_newest(self._run, folder)
        chosen = broadcast_from_rank_zero(commit.model_dump() if commit else None)
        if chosen is None and self._record.initial_weights is None:
            return 0
        if self._is_first_of_node and chosen is None:
            fetch_initial_weights(self._run, self._record.initial_weights or "", folder)
        elif self._is_first_of_node and self._rank != 0:
            folder.mkdir()
            fetch_checkpoint(self._run, Commit.model_validate(chosen), folder)
        barrier()
        step = 0
        if chosen is None:
            restore_weights(folder, model)
        else:
            state = restore_checkpoint(folder, model, optimizer)
            device = next(model.parameters()).device
            check_arithmetic(state, self._arithmetic, self._world_size, device)
            step = state.step
        barrier()
        if self._is_first_of_node:
            shutil.rmtree(folder)
        return step

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, validation_loss: float | None = None
    ) -> None:
        """Copy the state, go on, and write, upload and commit the copy in the background.

        Waits for the save before, if that is not finished yet. Raises UploadFailed when that one has failed; Ray Train
        raises the same in the worker's main thread as soon as it notices.
        """
        self._wait()
        self._idle.clear()
        part = self._stager.stage(own_part(checkpoint_tensors(model, optimizer), self._rank, self._world_size))
        assert isinstance(part, dict)
        state = CheckpointState(
            step=step,
            run=self._record,
            world_size=self._world_size,
            torch_version=torch.__version__,
            arithmetic=self._arithmetic,
        )

        def upload(_: Checkpoint, name: str) -> Checkpoint:
            began = time.perf_counter()
            directory, local = f"{self._attempt}/{name}", self._space / name

            def upload_own() -> None:
                shutil.rmtree(local, ignore_errors=True)
                write_part(local, part, self._rank, self._world_size)
                if self._rank == 0:
                    (local / STATE_FILE).write_text(state.model_dump_json(indent=2))
                upload_part(self._run, directory, local, self._rank, self._world_size)

            try:
                self._sent()
                _repeat(upload_own, directory)
                if self._rank == 0:
                    _repeat(lambda: self._commit(directory, step, validation_loss), directory)
                    self._told(step, time.perf_counter() - began)
            except Exception as error:
                self._failure = error
                raise
            finally:
                shutil.rmtree(local, ignore_errors=True)
                self._idle.set()
            storage = ray.train.get_context().get_storage()
            return Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(self._space.as_posix()),
            checkpoint_dir_name=f"step-{step:08d}-{uuid.uuid4().hex[:8]}",  # rank 0's is taken
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
        )

    def finish(self) -> None:
        """Wait until everything is uploaded. Raises UploadFailed when it has failed."""
        self._wait()
        self._stager.close()

    def _wait(self) -> None:
        if not self._idle.wait(_UPLOAD_TIMEOUT):
            raise TimeoutError(f"the upload of a checkpoint to {self._run.uri} takes more than {_UPLOAD_TIMEOUT:.0f} s")
        if self._failure is not None:
            raise self._failure

    def _commit(self, directory: str, step: int, validation_loss: float | None) -> None:
        commit_checkpoint(
            self._run, directory, step, self._world_size, validation_loss=validation_loss, before=self._recorded
        )
        try:
            delete_old_checkpoints(self._run, self._config)
        except UserError as error:  # the next save tries again
            logger.warning("old checkpoints are not deleted yet: %s", error)


def _repeat(action: Callable[[], None], directory: str) -> None:
    """Do what may fail because a disk is full or the storage is away, and some more times if it does."""
    for pause in (*_PAUSES, None):
        try:
            return action()
        except (OSError, UserError) as error:
            if isinstance(error, TimeoutError):
                raise
            if pause is None:
                raise UploadFailed(f"checkpoint {directory} cannot be saved: {error}") from error
            logger.warning("checkpoint %s: %s; trying again in %.0f s", directory, error, pause)
            time.sleep(pause)
    return None
