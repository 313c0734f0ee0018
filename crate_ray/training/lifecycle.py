"""The lifecycle of a training run on Ray, shared by all jobs: lease, open, track, start Ray, train, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from crate_ray.config import FinetuneConfig, PretrainConfig
from crate_ray.ray_cluster import start_ray
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import Run, driver_lease
from crate_ray.runs.starts import FOLDER, record_start
from crate_ray.tracking.pretraining import is_published, track
from crate_ray.tracking.run_tracker import RunTracker
from crate_ray.training.display import ProgressDisplay
from crate_ray.training.ray.driver import train_on_ray
from crate_ray.training.ray.measuring import Measure
from crate_ray.training.task import Task

_ConfigT = TypeVar("_ConfigT", PretrainConfig, FinetuneConfig)
_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True)
class Finished(Generic[_ResultT]):
    """A run that has been trained to its last step."""

    run: Run
    """The run as it was opened."""
    result: _ResultT | None
    """The result of `finish`; None if the run was already complete."""
    mlflow_run: str
    """Id and address of the run in MLflow; empty if the run was already complete."""


def run_training(
    config: _ConfigT,
    task_class: type[Task],
    open_run: Callable[[_ConfigT], Run],
    finish: Callable[[Run, RunTracker], _ResultT],
    *,
    listeners: Sequence[Listener] = (),
    tags: Mapping[str, str] | None = None,
    show_progress: bool = True,
    must_record: bool = True,
    measure: Measure | None = None,
) -> Finished[_ResultT]:
    """Start or resume a run and train it to its last step. Does nothing if it is finished and its model is published.

    Only one driver at a time works on a run. It holds the run's lease from before the run is opened until tracking has
    ended.

    Args:
        config: settings of the run.
        task_class: what the workers train.
        open_run: opens the run; called with the lease held.
        finish: called after the last step, while the run is still tracked; usually tracking.pretraining.publish.
        listeners: receive the run's events, in addition to MLflow and the progress display.
        tags: additional MLflow tags.
        show_progress: show a progress display on the terminal.
        must_record: stop a new run that MLflow cannot record. false: go on, because MLflow was checked before.
        measure: measures checkpoints of a pretraining run that has a `probe`; evaluation.online.measure_checkpoint.

    Raises:
        UserError: the settings, the data or the model are unusable, or another driver works on the run.
        LeaseLost: another driver has taken over the run.
    """
    with driver_lease(config) as lease:
        run = open_run(config)
        if run.is_finished and is_published(run):
            return Finished(run, None, "")
        with track(run, lease, tags, must_record=must_record) as tracker:
            if not run.is_finished:
                start_ray()
                with ExitStack() as stack:
                    following: list[Listener] = [tracker]
                    if show_progress:
                        following.append(stack.enter_context(ProgressDisplay(run.first_step, run.total_steps)))
                    _record_start(run, tracker, following)
                    train_on_ray(run, lease, task_class, [*following, *listeners], measure)
            result = finish(run, tracker)
    return Finished(run, result, tracker.where)


def _record_start(run: Run, tracker: RunTracker, listeners: Sequence[Listener]) -> None:
    """Record the settings of this start in the run's folder and in MLflow, and say what has changed."""
    start = record_start(run)
    tracker.text(start.name, start.model_dump_json(indent=2), FOLDER)
    if start.changed:
        tracker.tag(f"crate_ray.changed.{start.number:03d}", f"from step {start.step}: {start.changes}")
        for listener in listeners:
            listener.note(start.step, f"other settings than at the start before: {start.changes}")
