"""Finds the samples of a shard: all of them for indexing, or those of a byte range for reading."""

from __future__ import annotations

import logging
from typing import NamedTuple

from crate_ray.bounded import MAX_CLASSES, MAX_NAME
from crate_ray.data.format.names import is_metadata, is_refused, printable, readable, relative, split_name
from crate_ray.data.format.tar import Buffer, DamagedShard, range_members, whole_members
from crate_ray.errors import UserError, first_few

logger = logging.getLogger(__name__)

_LABEL_BYTES, _LABEL_DIGITS = 100, 20
_SHOWN = 100  # characters of a refused name in the log

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Sample(NamedTuple):
    """A sample: its key, and the bytes of its members by suffix."""

    key: str
    """See names.readable."""
    members: dict[str, memoryview]


class TableRow(NamedTuple):
    """Position of a sample in its shard."""

    key: str
    start: int
    """Byte offset of its first header, extension headers included."""
    members: dict[str, tuple[int, int]]
    """Byte offset and size of each member's content, by suffix."""
    plain: bool = True
    """False if a member is a hard link to content elsewhere in the shard."""


class Table(NamedTuple):
    """The content of a shard."""

    rows: list[TableRow]
    """Its samples, in the order of their first members."""
    unsafe: list[str]
    """Members with refused names, which belong to no sample."""


def class_number(content: bytes | memoryview) -> int | None:
    """The class in a `cls` member. None if it is not a number in decimal digits.

    Raises:
        ValueError: the number is too large for a class.
    """
    text = bytes(content[:_LABEL_BYTES]).strip()
    if not text.isdigit():
        return None
    if len(content) > _LABEL_BYTES or len(text) > _LABEL_DIGITS or int(text) >= MAX_CLASSES:
        raise ValueError(f"its class number is not below {MAX_CLASSES}")
    return int(text)


def parse_samples(buffer: Buffer, where: str = "a shard") -> list[Sample]:
    """Samples of a byte range that begins and ends between samples (`ShardSet.byte_range`).

    Args:
        buffer: the bytes; the samples' members are views of them, not copies.
        where: name of the shard in messages.

    Raises:
        DamagedShard: the range is not made of whole, valid members, or a member is repeated or a hard link.
    """
    view = memoryview(buffer)
    samples: list[Sample] = []
    key: str | None = None
    members: dict[str, memoryview] = {}
    for name, _, data, size, link in range_members(view, where):
        parts = split_name(name)
        if parts is None:
            continue
        if link is not None:
            raise DamagedShard(f"{where} holds a hard link, {name!r}, that is not in its index; index it again")
        if parts[0] != key:
            key, members = parts[0], {}
            samples.append(Sample(readable(key), members))
        if parts[1] in members:
            raise DamagedShard(f"{where} holds {name!r} twice")
        members[parts[1]] = view[data : data + size]
    return samples


def read_table(buffer: Buffer, where: str) -> Table:
    """All samples of a shard. This is the only full pass over a shard, and it is made when the shard is indexed.

    The members of a sample may be anywhere in the shard. A hard link counts as a member with the content of its target,
    which tar writes first. Members without a suffix or with a refused name belong to no sample. A warning gives their
    number.

    Args:
        buffer: the shard's bytes, memory-mapped: only headers are touched.
        where: name of the shard in messages.

    Raises:
        DamagedShard: the shard is damaged, truncated or compressed, or holds a dangling hard link or something that is
            not a file.
        UserError: a sample has the same member twice.
    """
    for magic, method in _COMPRESSED.items():
        if bytes(buffer[: len(magic)]) == magic:
            raise DamagedShard(
                f"{where} is compressed with {method}, so parts of it cannot be read on their own; store it as a plain "
                ".tar (compression does not make images smaller)"
            )
    table: list[TableRow] = []
    rows: dict[str, TableRow] = {}
    contents: dict[str, tuple[int, int]] = {}  # by name, for hard links
    linked: set[str] = set()
    ignored: list[str] = []
    unsafe: list[str] = []
    for name, start, data, size, link in whole_members(memoryview(buffer), where):
        content = (data, size) if link is None else contents.get(relative(link))
        if content is None:
            raise DamagedShard(
                f"{where} holds a hard link, {name!r}, to {link!r}, which does not come before it; pack the files "
                "themselves (tar --hard-dereference)"
            )
        contents[relative(name)] = content
        parts = split_name(name)
        if parts is None:
            if is_refused(name):
                unsafe.append(printable(name[:MAX_NAME]))
            else:
                if not is_metadata(name):
                    ignored.append(name)
            continue
        key, suffix = parts
        row = rows.get(key)
        if row is None:
            row = rows[key] = TableRow(key, start, {})
            table.append(row)
        elif suffix in row.members:
            raise UserError(
                f"{where} holds two samples named {key!r} (member {name!r} is repeated); keys must be unique within a "
                "shard: rename the files and pack them again with --source"
            )
        row.members[suffix] = content
        if link is not None:
            linked.add(key)
    if ignored:
        logger.warning("%s: ignored %d members without a suffix, such as %s", where, len(ignored), ignored[0][:_SHOWN])
    if unsafe:
        logger.warning(
            "%s: skipped %d members with unsafe names (absolute, with '..', or of more than %d bytes): %s",
            where, len(unsafe), MAX_NAME, first_few([name[:_SHOWN] for name in unsafe]),
        )  # fmt: skip
    if linked:
        table = [row._replace(plain=False) if row.key in linked else row for row in table]
    return Table(table, unsafe)
