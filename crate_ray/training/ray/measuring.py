"""Measures the checkpoints of a run in a process beside training. The workers do not wait for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crate_ray.errors import UserError

Measure = Callable[[Any, int], dict[str, float]]
"""Measures the checkpoint of a step: settings of the run, step -> metrics. It is called in another process."""

_POLITE = 10  # of `nice`: training goes first
_MANY_CPUS = 8  # with fewer, measuring takes one thread


class Measurements:
    """Has committed checkpoints measured, one at a time. Results go to the driver's mailbox, as those of workers.

    A checkpoint that is committed while another one is measured waits. If a newer one is committed, it takes its place.

    Args:
        measure: the function.
        config: settings of the run.
        every: measure steps that are multiples of this, and the last one; None: every checkpoint.
        total_steps: the run's last step.
        mailbox: the driver's mailbox.
    """

    def __init__(self, measure: Measure, config: Any, every: int | None, total_steps: int, mailbox: Any) -> None:
        self._every, self._total_steps, self._mailbox = every, total_steps, mailbox
        self._given = ([ray.put(measure)], config, mailbox)
        self._actor = self._start()
        self._running: tuple[int, Any] | None = None
        self._waiting: int | None = None

    def _start(self) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return ray.remote(num_cpus=0)(_Measurer).options(scheduling_strategy=here).remote(*self._given)

    def committed(self, step: int) -> None:
        """A checkpoint of a step was committed."""
        if step == self._total_steps or self._every is None or step % self._every == 0:
            self._waiting = step
            self.advance()

    def advance(self) -> None:
        """Start the measurement that waits, if the one before has ended."""
        if self._running is not None and ray.wait([self._running[1]], timeout=0)[0]:
            step, done = self._running
            self._running = None
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:  # the process was killed, for example because memory ran out
                cause = str(error).strip().partition("\n")[0]
                self._mailbox.put.remote(("note", step, f"the features of step {step} were not measured: {cause}"))
                self._actor = self._start()
        if self._running is None and self._waiting is not None:
            self._running, self._waiting = (self._waiting, self._actor.measure.remote(self._waiting)), None

    def wait(self, seconds: float) -> bool:
        """Wait for at most so many seconds. Returns whether everything is measured."""
        if self._running is not None:
            ray.wait([self._running[1]], timeout=seconds)
            self.advance()
        return self._running is None

    def end(self) -> None:
        """End the process."""
        ray.kill(self._actor)


class _Measurer:
    """Actor that measures checkpoints."""

    def __init__(self, measure: list[Any], config: Any, mailbox: Any) -> None:
        os.nice(_POLITE)
        import torch

        torch.set_num_threads(1 if (os.cpu_count() or 1) < _MANY_CPUS else 4)
        self._measure: Measure = ray.get(measure[0])
        self._config, self._mailbox = config, mailbox

    def measure(self, step: int) -> None:
        """Measure a checkpoint. A failure is a note: it does not end training."""
        try:
            values = self._measure(self._config, step)
            event: tuple[Any, ...] = ("metrics", step, values, int(time.time() * 1000))
        except Exception as error:  # also of libraries
            cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            event = ("note", step, f"the features of step {step} were not measured: {' '.join(cause.split())[:500]}")
        ray.get(self._mailbox.put.remote(event))
