"""The events of a run that reach the driver."""

from __future__ import annotations

from typing import Any


class Listener:
    """Receives the events of a run on the driver, for example to show them or to log them to MLflow.

    Events arrive in order, from one thread. Override the methods of the events you need.
    """

    def started(self, step: int, facts: dict[str, Any]) -> None:
        """Workers start to train at a step. Called for new and resumed runs, and after each restart of the workers.

        `facts` are the fields of training.worker.StartFacts.
        """

    def first_step(self, step: int, loss: float, seconds: float) -> None:
        """One of the first two steps after a start is done: its loss and its duration."""

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Metrics (see runs.metrics) were logged at a step, at a time in milliseconds since 1970."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture was drawn at a step."""

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """A worker found unusable samples that it has not reported before. `causes` holds the cause by key.

        `split` is 'training' or 'validation'.
        """

    def note(self, step: int, text: str) -> None:
        """Something notable happened at a step. `text` is one sentence for the user."""
