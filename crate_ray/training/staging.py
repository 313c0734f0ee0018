"""Copies of tensors in host memory, from which a checkpoint is written while training goes on.

All uses of private names of torch's checkpoint stager are in this file; tests/unit/test_checkpoint.py fails when they
change. torch.distributed.checkpoint.staging.DefaultStager has the same in public, but that of torch 2.11 can copy only
once: it forgets its memory and then fails.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager


class HostCopies:
    """Copies tensors to the same host memory every time, pinned if they come from a GPU.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stager = StateDictStager(pin_memory=self._cuda, share_memory=False)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors, sharded ones as such, and wait until the copies are complete.

        The copies are valid until the next call. Memory is used again for tensors that share storage with those before.
        """
        copies: dict[str, Tensor] = self._stager.stage(dict(tensors), non_blocking=self._cuda)
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        return copies

    def close(self) -> None:
        """Release the memory."""
        self._stager.close()
