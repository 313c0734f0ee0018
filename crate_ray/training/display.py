"""Shows the progress of a run: a live line in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from crate_ray.progress import error_console
from crate_ray.runs import metrics
from crate_ray.runs.listener import Listener
from crate_ray.training.signals import Stopped

_PLAIN_SECONDS = 10.0
_CURVE_WIDTH = 40
_BARS = "▁▂▃▄▅▆▇█"


class ProgressDisplay(Listener):
    """Shows how a run starts, its steps and losses, and how it ends. Use it as a context manager around the training.

    Args:
        first_step: steps that are done when training starts.
        total_steps: steps of the whole run.
    """

    def __init__(self, first_step: int, total_steps: int) -> None:
        self._first, self._total = first_step, total_steps
        self._console = error_console()
        self._began, self._printed = time.monotonic(), 0.0
        self._losses: dict[int, float] = {}
        self._validation_loss: float | None = None
        self._starts, self._started_at = 0, first_step
        self._live: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._task = self._live.add_task(
                "", total=total_steps, completed=first_step, values="starting workers", left=""
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if isinstance(error, Stopped):
            at = f"at step {error.step:,} of {self._total:,}" if error.step else "before its first checkpoint"
            goes_on = "continues from there" if error.step else "starts again"
            self._print(f"stopped {at}; the same command {goes_on}")
        elif error is None and self._losses:
            self._print_summary()

    def started(self, step: int, facts: dict[str, Any]) -> None:
        """Print the device, model and data of a run, and the step at which it resumes, if it does."""
        self._starts, self._started_at = self._starts + 1, step
        count = facts["workers"]
        workers = f"{count} worker{'s' if count > 1 else ''}"
        if self._starts > 1:
            self._print(f"resuming at step {step:,} with {workers}")
            return
        epochs = self._total * facts["batch_size"] / facts["images"]
        self._print(
            f"device  {facts['device']}: {workers}, {facts['threads']} CPU thread{'s' if facts['threads'] > 1 else ''} "
            f"{'each' if count > 1 else ''}".rstrip()
        )
        self._print(f"model   {_short(facts['parameters'])} parameters")
        self._print(
            f"data    {facts['images']:,} images, batch {facts['batch_size']:,}, {self._total:,} steps "
            f"({epochs:,.1f} epochs)"
        )
        if step:
            self._print(f"resuming at step {step:,}")

    def first_step(self, step: int, loss: float, seconds: float) -> None:
        """Show the first losses at once. The second step gives the remaining time, because the first one warms up."""
        left = self._left(step, seconds) if step > self._started_at + 1 else ""
        if self._live:
            self._live.update(self._task, completed=step, values=f"loss {loss:.4f}", left=left)
        else:
            self._print(f"step {step:,}/{self._total:,}  loss {loss:.4f}" + (f"  {left}" if left else ""))

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Show newly measured values."""
        if metrics.VALIDATION_LOSS in values:
            self._validation_loss = values[metrics.VALIDATION_LOSS]
            accuracies = {"top-1": metrics.TOP1, "top-5": metrics.TOP5}
            accuracy = "".join(f"  {name} {values[key]:.2%}" for name, key in accuracies.items() if key in values)
            self._print(f"step {step:,}/{self._total:,}  validation loss {self._validation_loss:.4f}{accuracy}")
        if metrics.KNN_ACCURACY in values:
            knn, linear = values[metrics.KNN_ACCURACY], values[metrics.PROBE_ACCURACY]
            rank = values[metrics.EFFECTIVE_RANK]
            self._print(f"step {step:,}/{self._total:,}  k-NN {knn:.1%}  linear probe {linear:.1%}  rank {rank:.1f}")
        if metrics.LOSS not in values:
            return
        self._losses[step] = values[metrics.LOSS]
        text = f"loss {values[metrics.LOSS]:.4f}  {values[metrics.IMAGES_PER_SECOND]:,.0f} images/s"
        left = self._left(step, values[metrics.STEP_SECONDS])
        if self._live:
            self._live.update(self._task, completed=step, values=text, left=left)
            return
        now = time.monotonic()
        if now - self._printed >= _PLAIN_SECONDS or step == self._total:
            self._printed = now
            self._print(f"step {step:,}/{self._total:,}  {text}  lr {values[metrics.LR]:.2e}  {left}".rstrip())

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Print how many samples are unusable; their keys are in the run's artifacts."""
        counts = ", ".join(f"{count} {cause}" for cause, count in Counter(causes.values()).most_common())
        self._print(f"step {step:,}: unusable {split} samples ({counts}), such as {next(iter(causes))!r}")

    def note(self, step: int, text: str) -> None:
        """Print the event."""
        self._print(f"step {step:,}: {text}")

    def _left(self, step: int, step_seconds: float) -> str:
        return f"{duration((self._total - step) * step_seconds)} left" if step < self._total else ""

    def _print_summary(self) -> None:
        steps, losses = max(self._losses) - self._first, list(self._losses.values())
        self._print(f"trained {steps:,} steps in {duration(time.monotonic() - self._began)}")
        if len(losses) > 1:
            self._print(f"loss    {losses[0]:.4f} {loss_curve(losses)} {losses[-1]:.4f}")
        if self._validation_loss is not None:
            self._print(f"validation loss {self._validation_loss:.4f}")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def loss_curve(losses: list[float], width: int = _CURVE_WIDTH) -> str:
    """A curve in one line of text: one bar for the mean of each part of the losses, scaled from lowest to highest."""
    width = min(width, len(losses))
    parts = [losses[i * len(losses) // width : (i + 1) * len(losses) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as '2 h 05 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} days {hours % 24} h"


def _short(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 10_000 else f"{count:,}"
