"""Records what torch.compile is asked to compile."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch


def recorded_programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of each program from now on. They run as they were captured, uncompiled."""
    programs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        programs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    return programs
