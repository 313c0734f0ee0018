"""A run on the screen: a live line in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections import Counter
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crate_ray.runs.listener import Listener

_PLAIN_SECONDS = 10.0


class ProgressDisplay(Listener):
    """Shows step, loss, images/s and time left. Use as a context manager around the training."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self._first, self._total = first_step, total_steps
        self._console = Console(stderr=True)
        self._began, self._printed = time.monotonic(), 0.0
        self._live: Progress | None = None
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._live.add_task("", total=total_steps, completed=first_step, values="starting workers")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Show newly measured values."""
        if "validation_loss" in values:
            accuracy = "".join(f"  {name} {values[name]:.2%}" for name in ("top1", "top5") if name in values)
            self._console.print(
                f"step {step}/{self._total}  validation loss {values['validation_loss']:.4f}{accuracy}", soft_wrap=True
            )
        if "loss" not in values:
            return
        text = f"loss {values['loss']:.4f}  {values['images_per_second']:,.0f} images/s"
        if self._live:
            self._live.update(self._task, completed=step, values=text)
            return
        now = time.monotonic()
        if now - self._printed >= _PLAIN_SECONDS or step == self._total:
            self._printed = now
            left = (self._total - step) * values["step_seconds"]
            self._console.print(
                f"step {step}/{self._total}  {text}  lr {values['lr']:.2e}  {left:,.0f} s left", soft_wrap=True
            )

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Say how many samples are unusable; their keys are in the run's artifacts."""
        counts = ", ".join(f"{count} {cause}" for cause, count in Counter(causes.values()).most_common())
        self._console.print(
            f"step {step}: {split} samples that cannot be used ({counts}), such as {next(iter(causes))!r}",
            soft_wrap=True,
        )

    def note(self, step: int, text: str) -> None:
        """Print what happened."""
        self._console.print(f"step {step}: {text}", highlight=False, soft_wrap=True, markup=False)
