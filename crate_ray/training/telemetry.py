"""What training shows of itself: rates between log steps, and the reconstruction picture. Plain torch and Pillow."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from crate_ray.models import MaskedAutoencoder
from crate_ray.training.step import Normalizer


class Listener(Protocol):
    """Who follows a run on the driver: the terminal, MLflow. Calls come from one thread, in the order of events."""

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        """Measured values after so many steps, at a time in milliseconds since 1970."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture made after so many steps."""

    def bad_samples(self, step: int, causes: dict[str, str]) -> None:
        """Samples that a worker could not use and had not told of before: cause by key."""


KEYS_DIGEST_RANGE = 2**48  # a float, as which metrics travel, holds these exactly


def keys_digest(keys: Sequence[str], first_slot: int) -> int:
    """A worker's part of the digest of a global batch: which sample is in which slot.

    The sum of all workers' parts, modulo KEYS_DIGEST_RANGE, is the same for every number of workers.
    """
    parts = (
        xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"), slot)
        for slot, key in enumerate(keys, first_slot)
    )
    return sum(parts) % KEYS_DIGEST_RANGE


class Stopwatch:
    """Time since the last lap, and the part of it that was spent waiting for data."""

    def __init__(self) -> None:
        self._lap, self.waited = time.perf_counter(), 0.0

    def wait_began(self) -> float:
        """Call before asking for data; pass the result to `wait_ended`."""
        return time.perf_counter()

    def wait_ended(self, began: float) -> None:
        """Call when the data is there."""
        self.waited += time.perf_counter() - began

    def lap(self, steps: int, batch_size: int) -> dict[str, float]:
        """Rates since the last lap, and a new lap: images/s of all workers, seconds per step, time waiting."""
        now = time.perf_counter()
        seconds = max(now - self._lap, 1e-9)
        rates = {
            "images_per_second": steps * batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_wait_share": self.waited / seconds,
        }
        self._lap, self.waited = now, 0.0
        return rates


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images_BCHW: Tensor, noise_BN: Tensor) -> tuple[Tensor, Tensor]:
    """What the model sees and what it makes of it: images with the masked patches grey (0), and with them predicted.

    Both (B, channels, H, W) on the scale of the normalised input; visible patches are the original's.
    """
    output = model(images_BCHW, noise_BN)
    removed = model.unpatchify(output.mask[:, :, None].expand_as(output.prediction).to(images_BCHW.dtype))
    predicted = model.reconstruct(output.prediction.float(), images_BCHW)
    return images_BCHW * (1 - removed), images_BCHW * (1 - removed) + predicted * removed


def reconstruction_picture(
    model: MaskedAutoencoder,
    normalizer: Normalizer,
    images_BCHW: Tensor,
    noise_BN: Tensor,
    value_range: tuple[float, float],
) -> bytes:
    """PNG with a column per sample: original, masked, reconstructed. Takes loaded (not normalised) images.

    value_range is what black and white stand for. Grids that are neither 1 nor 3 channels show their first channel.
    """
    was_training = model.training
    model.eval()
    normalised = normalizer(images_BCHW)
    rows = [normalised, *reconstruct(model, normalised, noise_BN)]
    model.train(was_training)
    low, high = value_range
    pixels_R = [((normalizer.undo(row) - low) / (high - low)).clamp(0, 1) for row in rows]
    grid_RBCHW = torch.stack(pixels_R)
    if grid_RBCHW.shape[2] != 3:
        grid_RBCHW = grid_RBCHW[:, :, :1].expand(-1, -1, 3, -1, -1)
    height, width = grid_RBCHW.shape[3:]
    zoom, gap = max(1, round(96 / height)), 4
    rows_, columns = grid_RBCHW.shape[:2]
    size = (rows_ * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap)
    canvas = np.full((*size, 3), 255, np.uint8)
    for r in range(rows_):
        for c in range(columns):
            tile = (grid_RBCHW[r, c].permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
            tile = tile.repeat(zoom, 0).repeat(zoom, 1)
            top, left = gap + r * (height * zoom + gap), gap + c * (width * zoom + gap)
            canvas[top : top + height * zoom, left : left + width * zoom] = tile
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, "PNG")
    return out.getvalue()
