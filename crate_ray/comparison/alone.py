"""Train the runs of a comparison with torch alone: one machine, no Ray, no MLflow, a new process for each run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from crate_ray.comparison.follower import Follower, follower_of
from crate_ray.comparison.table import PretrainFigures
from crate_ray.config import CompareConfig, FinetuneConfig, PretrainConfig
from crate_ray.errors import UserError
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription, export_model, load_exported
from crate_ray.runs.export import describe
from crate_ray.runs.planning import Run, driver_lease
from crate_ray.runs.pretraining import open_pretraining
from crate_ray.storage.interface import open_storage
from crate_ray.storage.local import LocalStorage
from crate_ray.training.bare_loop import train_stored
from crate_ray.training.display import ProgressDisplay
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.signals import Stopped, stop_signals
from crate_ray.training.task import Task

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25

_ConfigT = TypeVar("_ConfigT", PretrainConfig, FinetuneConfig)
_FoundT = TypeVar("_FoundT")


class Alone:
    """A compare.Trainer without Ray. Interrupted runs resume. Finished runs are not repeated."""

    def __init__(self, config: CompareConfig) -> None:
        if not isinstance(open_storage(config.storage, config.s3), LocalStorage):
            raise UserError(f"launcher 'none' needs a local folder as storage, not {config.storage}")
        self._config = config
        self.features = InProcess()

    def pretrain(self, config: PretrainConfig) -> PretrainFigures:
        """Train the remaining steps in a new process, so that the measured memory is that of this run only."""
        return _in_fresh_process(_pretrain, config, follower_of(self._config, config.name))

    def load(self, config: PretrainConfig) -> tuple[MaskedAutoencoder, ModelDescription]:
        """Load the model from the run's folder."""
        return load_exported(_model_folder(config))

    def finetune(self, config: FinetuneConfig) -> float:
        """Train the remaining steps in a new process."""
        return _in_fresh_process(_finetune, config, follower_of(self._config, config.name))


def _in_fresh_process(work: Callable[..., _FoundT], *arguments: Any) -> _FoundT:
    """Result of a function in a new process. Raises Stopped after SIGTERM or Ctrl-C, of which that process is told."""
    context = multiprocessing.get_context("spawn")
    with stop_signals() as request:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_obey_parent) as process:
            result = process.submit(work, *arguments)
            try:
                while not wait([result], _POLL_SECONDS).done and not request.signal:
                    pass
                if request.signal:
                    logger.warning("stopping: a checkpoint is saved first (Ctrl-C again stops at once)")
                    for child in multiprocessing.active_children():
                        child.terminate()
                error = result.exception()
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    child.kill()
                raise
        if request.signal and (error is None or isinstance(error, Stopped | BrokenProcessPool)):
            raise Stopped(request.signal, error.step if isinstance(error, Stopped) else 0)
        return result.result()


def _obey_parent() -> None:
    """Leave Ctrl-C to the parent, and end this process when its parent is killed.

    Nobody would get the result, and the next start resumes the run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _model_folder(config: PretrainConfig) -> Path:
    return Path(config.storage) / config.name / "model"


def _pretrain(config: PretrainConfig, follower: Follower) -> PretrainFigures:
    run, weights = _train(PretrainTask, open_pretraining, config, follower)
    export_model(_model_folder(config), weights, describe(run.record, run.total_steps))
    return follower.figures(run)


def _finetune(config: FinetuneConfig, follower: Follower) -> float:
    run, _ = _train(FinetuneTask, open_finetuning, config, follower)
    return follower.final("top1", run)


def _train(
    task_class: type[Task], open_run: Callable[[_ConfigT], Run], config: _ConfigT, follower: Follower
) -> tuple[Run, dict[str, Tensor]]:
    """Train the remaining steps of a run. Returns the run and the model's weights."""
    with driver_lease(config) as lease:
        run = open_run(config)
        with ProgressDisplay(run.first_step, run.total_steps) as display:
            weights = train_stored(task_class, run, lease, listeners=[display, follower]).weights
        lease.check()
        return run, weights
