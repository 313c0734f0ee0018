"""The interface of what turns pictures into a model's input. `serving` implements it; a loaded model carries it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Preprocess(Protocol):
    """Turns pictures into the normalised batch that a model takes."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that is subtracted (images are on the scale 0 to 1)."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, by which the input is divided."""

    def __call__(self, images: Any) -> Tensor:
        """Normalised batch (B, channels, H, W), float32 on the CPU, of one picture or a sequence of them."""
