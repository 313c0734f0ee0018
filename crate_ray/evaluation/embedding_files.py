"""Files of embeddings: Parquet tables, and tar shards of .npy arrays."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

EMBEDDING = "embedding"
METADATA = "crate_ray."
"""Begin of the keys of a table's metadata."""
_GROUP_BYTES = 16 * 2**20
_GROUP_ROWS = 122_880
"""DuckDB reads row groups in parallel, and makes them of so many rows itself."""


@dataclass
class Rows:
    """Embeddings of n samples, in the order of the samples."""

    keys: list[str]
    """Keys, as UTF-8."""
    names: list[str | None] | None
    """Names in the source that was packed; None if the dataset has no names."""
    shards: list[str]
    """Name of each sample's shard."""
    samples: NDArray[np.int64]
    """(n,) numbers of the samples in the dataset."""
    labels: NDArray[np.int64] | None
    """(n,) class numbers; None if not every sample has one."""
    vectors: NDArray[np.floating[Any]]
    """(n, d), or (n, patches, d)."""


def parquet_file(rows: Rows, metadata: Mapping[str, str]) -> bytes:
    """A Parquet file with one row per sample, whose embedding is a list of fixed size.

    Args:
        rows: the samples.
        metadata: is stored in the schema, under keys that begin with METADATA.
    """
    columns: dict[str, Any] = {"key": pa.array(rows.keys, pa.string())}
    if rows.names is not None:
        columns["name"] = pa.array(rows.names, pa.string())
    columns["shard"] = pa.array(rows.shards, pa.string())
    columns["sample"] = pa.array(rows.samples)
    if rows.labels is not None:
        columns["label"] = pa.array(rows.labels)
    width = int(np.prod(rows.vectors.shape[1:]))
    columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(pa.array(rows.vectors.ravel()), width)
    table = pa.table(columns).replace_schema_metadata({METADATA + name: value for name, value in metadata.items()})
    small = [name for name in columns if name != EMBEDDING]
    file = io.BytesIO()
    pq.write_table(
        table,
        file,
        row_group_size=max(1, min(_GROUP_ROWS, _GROUP_BYTES // (width * rows.vectors.itemsize))),
        compression={**dict.fromkeys(small, "zstd"), f"{EMBEDDING}.list.element": "none"},  # floats hardly shrink
        use_dictionary=[name for name in small if name in ("shard", "label")],
        write_statistics=small,
        sorting_columns=[pq.SortingColumn(list(columns).index("sample"))],
    )
    return file.getvalue()


def npy_shard(rows: Rows) -> bytes:
    """A tar file in which each sample has `<key>.npy`, its embedding, `<key>.json`, and `<key>.cls` if it has a label.

    The bytes depend on the rows alone.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for i, key in enumerate(rows.keys):
            array = io.BytesIO()
            np.save(array, rows.vectors[i], allow_pickle=False)
            add(f"{key}.npy", array.getvalue())
            about: dict[str, Any] = {"sample": int(rows.samples[i]), "shard": rows.shards[i]}
            if rows.names is not None:
                about["name"] = rows.names[i]
            add(f"{key}.json", json.dumps(about, ensure_ascii=False).encode())
            if rows.labels is not None:
                add(f"{key}.cls", str(rows.labels[i]).encode())
    return file.getvalue()
