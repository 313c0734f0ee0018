"""Shows the trials of a sweep while it runs: a live table in a terminal, lines in a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from crate_ray.config import SweepConfig
from crate_ray.progress import error_console
from crate_ray.sweeps.axes import value_text
from crate_ray.sweeps.results import PRUNED, RUNNING, best_trial, ended
from crate_ray.sweeps.trial import TrialRecord
from crate_ray.training.display import duration

_PLAIN_SECONDS = 10.0
_FEWEST_ROWS = 4
_ROWS_AROUND = 8
"""Lines of a terminal that the table leaves for its heading and for other output."""


class SweepDisplay:
    """Shows the trials of a sweep. Use it as a context manager around the sweep.

    Args:
        sweep: the sweep.
        total_steps: steps of a trial in full.
        clock: seconds since some moment.
        output: where to show them; by default standard error.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        total_steps: Callable[[TrialRecord], int],
        clock: Callable[[], float] = time.monotonic,
        output: Console | None = None,
    ) -> None:
        self._sweep, self._total_steps, self._clock = sweep, total_steps, clock
        self._console = output or error_console()
        self._began = self._printed = clock()
        self._steps_before: int | None = None
        self._shown: dict[str, str] = {}
        self._last_line = ""
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, records: Sequence[TrialRecord]) -> None:
        """Show the trials as they are now."""
        if self._steps_before is None:  # of an earlier start of the sweep
            self._steps_before = sum(record.step for record in records)
            self._shown = {record.trial: record.status for record in records if record.status != RUNNING}
        if self._live:
            self._live.update(self._table(records), refresh=True)
        else:
            self._print_changes(records)

    def seconds_left(self, records: Sequence[TrialRecord]) -> float | None:
        """Estimate of the remaining time, from the steps per second so far; None before there is a step.

        Trials that have not started are taken to run as many steps as those that ended.
        """
        done = sum(record.step for record in records) - (self._steps_before or 0)
        seconds = self._clock() - self._began
        if done <= 0 or seconds <= 0:
            return None
        over = [record for record in ended(records) if record.status != "failed"]
        running = [record for record in records if record.status == RUNNING]
        known = over or running
        each = sum(record.step if record in over else self._total_steps(record) for record in known) / len(known)
        to_start = max(self._sweep.trials - len(ended(records)) - len(running), 0)
        steps = to_start * each + sum(max(each - record.step, 0) for record in running)
        left = steps * seconds / done
        if self._sweep.hours is None:
            return left
        used = sum(record.seconds for record in records) / self._sweep.max_concurrent
        return min(left, max(self._sweep.hours * 3600 - used, 0))

    def _table(self, records: Sequence[TrialRecord]) -> Table:
        sweep, best = self._sweep, best_trial(records, self._sweep)
        table = Table(title=f"sweep {sweep.name}: {self._progress(records)}", caption=self._best(records))
        for name, justify in (("trial", "left"), ("status", "left"), ("step", "right"), (sweep.objective, "right")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name in sweep.search:
            table.add_column(name.rpartition(".")[2], justify="right", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        room = max(self._console.height - _ROWS_AROUND, _FEWEST_ROWS)
        shown = _most_important(records, sweep, room)
        for record in shown:
            table.add_row(
                record.trial,
                record.status,
                f"{record.step:,}/{self._total_steps(record):,}" if record.status != PRUNED else "",
                "" if record.objective is None else value_text(record.objective),
                *(value_text(record.values.get(name, "")) for name in sweep.search),
                duration(record.seconds) if record.seconds else "",
                style="bold" if best is not None and record.trial == best.trial else None,
            )
        if len(shown) < len(records):
            table.add_row("…", f"{len(records) - len(shown)} more")
        return table

    def _print_changes(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            if self._shown.get(record.trial) == record.status:
                continue
            self._shown[record.trial] = record.status
            if record.status == RUNNING:
                values = ", ".join(f"{name} {value_text(value)}" for name, value in record.values.items())
                self._print(f"trial {record.trial} runs: {values}")
                continue
            steps = "" if record.status == PRUNED else f" at step {record.step:,}/{self._total_steps(record):,}"
            value = "" if record.objective is None else f", {self._sweep.objective} {value_text(record.objective)}"
            cause = f": {record.cause}" if record.cause else ""
            self._print(f"trial {record.trial} {record.status}{steps}{value}{cause}; {self._state(records)}")
        now = self._clock()
        running = [record for record in records if record.status == RUNNING and record.objective is not None]
        line = ", ".join(
            f"{record.trial} {record.step:,}/{self._total_steps(record):,} {value_text(record.objective)}"
            for record in running
        )
        if line and line != self._last_line and now - self._printed >= _PLAIN_SECONDS:
            self._last_line = line
            self._print(f"running: {line}; {self._state(records)}")

    def _state(self, records: Sequence[TrialRecord]) -> str:
        return "; ".join(filter(None, [self._progress(records), self._best(records)]))

    def _progress(self, records: Sequence[TrialRecord]) -> str:
        left = self.seconds_left(records)
        counts = Counter(record.status for record in records)
        others = [f"{counts[status]} {status}" for status in ("failed", PRUNED) if counts[status]]
        parts = [f"{len(ended(records))} of {self._sweep.trials:,} trials", *others]
        return ", ".join(parts) + (f", about {duration(left)} left" if left else "")

    def _best(self, records: Sequence[TrialRecord]) -> str:
        best = best_trial(records, self._sweep)
        return "" if best is None else f"best so far {value_text(best.objective)} (trial {best.trial})"

    def _print(self, text: str) -> None:
        self._printed = self._clock()
        self._console.print(text, soft_wrap=True)


def _most_important(records: Sequence[TrialRecord], sweep: SweepConfig, room: int) -> list[TrialRecord]:
    """As many trials as there is room for, in their order: those that run, then the best ones, then the others."""
    sign, place = (1 if sweep.minimizes else -1), {RUNNING: 0, "finished": 1, "stopped early": 2}

    def rank(record: TrialRecord) -> tuple[int, float]:
        return place.get(record.status, 3), sign * (record.objective or 0.0)

    chosen = {record.trial for record in sorted(records, key=rank)[:room]}
    return [record for record in sorted(records, key=lambda r: (r.number, r.trial)) if record.trial in chosen]
