"""The newest version of the model, as the driver hands it to the replicas.

Only the driver asks MLflow and reads storage. So replicas need no credentials, and each version is fetched once.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from crate_ray.models.exported import DESCRIPTION_FILE, WEIGHTS_FILE
from crate_ray.served_model import ServedModel


class Version(NamedTuple):
    """A version of the model, in Ray's object store."""

    name: str
    """Number of a registered model's version, else the reference."""
    description: bytes
    """Content of model.json."""
    weights: list[Any]
    """A reference to the bytes of model.safetensors, in a list so that Ray does not fetch them."""


class Shelf:
    """A Ray actor that holds the newest version."""

    def __init__(self) -> None:
        self._newest: Version | None = None
        self._changed = asyncio.Condition()

    async def put(self, version: Version) -> None:
        """Replace the version."""
        async with self._changed:
            self._newest = version
            self._changed.notify_all()

    async def other_than(self, name: str | None) -> Version:
        """Wait until there is a version that has another name."""
        async with self._changed:
            while self._newest is None or self._newest.name == name:
                await self._changed.wait()
            return self._newest


def build(description: bytes, weights: bytes, device: str) -> ServedModel:
    """Build the model of a version, and run it once, so that the first request is not slower than others."""
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        (Path(temporary) / DESCRIPTION_FILE).write_bytes(description)
        (Path(temporary) / WEIGHTS_FILE).write_bytes(weights)
        model = ServedModel.from_folder(Path(temporary), device)
    model(model.blank())
    return model
