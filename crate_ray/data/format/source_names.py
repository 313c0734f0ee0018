"""The names that packed samples have in their source, such as `dogs/IMG 0007.JPG`.

Packing gives samples new keys. So it writes a list of names beside each shard, `<shard>.names.jsonl`: a JSON object
with the shard's name and sha256, then one with key and name for each sample, in their order. Bytes of a name that are
not UTF-8 are lone surrogates, `\\udc80` to `\\udcff`, as in Python's file names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from crate_ray.bounded import MAX_MEMBER_BYTES
from crate_ray.storage.interface import Storage

SOURCE_NAMES_SUFFIX = ".names.jsonl"
"""Follows the shard's name."""


def source_names_content(shard: str, sha256: str, names: Iterable[tuple[str, str]]) -> bytes:
    """Content of a list, from the keys and names of a shard's samples."""
    rows = ({"shard": shard, "sha256": sha256}, *({"key": key, "name": name} for key, name in names))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", "backslashreplace")  # JSON's form of a lone surrogate, too


def read_source_names(storage: Storage, shard: str, sha256: str | None = None) -> list[tuple[str, str]]:
    """Keys and names of a shard's samples.

    Args:
        storage: the storage of the shard.
        shard: its name.
        sha256: its digest, which the list must state; None if it is not known.

    Raises:
        UserError: there is no list, or it cannot be read.
        ValueError: it is damaged, or belongs to another shard.
    """
    text = storage.read_small(shard + SOURCE_NAMES_SUFFIX, MAX_MEMBER_BYTES).decode()
    try:
        first, *rows = map(json.loads, text.removesuffix("\n").split("\n"))
        if sha256 not in (None, first["sha256"]):
            raise ValueError("it belongs to another shard")
        names = [(str(row["key"]), str(row["name"])) for row in rows]
        for _, name in names:
            name.encode("utf-8", "surrogateescape")  # UnicodeEncodeError, which is a ValueError, for other surrogates
        return names
    except (KeyError, TypeError, RecursionError):
        raise ValueError("it is damaged") from None
