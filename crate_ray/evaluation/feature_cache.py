"""Caches features of evaluated models on local disk. The key is a digest of everything that they depend on.

<folder>/<key>/features.npy  labels.npy  samples.npy      arrays only, never unpickled; memory-mapped when read
<folder>/.partial/           entries that are being written
"""

from __future__ import annotations

import errno
import os
import re
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
from crate_ray.errors import UserError
from crate_ray.storage.node_folders import chosen_folder, evict, private_subfolder, temporary_folder

_FEATURES, _LABELS, _SAMPLES = "features.npy", "labels.npy", "samples.npy"
_PARTIAL = ".partial"
_ADVICE = "choose another features_dir"
_ENTRY = re.compile(r"[0-9a-f]{64}")

UNUSABLE = -2
"""Label of a row whose sample could not be read; readers leave it out."""
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


class FeatureCache:
    """A folder of feature sets by key, of limited size. Several processes may share it.

    Args:
        folder: created at the first write.
        max_bytes: after a write, the least recently used other entries are evicted until all fit.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def get(self, key: str) -> FeatureSet | None:
        """Return the features under a key; None if they are missing or damaged."""
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
        """Fill new entries. Complete entries appear when the block ends without an error.

        Args:
            keys: names of the entries.
            rows: samples of each entry.
            dims: numbers per sample, one for each entry.

        Raises:
            UserError: the folder belongs to another user, or the entries cannot be written.
        """
        partial = private_subfolder(chosen_folder(self._folder, _ADVICE), _PARTIAL, _ADVICE)
        with temporary_folder(partial, uuid.uuid4().hex) as folder:
            writer = Writer.create(folder, keys, rows, dims)
            yield writer
            writer.flush()
            for key in keys:
                self._publish(folder / key, self._folder / key)
        needed = {self._folder / key for key in keys}
        # The user may have chosen a folder that also holds files of theirs.
        evict((e for e in self._folder.iterdir() if _ENTRY.fullmatch(e.name)), self._max_bytes, keep=needed)

    def _publish(self, written: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)  # an existing entry is damaged, or it would have been used
        try:
            written.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
                raise UserError(f"cannot store features in {self._folder}: {error.strerror}; {_ADVICE}") from None


@dataclass(frozen=True)
class Writer:
    """Entries that are being filled. They are on disk, so the features need not fit in memory."""

    features: list[np.memmap]
    """One (rows, dim) per key."""
    labels: list[np.memmap]
    """One (rows,) per key."""
    samples: list[np.memmap]
    """One (rows,) per key."""

    @classmethod
    def create(cls, folder: Path, keys: list[str], rows: int, dims: list[int]) -> Self:
        """Create the files of empty entries below a folder. Rows that are never filled stay unusable."""
        for key in keys:
            (folder / key).mkdir(parents=True)

        def arrays(name: str, shapes: list[tuple[int, ...]], dtype: type) -> list[np.memmap]:
            return [
                open_memmap(folder / key / name, mode="w+", dtype=dtype, shape=shape)
                for key, shape in zip(keys, shapes, strict=True)
            ]

        writer = cls(
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
        """Fill rows of every entry.

        Args:
            rows: (n,) numbers of the rows.
            features: for each entry, (n, dim).
            labels: (n,) class numbers, UNLABELLED or UNUSABLE.
            samples: (n,) numbers of the samples in the dataset.
        """
        for i, values in enumerate(features):
            self.features[i][rows], self.labels[i][rows], self.samples[i][rows] = values, labels, samples

    def flush(self) -> None:
        """Write everything to disk, so that a crash of the machine does not leave an entry with rows of zeros."""
        for array in (*self.features, *self.labels, *self.samples):
            array.flush()
