"""These tests run in processes of their own, in which torch has the emulated device: see `make test`."""

from __future__ import annotations

import sys

import pytest

if "tests.gpu_emulated.plugin" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """Tensors are small."""
    import torch

    torch.set_num_threads(1)
