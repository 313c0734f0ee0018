"""Features on local disk under a digest of all that they depend on, so that they are computed once.

<folder>/<key>/features.npy  labels.npy  samples.npy      arrays only, never unpickled; memory-mapped when read
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from crate_ray.data.format import npy

_FEATURES, _LABELS, _SAMPLES = "features.npy", "labels.npy", "samples.npy"
_PARTIAL = ".partial-"

UNUSABLE = -2
"""Label of a row whose sample could not be read; it does not count."""
UNLABELLED = -1
"""Label of a row whose sample has no class."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of n samples of a dataset."""

    features: NDArray[np.float32]
    """(n, dim)"""
    labels: NDArray[np.int64]
    """(n,) class numbers; -1 where there is none."""
    samples: NDArray[np.int64]
    """(n,) numbers of the samples in the dataset."""


def default_folder() -> Path:
    """Where features are kept unless told otherwise: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crate-ray" / "features"


class FeatureCache:
    """A folder of feature sets by key. Entries appear whole or not at all; several processes may share it.

    Parameters: the folder, and how many bytes it may hold before entries that were used longest ago are removed.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def get(self, key: str) -> FeatureSet | None:
        """The features under a key; None when they are not there, or damaged."""
        entry = self._folder / key
        try:
            features = npy.map_file(entry / _FEATURES)
            labels, samples = (npy.read((entry / name).read_bytes()) for name in (_LABELS, _SAMPLES))
        except (OSError, ValueError):
            return None
        if not len(features) == len(labels) == len(samples):
            return None
        with suppress(OSError):
            os.utime(entry)
        usable = labels != UNUSABLE
        if usable.all():
            return FeatureSet(features, labels, samples)
        return FeatureSet(features[usable], labels[usable], samples[usable])

    @contextmanager
    def write(self, keys: list[str], rows: int, dims: list[int]) -> Iterator[Writer]:
        """Fill entries of so many rows; they count once the block has ended without an error."""
        self._folder.mkdir(parents=True, exist_ok=True)
        writer = Writer.create(self._folder / f"{_PARTIAL}{uuid.uuid4().hex}", keys, rows, dims)
        try:
            yield writer
            for key in keys:
                target = self._folder / key
                shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been read
                with suppress(OSError):  # somebody else was faster
                    (writer.folder / key).rename(target)
        finally:
            shutil.rmtree(writer.folder, ignore_errors=True)
        self._make_room(set(keys))

    def _make_room(self, needed: set[str]) -> None:
        entries = []
        for entry in self._folder.iterdir():
            with suppress(OSError):
                size = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime, size, entry))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total > self._max_bytes and entry.name not in needed:
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


@dataclass(frozen=True)
class Writer:
    """Entries that are being filled, on disk: the features need not fit memory."""

    folder: Path
    """Where they are until they count."""
    features: list[NDArray[np.float32]]
    """One (rows, dim) per key."""
    labels: list[NDArray[np.int64]]
    """One (rows,) per key."""
    samples: list[NDArray[np.int64]]
    """One (rows,) per key."""

    @classmethod
    def create(cls, folder: Path, keys: list[str], rows: int, dims: list[int]) -> Self:
        """Empty files; rows that are not filled are unusable."""
        for key in keys:
            (folder / key).mkdir(parents=True)

        def arrays(name: str, shapes: list[tuple[int, ...]], dtype: type) -> list[NDArray]:
            return [
                open_memmap(folder / key / name, mode="w+", dtype=dtype, shape=shape)
                for key, shape in zip(keys, shapes, strict=True)
            ]

        writer = cls(
            folder,
            arrays(_FEATURES, [(rows, dim) for dim in dims], np.float32),
            arrays(_LABELS, [(rows,) for _ in keys], np.int64),
            arrays(_SAMPLES, [(rows,) for _ in keys], np.int64),
        )
        for labels in writer.labels:
            labels[:] = UNUSABLE
        return writer

    def put(
        self, rows: NDArray[np.int64], features: list[NDArray], labels: NDArray[np.int64], samples: NDArray[np.int64]
    ) -> None:
        """Fill some rows (n,) of every entry, with features (n, dim) each, labels and sample numbers (n,)."""
        for i, values in enumerate(features):
            self.features[i][rows], self.labels[i][rows], self.samples[i][rows] = values, labels, samples
