"""A profile of some steps by torch.profiler, written to the run's folder."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from crate_ray.storage.interface import Storage

_ROWS = 40


class StepProfile:
    """Profiles some steps of rank 0. Use it as a context manager around the training loop.

    It writes profile/steps-<first>-<last>-rank-0.json.gz, a trace for Perfetto or chrome://tracing, and .txt, a table
    of the operators that took most time, to the run's folder.

    Args:
        steps: first and last step; None for no profile.
        run: the run's folder; None for no profile.
        scratch: a local folder.
        device: the device that trains.
    """

    def __init__(self, steps: tuple[int, int] | None, run: Storage | None, scratch: Path, device: torch.device) -> None:
        self._steps, self._run, self._scratch = steps if run else None, run, scratch
        self._on_gpu = device.type == "cuda"
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()

    def before(self, step: int) -> None:
        """Call before each step, with its number."""
        if self._steps is not None and step == self._steps[0]:
            cuda = [ProfilerActivity.CUDA] if self._on_gpu else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> str | None:
        """Call after each step, with its number. Returns where the profile was written, after its last step."""
        if self._profile is None or self._steps is None or self._run is None or step < self._steps[1]:
            return None
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profile.stop()
        name = f"steps-{self._steps[0]}-{self._steps[1]}-rank-0"
        trace, table = self._scratch / f"{name}.json.gz", self._scratch / f"{name}.txt"
        self._profile.export_chrome_trace(trace.as_posix())
        by = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        table.write_text(self._profile.key_averages().table(sort_by=by, row_limit=_ROWS))
        self._profile = None
        for path in (trace, table):
            self._run.write(f"profile/{path.name}", path)
            path.unlink()
        return f"{self._run.uri}/profile/{trace.name}"
