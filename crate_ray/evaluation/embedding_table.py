"""Reads a complete output of an embedding job, one row group at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crate_ray.errors import UserError
from crate_ray.evaluation.embedding_files import EMBEDDING
from crate_ray.evaluation.embedding_output import EmbeddingRecord, damaged_parts, read_record
from crate_ray.storage.interface import Storage


class Group(NamedTuple):
    """Rows of one row group."""

    place: tuple[str, int]
    """Name of the file, and number of the row group in it."""
    rows: pa.Table


class EmbeddingTable:
    """The rows of a complete output in Parquet.

    Raises UserError if the output is not complete, lacks files, or is of another format.
    """

    def __init__(self, output: Storage) -> None:
        record = read_record(output)
        if record is None:
            raise UserError(f"{output.uri} holds no embeddings; make them with crate-ray embed")
        if not record.complete:
            raise UserError(f"{output.uri} is not complete; start the same crate-ray embed again, which goes on")
        if missing := damaged_parts(output, record):
            raise UserError(
                f"{output.uri} lacks {missing[0]}, or the file has changed; start the same crate-ray embed again, "
                "which restores it"
            )
        if record.format != "parquet":
            raise UserError(f"{output.uri} holds {record.format}; search needs --format parquet")
        self.record: EmbeddingRecord = record
        self._output = output
        if record.part_samples:
            self._files = [record.part_name(samples) for samples in record.ranges()]
        else:
            self._files = sorted(i.key for i in output.list() if "/" not in i.key and i.key.endswith(".parquet"))

    def groups(self, columns: Sequence[str]) -> Iterator[Group]:
        """Row groups in the order of the samples, with those of the columns that exist."""
        for name in self._files:
            file = self._open(name)
            for number in range(file.num_row_groups):
                yield Group((name, number), file.read_row_group(number, _present(file, columns), use_threads=False))

    def group(self, place: tuple[str, int], columns: Sequence[str]) -> pa.Table:
        """One row group."""
        file = self._open(place[0])
        return file.read_row_group(place[1], _present(file, columns))

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(pa.PythonFile(_Ranged(self._output, name), mode="r"))
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{self._output.uri}/{name} is damaged ({str(error).splitlines()[0]}); embed again"
            ) from None


def vectors_of(rows: pa.Table) -> NDArray[np.float32]:
    """The embeddings of rows, (n, numbers per embedding)."""
    flat = rows[EMBEDDING].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(rows), -1)


def _present(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    return [column for column in columns if column in file.schema_arrow.names]


class _Ranged(io.RawIOBase):
    """An object as a file, read by ranges."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key, self._size, self._at = storage, key, storage.info(key).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        data = self._storage.read(self._key, self._at, size) if size else b""
        self._at += len(data)
        return data
