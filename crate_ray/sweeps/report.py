"""Reports of a sweep: what is shown while it runs, the files in its folder, and the artifacts of its MLflow run.

<sweep>/results.csv             a row for each trial
<sweep>/best.yaml               settings of the best trial, for crate-ray pretrain
<sweep>/summary.md              what the sweep found, in words
<sweep>/figures/….png           slices, parallel coordinates, importance, learning curves, trade-offs
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd

from crate_ray.config import SweepConfig
from crate_ray.errors import UserError
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import Storage
from crate_ray.sweeps import figures
from crate_ray.sweeps.axes import setting_axes
from crate_ray.sweeps.best import best_yaml
from crate_ray.sweeps.display import SweepDisplay
from crate_ray.sweeps.importance import importances
from crate_ray.sweeps.results import best_trial, comparable, ended, latest, without_outliers
from crate_ray.sweeps.space import trial_config, why_invalid
from crate_ray.sweeps.summary import Summary, summarise
from crate_ray.sweeps.trial import RecordReader, TrialRecord
from crate_ray.tracking.run_tracker import RunTracker

logger = logging.getLogger(__name__)

RESULTS_FILE, BEST_FILE, SUMMARY_FILE, FIGURES = "results.csv", "best.yaml", "summary.md", "figures"
_POLL_SECONDS = 2.0
_REST = 20.0
"""Figures and importances are made again after this many times the time that they took last."""
_DESCRIPTION_TAG = "mlflow.note.content"  # MLflow shows it at the top of the run's page, as Markdown


class SweepReport:
    """Keeps the reports of a sweep up to date.

    Args:
        sweep: the sweep.
        shared: the YAML values that its trials share.
        folder: the sweep's folder.
        tracker: the sweep's run in MLflow.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        shared: dict[str, Any],
        folder: Storage,
        tracker: RunTracker,
    ) -> None:
        self._sweep, self._shared, self._folder, self._tracker = sweep, shared, folder, tracker
        self._records = RecordReader(folder)
        self._written: dict[str, bytes] = {}
        self._best: str | None = None
        self._ended = 0
        self._figures_of, self._rested_at = 0, 0.0
        self._totals: dict[str, int] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the records in a thread: show them, and update the reports when a trial has ended."""
        over = threading.Event()
        with SweepDisplay(self._sweep, self._total_steps) as display:
            records = self._records.read()  # what an earlier start has left
            display.update(records)
            self._ended = len(ended(records))
            thread = threading.Thread(target=self._follow, args=(display, over), name="sweep report", daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()

    def update(self, records: Sequence[TrialRecord]) -> None:
        """Update the reports after a trial has ended. Figures may wait, so that they take little of the time.

        Raises:
            UserError: as best.best_yaml, or the folder cannot be written.
        """
        self._update_results(records)
        now = time.monotonic()
        if len(ended(records)) != self._figures_of and now >= self._rested_at:
            self._figures_of = len(ended(records))
            self._update_findings(records)
            self._rested_at = time.monotonic() + _REST * (time.monotonic() - now)

    def finish(self, records: Sequence[TrialRecord]) -> Summary:
        """Write the final reports. Returns the summary.

        Raises:
            UserError: as `update`.
        """
        summary = self._update_findings(records)
        self._update_results(records)
        return summary

    def _follow(self, display: SweepDisplay, over: threading.Event) -> None:
        problem, is_over = "", False
        while not is_over:
            is_over = over.wait(_POLL_SECONDS)
            try:
                records = self._records.read()
                display.update(records)
                if ended(records) and not is_over:
                    self.update(records)
            except Exception as error:  # the sweep goes on; at its end, `finish` raises the error
                if str(error) != problem:
                    problem = str(error)
                    logger.warning("the report of the sweep is not up to date: %s", error)

    def _update_results(self, records: Sequence[TrialRecord]) -> None:
        count, best = len(ended(records)), best_trial(records, self._sweep)
        self._write(RESULTS_FILE, results_table(records, self._sweep).to_csv(index=False).encode())
        if best is None or best.objective is None:
            return
        if best.trial != self._best:
            self._write(BEST_FILE, best_yaml(self._sweep, self._shared, best).encode())
            self._best = best.trial
        if count != self._ended:
            self._ended = count
            self._tracker.metrics(count, {f"best_{self._sweep.objective}": best.objective}, int(time.time() * 1000))

    def _update_findings(self, records: Sequence[TrialRecord]) -> Summary:
        """Figures, importances and the summary."""
        sweep, compared = self._sweep, comparable(records, self._sweep)
        axes = setting_axes(sweep, records)
        pictures = {"learning-curves": figures.curves(records, sweep), "trade-offs": figures.trade_offs(records, sweep)}
        settings = [trial.values for trial in compared.trials]
        found = importances(axes, settings, without_outliers(compared.values, sweep))
        if (shown := latest(records)).trials:
            pictures["slices"] = figures.slices(shown, axes, sweep)
            pictures["parallel-coordinates"] = figures.parallel_coordinates(shown, axes, sweep)
        if found:
            pictures["importance"] = figures.importance(found)
        for name, picture in pictures.items():
            if picture is not None:
                self._write(f"{FIGURES}/{name}.png", picture)
        summary = summarise(records, sweep, axes, found, self._total_steps, self._is_valid)
        text = summary.markdown()
        self._write(SUMMARY_FILE, text.encode())
        self._tracker.tag(_DESCRIPTION_TAG, text)
        return summary

    def _write(self, path: str, content: bytes) -> None:
        """Write a file to the sweep's folder and to MLflow, if it has changed."""
        if self._written.get(path) != content:
            self._folder.write(path, content)
            self._tracker.file(path, content)
            self._written[path] = content

    def _total_steps(self, record: TrialRecord) -> int:
        """Steps of a trial in full; those that it has done if its settings cannot be used any more."""
        if record.trial not in self._totals:
            try:
                run = open_run(trial_config(self._sweep, self._shared, record.values, "check"))
                self._totals[record.trial] = run.total_steps
            except UserError:
                return record.step
        return self._totals[record.trial]

    def _is_valid(self, values: dict[str, Any]) -> bool:
        return not why_invalid(self._sweep, self._shared, values)


def results_table(records: Sequence[TrialRecord], sweep: SweepConfig) -> pd.DataFrame:
    """One row per trial, the best first, then those without an objective."""
    rows = [
        {
            "trial": record.trial,
            "status": record.status,
            sweep.objective: record.objective,
            **({sweep.against: record.objectives.get(sweep.against)} if sweep.against else {}),
            "step": record.step,
            "seconds": round(record.seconds, 1),
            "parameters": record.parameters or None,
            **{name: record.values.get(name) for name in sweep.search},
            "cause": record.cause,
        }
        for record in records
    ]
    return pd.DataFrame(rows).sort_values(
        sweep.objective, ascending=sweep.minimizes, na_position="last", ignore_index=True, kind="stable"
    )
