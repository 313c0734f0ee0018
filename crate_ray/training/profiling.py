"""A profile of some steps by torch.profiler, left in the run's folder."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from crate_ray.storage.interface import Storage

_ROWS = 40


class StepProfile:
    """Profiles steps first to last of a worker. Use it as a context manager around the training loop.

    It leaves profile/steps-<first>-<last>-rank-<rank>.json.gz, a trace for Perfetto or chrome://tracing, and .txt, a
    table of the operators that took most time, in the run's folder.

    Args:
        steps: first and last step; None for no profile.
        rank: of the worker.
        run: the run's folder.
        space: a local folder.
    """

    def __init__(self, steps: tuple[int, int] | None, rank: int, run: Storage, space: Path) -> None:
        self._steps, self._rank, self._run, self._space = steps, rank, run, space
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()

    def before(self, step: int) -> None:
        """Call before a step: its number."""
        if self._steps is not None and step == self._steps[0]:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> str | None:
        """Call after a step. Where the profile was written, after the last of its steps."""
        if self._profile is None or self._steps is None or step < self._steps[1]:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        name = f"steps-{self._steps[0]}-{self._steps[1]}-rank-{self._rank}"
        trace, table = self._space / f"{name}.json.gz", self._space / f"{name}.txt"
        self._profile.export_chrome_trace(trace.as_posix())
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table.write_text(self._profile.key_averages().table(sort_by=by, row_limit=_ROWS))
        self._profile = None
        for path in (trace, table):
            self._run.write(f"profile/{path.name}", path)
            path.unlink()
        return f"{self._run.uri}/profile/{trace.name}"
