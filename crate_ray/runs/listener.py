"""Who follows a run on the driver."""

from __future__ import annotations


class Listener:
    """Who follows a run on the driver: the terminal, MLflow. Calls come from one thread, in the order of events.

    Override what you want to hear of.
    """

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Measured values after so many steps, at a time in milliseconds since 1970."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture made after so many steps."""

    def bad_samples(self, step: int, causes: dict[str, str], split: str) -> None:
        """Samples of the 'training' or 'validation' data that a worker could not use and had not told of before: cause
        by key."""

    def note(self, step: int, text: str) -> None:
        """A sentence on something that happened and that people should know of."""
