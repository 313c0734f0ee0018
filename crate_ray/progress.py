"""Terminal output of jobs: a live progress line in a terminal, plain lines in a log, and tables."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from crate_ray.output import visible

_PLAIN_SECONDS = 10.0


class CountDisplay:
    """Shows how many samples are packed or how many shards are indexed. Use it as a context manager."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._before = title, total, 0  # before: what an earlier run has done
        self._console = error_console()
        self._began = self._printed = time.monotonic()
        self._live: Progress | None = None
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn(title),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._live.add_task("", total=total, values="")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: int, images: int, bad: int) -> None:
        """Show the count, and how many good and bad images this run has processed so far."""
        now = time.monotonic()
        seconds = max(now - self._began, 1e-3)
        text = f"{images / seconds:,.0f} images/s" + (f", {bad:,} bad" if bad else "")
        if not images:
            self._before = done
        if self._live:
            self._live.update(self._task, completed=done, values=text)
        elif now - self._printed >= _PLAIN_SECONDS:
            self._printed = now
            left = seconds * (self._total - done) / max(done - self._before, 1)
            self._console.print(
                f"{self._title} {done:,}/{self._total:,}  {text}, {timedelta(seconds=int(left))} left", soft_wrap=True
            )

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True)


def console() -> Console:
    """Standard output for tables: as wide as the terminal, or 180 columns in a log."""
    return _PlainConsole(width=None if sys.stdout.isatty() else 180, file=getattr(sys.stdout, "with_controls", None))


def error_console() -> Console:
    """Standard error, for progress."""
    return _PlainConsole(stderr=True, file=getattr(sys.stderr, "with_controls", None))


class _PlainConsole(Console):
    """A console that shows names from outside as they are: markup and terminal escapes in texts have no effect."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a line or of a table's cell."""
        return super().render_str("\n".join(map(visible, text.split("\n"))), **options)
