"""The index: the offset of every 16th sample of a shard, and digests of the bytes that training reads.

It takes half a byte per sample. A shard whose samples are not contiguous has a table of all its members instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from crate_ray.bounded import MAX_NAME
from crate_ray.data.format import npy
from crate_ray.data.format.samples import TableRow
from crate_ray.data.format.tar import BLOCK, Buffer

INDEX_STRIDE = 16
"""Samples between two entries of the index."""

INDEX_DTYPE = np.dtype([("block", "<u4"), ("digest", "<u4")])
"""An entry of index.npy, for samples 0, 16, 32, … of a shard: the offset of the sample's first header, in tar blocks of
512 bytes, and the low 32 bits of xxh3_64 over the bytes from there to the next entry or the end of the shard."""
SHARD_DTYPE = np.dtype([("samples", "<u4"), ("bytes", "<u8"), ("table", "<u8"), ("sha256", "u1", (32,))])
"""A row of shards.npy: number of samples; size in bytes; xxh3_64 of the shard's table of members, 0 if the samples are
contiguous and it has none; sha256 of the shard."""


def table_dtype(key_bytes: int, suffix_bytes: int) -> np.dtype[np.void]:
    """A row of a table of members: number and key of the sample; suffix, offset, size and digest of the member.

    The digest is the low 32 bits of xxh3_64 over the content.
    """
    return np.dtype(
        [
            ("sample", "<u4"),
            ("digest", "<u4"),
            ("offset", "<u8"),
            ("size", "<u8"),
            ("key", f"S{key_bytes}"),
            ("suffix", f"S{suffix_bytes}"),
        ]
    )


def is_table(table: NDArray[np.void], samples: int, size: int) -> bool:
    """Whether an array can be the table of members of a shard with this number of samples and size in bytes."""
    names = table.dtype.names or ()
    if not {"key", "suffix"} <= set(names) or table.ndim != 1 or not len(table):
        return False
    steps = np.diff(table["sample"].astype(np.int64)) if "sample" in names else np.array([-1])
    return (
        table.dtype == table_dtype(table.dtype["key"].itemsize, table.dtype["suffix"].itemsize)
        and max(table.dtype["key"].itemsize, table.dtype["suffix"].itemsize) <= MAX_NAME
        and bool((table["size"] <= size).all() and (table["offset"] <= np.uint64(size) - table["size"]).all())
        and int(table["sample"][0]) == 0
        and int(table["sample"][-1]) == samples - 1
        and bool(((steps == 0) | (steps == 1)).all())
    )


class ShardIndex(NamedTuple):
    """The index of one shard."""

    row: tuple[Any, ...]
    """Its row of SHARD_DTYPE."""
    entries: NDArray[np.void]
    """Its entries of INDEX_DTYPE."""
    table: bytes | None
    """Content of its table of members (stored as the shard's name + TABLE_SUFFIX), if it needs one."""


def index_shard(buffer: Buffer, rows: Sequence[TableRow], *, whole: bool = True) -> ShardIndex:
    """Index a shard: the offsets of its samples, and digests of all bytes that training reads.

    Args:
        buffer: the shard's bytes.
        rows: its samples, from `read_table`.
        whole: whether these are all of its samples. If not, the shard gets a table, because ranges would hold others.
    """
    view = memoryview(buffer)
    sha256 = np.frombuffer(hashlib.sha256(view).digest(), np.uint8)
    starts = [row.start for row in rows]
    is_contiguous = not rows or (
        whole
        and all(
            row.plain and all(row.start < offset <= after for offset, _ in row.members.values())
            for row, after in zip(rows, [*starts[1:], len(view)], strict=True)
        )
    )
    entries = np.zeros(-(-len(rows) // INDEX_STRIDE), INDEX_DTYPE)
    if is_contiguous:
        edges = [*starts[::INDEX_STRIDE], len(view)]
        for i, (left, right) in enumerate(pairwise(edges)):
            entries[i] = (left // BLOCK, xxhash.xxh3_64_intdigest(view[left:right]) & 0xFFFFFFFF)
        return ShardIndex((len(rows), len(view), 0, sha256), entries, None)
    members = [
        (
            number,
            xxhash.xxh3_64_intdigest(view[offset : offset + size]) & 0xFFFFFFFF,
            offset,
            size,
            row.key.encode("utf-8", "surrogateescape"),
            suffix.encode("utf-8", "surrogateescape"),
        )
        for number, row in enumerate(rows)
        for suffix, (offset, size) in row.members.items()
    ]
    dtype = table_dtype(max(len(m[4]) for m in members), max(1, *(len(m[5]) for m in members)))
    table = npy.content_of(np.array(members, dtype))
    return ShardIndex((len(rows), len(view), xxhash.xxh3_64_intdigest(table), sha256), entries, table)
