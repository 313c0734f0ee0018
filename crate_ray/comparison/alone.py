"""Train the runs of a comparison with torch alone: one machine, no Ray, no MLflow, a new process for each run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch

from crate_ray.comparison.table import PretrainFigures, settled_speed
from crate_ray.config import CompareConfig, FinetuneConfig, PretrainConfig
from crate_ray.errors import UserError
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription, export_model, load_exported
from crate_ray.runs.export import describe
from crate_ray.runs.initial_weights import fetch_initial_weights
from crate_ray.runs.metrics import TOP1, VALIDATION_LOSS
from crate_ray.runs.planning import Run
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import open_storage
from crate_ray.storage.local import LocalStorage
from crate_ray.training.bare_loop import Trained, train
from crate_ray.training.display import ProgressDisplay
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.task import Task
from crate_ray.training.telemetry import used_memory

_ConfigT = TypeVar("_ConfigT")
_FoundT = TypeVar("_FoundT")


class Alone:
    """A compare.Trainer without Ray. Interrupted runs start again from step 0. Finished runs are not repeated."""

    def __init__(self, config: CompareConfig) -> None:
        if not isinstance(open_storage(config.storage, config.s3), LocalStorage):
            raise UserError(f"launcher 'none' needs a local folder as storage, not {config.storage}")
        self.features = InProcess()

    def pretrain(self, config: PretrainConfig) -> PretrainFigures:
        """Train in a new process, so that the measured memory is that of this run only."""
        return _in_fresh_process(_pretrain, config)

    def load(self, config: PretrainConfig) -> tuple[MaskedAutoencoder, ModelDescription]:
        """Load the model from the run's folder."""
        return load_exported(_model_folder(config))

    def finetune(self, config: FinetuneConfig) -> float:
        """Train in a new process."""
        return _in_fresh_process(_finetune, config)


def _in_fresh_process(work: Callable[[_ConfigT], _FoundT], config: _ConfigT) -> _FoundT:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as process:
        return process.submit(work, config).result()


def _end_with_parent() -> None:
    """End this process when its parent is killed: nobody would get the result, and the next start trains the run again.

    Otherwise it would end only after its work.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _model_folder(config: PretrainConfig) -> Path:
    return Path(config.storage) / config.name / "model"


def _pretrain(config: PretrainConfig) -> PretrainFigures:
    run = open_run(config)
    done = _train(PretrainTask, run)
    export_model(_model_folder(config), done.weights, describe(run.record, run.total_steps))
    per_interval = config.training.batch_size * config.tracking.log_every
    (memory,) = used_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")).values() or (0.0,)
    return PretrainFigures(
        loss=done.held_out[VALIDATION_LOSS],
        images_per_second=settled_speed([per_interval / seconds for seconds in done.seconds]),
        memory_bytes=memory,
    )


def _finetune(config: FinetuneConfig) -> float:
    return _train(FinetuneTask, open_finetuning(config)).held_out[TOP1]


def _train(task_class: type[Task], run: Run) -> Trained:
    weights = None
    if run.record.initial_weights is not None:
        with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
            fetch_initial_weights(run.storage, run.record.initial_weights, Path(temporary))
            weights = safetensors.torch.load_file(Path(temporary) / "model.safetensors")
    with ProgressDisplay(0, run.total_steps) as display:
        return train(task_class, run.config, run.record, run.total_steps, weights=weights, listeners=[display])
