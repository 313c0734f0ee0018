"""The optimizer Muon for matrices, and AdamW for all other parameters. Plain torch: no Ray, no MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and fused AdamW as one optimizer.

    Muon's update of a matrix is its momentum with all singular values near 1, times 0.2 √max(rows, columns). This has
    about the size of AdamW's update, so both use the same learning rate and weight decay (arXiv 2502.16982).

    The step never waits for the device. Parameters may be sharded: DTensor then exchanges what the products need. Set
    `found_inf` as for a fused optimizer of torch: if it is 1, the step changes nothing. The learning rate has to be a
    number, so the step cannot be captured in a CUDA graph.

    Args:
        matrices: parameter groups for Muon, two-dimensional parameters only.
        others: parameter groups for AdamW.
        betas, eps: of AdamW.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._muon = torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr=0.0, betas=betas, eps=eps, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make a step."""
        assert closure is None
        muon, adamw = self._muon, self._adamw
        muon.state = adamw.state = self.state
        count = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        found_inf = self.found_inf
        if found_inf is None:
            muon.step()
        else:  # torch's Muon cannot skip a step
            before = {tensor: tensor.clone() for tensor in self._muon_tensors()}
            muon.step()
            for tensor in self._muon_tensors():
                old = before[tensor] if tensor in before else torch.zeros_like(tensor)  # a momentum starts at zero
                tensor.copy_(torch.where(found_inf.bool(), old, tensor))
            adamw.found_inf = found_inf  # type: ignore[attr-defined]
        adamw.step()

    def _muon_tensors(self) -> list[Tensor]:
        """The matrices, and their momenta if there are any yet."""
        matrices = [parameter for group in self._muon.param_groups for parameter in group["params"]]
        return [tensor for matrix in matrices for tensor in (matrix, *self.state[matrix].values())]
