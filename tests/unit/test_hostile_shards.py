"""Shards, manifests and indexes that somebody has made to cost time or memory, or to be taken for others."""

from __future__ import annotations

import io
import json
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from crate_ray.data.format import npy
from crate_ray.data.format.dataset import ShardSet, load_dataset, save_dataset
from crate_ray.data.format.index import SHARD_DTYPE, index_shard, is_table, table_dtype
from crate_ray.data.format.manifest import DamagedDataset, Manifest, parse_manifest
from crate_ray.data.format.names import relative, split_name
from crate_ray.data.format.samples import parse_samples, read_table
from crate_ray.data.format.tar import DamagedShard
from crate_ray.data.read.shard_reader import ShardReader
from crate_ray.errors import UserError
from crate_ray.storage.local import LocalStorage

DESCRIBED: dict[str, Any] = {
    "kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 1, "mean": (0.5,), "std": (0.25,),
    "num_measured": 1,
}  # fmt: skip


def member(name: str = "a.jpg", content: bytes = b"x", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    header = info.tobuf(tarfile.USTAR_FORMAT, errors="surrogateescape")
    return header + content + bytes(-len(content) % 512)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return member("pax", records, type=kind)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def quickly(read: Callable[[], object], megabytes: float = 64, seconds: float = 5) -> str:
    """Call a function that may raise a UserError, within bounds of time and memory. Returns the message."""
    tracemalloc.start()
    begun, message = time.thread_time(), ""
    try:
        read()
    except UserError as error:
        message = str(error)
    taken, peak = time.thread_time() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < seconds and peak < megabytes * 2**20
    assert "\n" not in message
    return message


DEEP = b"a/" * 50_000 + b"b.jpg"
TARS = {
    **{f"size {size}": pax(record(b"size", b"%d" % size)) + member() for size in range(-2560, 0, 512)},
    **{
        f"size {size} of a folder": pax(record(b"size", b"%d" % size)) + member(type=tarfile.DIRTYPE)
        for size in range(-2560, 0, 512)
    },
    "negative size, as GNU writes it": member()[:124] + b"\xff" * 12 + member()[136:],
    "size of 5,000 digits": pax(record(b"size", b"9" * 5000)) + member(),
    "size of 4,000 digits": pax(record(b"size", b"9" * 4000)) + member(),
    "path of 50,000 parts": pax(record(b"path", DEEP)) + member(),
    "long path of 50,000 parts": member("x", DEEP, type=tarfile.GNUTYPE_LONGNAME) + member(),
    "many deep paths": b"".join(pax(record(b"path", b"%06d/" % i + DEEP[-900:])) + member() for i in range(2000)),
    "many dots": pax(record(b"path", b"." * 60_000)) + member(),
    "many ./": pax(record(b"path", b"./" * 30_000 + b"x.jpg")) + member(),
    "digits before no hdrcharset": pax(b"1" * 60_000) + member(),
    "large extension": pax(b"1" * 2_000_000) + member(),
    "extension of 8 GiB": pax(b"")[:124] + b"77777777777\0" + pax(b"")[136:] + member(),
    "nested extensions": pax(record(b"comment", b"x")) * 5000 + member(),
    "nested long names": member("x", b"x" * 200, type=tarfile.GNUTYPE_LONGNAME) * 5000 + member(),
    "extensions of many records": pax(b"".join(record(b"k%d" % i, b"") for i in range(4000))) * 200 + member(),
    "nothing but folders": member(type=tarfile.DIRTYPE) * 20_000,
    "the same name in a ring of links": member("a.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg"),
}  # fmt: skip


def with_checksums(shard: bytes) -> bytes:
    """Correct the checksum of the first header, of a shard whose header was changed by hand."""
    header = bytearray(shard[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + shard[512:]


@pytest.mark.parametrize("name", TARS)
@pytest.mark.parametrize("read", [read_table, parse_samples])
def test_tars_cost_little_time_and_memory(name: str, read: Callable[[bytes, str], object]) -> None:
    shard = with_checksums(TARS[name]) + bytes(1024)
    quickly(lambda: read(shard, "x.tar"))


def test_members_with_long_names_belong_to_no_sample() -> None:
    names = ["a" * 1020 + ".jpg", "a" * 1021 + ".jpg", "é" * 510 + ".jpg", "é" * 511 + ".jpg", "a." + "b" * 2000]
    shard = b"".join(pax(record(b"path", name.encode())) + member() for name in names) + bytes(1024)
    table = read_table(shard, "x.tar")
    assert [row.key for row in table.rows] == [names[0][:-4], names[2][:-4]]
    assert [len(name) for name in table.unsafe] == [1024, 515, 1024]
    assert [sample.key for sample in parse_samples(shard)] == [row.key for row in table.rows]


@given(st.text("ab1._/\n\udcffé", max_size=12))
def test_names_are_split_by_webdatasets_rule(name: str) -> None:
    if not (name[:1] in (".", "/", "_") or ".." in name):
        key, suffix = base_plus_ext(name)
        assert split_name(name) == (None if key is None else (key, suffix.lower()))


def test_the_rule_takes_linear_time() -> None:
    for name in (
        "a/" * 500_000,
        "./" * 500_000,
        "a." * 500_000,
        "/" * 1_000_000,
        "__" * 500_000,
        "a/" * 500_000 + ".b",
    ):
        quickly(lambda name=name: (split_name(name), relative(name)), seconds=1)  # type: ignore[misc]


def test_a_wide_key_does_not_widen_a_table_without_bound() -> None:
    """A table has a column of fixed width for keys, so one long key costs as much for every member."""
    wide = pax(record(b"path", b"a" * 60_000 + b".jpg")) + member()
    shard = wide + b"".join(member(f"{i % 3000}.{i // 3000}.jpg", b"") for i in range(9000)) + bytes(1024)
    table = read_table(shard, "x.tar").rows
    index: list[Any] = []
    quickly(lambda: index.append(index_shard(shard, table)), megabytes=16)
    assert len(index[0].table) < len(shard)


# --- Arrays ---------------------------------------------------------------------------------------------------------


def header(text: str) -> bytes:
    data = text.encode() + b"\n"
    return npy.MAGIC + b"\1\0" + len(data).to_bytes(2, "little") + data


SHAPES = {
    "huge": "(99999999999999999999, 1)",
    "of 4,000 digits": f"({'9' * 4000},)",
    "negative": "(-1, 4)",
    "of truths": "(True, True)",
    "of many sides": f"({'1,' * 70})",
    "overflowing": "(4294967296, 4294967296)",
    "nested": "(" * 200 + ")" * 200,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("descr", ["'<f4'", "'|b1'", "[('a', '<f4', (1000, 1000, 1000))]"])
def test_impossible_shapes_are_refused(tmp_path: Path, name: str, descr: str) -> None:
    content = header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {SHAPES[name]}}}") + bytes(64)
    (tmp_path / "a.npy").write_bytes(content)
    for read in (lambda: npy.read(content), lambda: npy.map_file(tmp_path / "a.npy")):
        with pytest.raises(ValueError):
            read()


# --- Manifest and index ---------------------------------------------------------------------------------------------


def manifest(**changed: Any) -> Manifest:
    values = {"num_samples": 3, "num_shards": 1, "total_bytes": 2048, "shard_pattern": "shard-{:06d}.tar"}
    digests = {"shards_sha256": "a" * 64, "index_sha256": "b" * 64}
    return Manifest.model_validate(values | digests | DESCRIBED | changed)


def test_no_flipped_bit_of_a_manifest_passes() -> None:
    original = manifest(num_unsafe=1, unsafe_names=("x.tar: ../é",), classes=("a", "b"), num_classes=2, height=8)
    text = original.to_json()
    assert parse_manifest(text, "here") == original
    passed = []
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        with suppress(DamagedDataset):
            passed.append(parse_manifest(bytes(flipped), "here") == original)
    assert all(passed)


def test_manifests_without_a_checksum_are_read() -> None:
    values = json.loads(manifest().to_json())
    del values["sha256"]
    assert parse_manifest(json.dumps(values).encode(), "here") == manifest()
    assert "sha256" not in manifest().model_dump(), "it is no part of the dataset's identity"


@pytest.mark.parametrize(
    "changed",
    [
        {"num_samples": 2**63}, {"num_samples": -1}, {"channels": 10**9}, {"height": 0}, {"width": 10**12},
        {"num_classes": 10**9}, {"num_classes": -1}, {"mean": ()}, {"std": (1.0, 2.0)}, {"mean": (float("nan"),)},
        {"std": (float("inf"),)}, {"shard_first": 10**4000}, {"num_unsafe": 10**30}, {"num_measured": -5},
    ],
    ids=lambda changed: str(changed)[:30],
)  # fmt: skip
def test_manifests_with_impossible_numbers_are_refused(changed: dict[str, Any]) -> None:
    values = json.loads(manifest().to_json()) | changed
    del values["sha256"]
    with pytest.raises(DamagedDataset, match="^here/manifest.json is damaged: "):
        parse_manifest(json.dumps(values).encode(), "here")


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"version":' * 100_000, b'{"version": %s}' % (b"9" * 5000), b"\xff"]
)
def test_json_bombs_are_damaged_manifests(text: bytes) -> None:
    with pytest.raises(DamagedDataset):
        parse_manifest(text, "here")


def dataset(folder: Path, *, scattered: bool = False) -> tuple[ShardSet, bytes]:
    names = [f"{i}.jpg" for i in range(40)]
    names = names + [f"{i}.cls" for i in range(40)] if scattered else names
    shard = b"".join(member(name, b"7") for name in names) + bytes(1024)
    (folder / "s-0.tar").write_bytes(shard)
    row, entries, table = index_shard(shard, read_table(shard, "s-0.tar").rows)
    if table is not None:
        (folder / "s-0.tar.table.npy").write_bytes(table)
    save_dataset(LocalStorage(folder), ["s-0.tar"], np.array([row], SHARD_DTYPE), [entries], **DESCRIBED)
    return load_dataset(LocalStorage(folder)), shard


def again(folder: Path, shards: np.ndarray[Any, Any], index: np.ndarray[Any, Any]) -> ShardSet:
    """The dataset with other contents of its files, and a manifest that agrees with them."""
    (folder / "manifest.json").unlink()
    save_dataset(LocalStorage(folder), ["s-0.tar"], shards, [index], **DESCRIBED)
    return load_dataset(LocalStorage(folder))


@pytest.mark.parametrize("blocks", [[2**32 - 1, 2, 40], [0, 0, 0], [40, 32, 0], [0, 32, 2**31]])
def test_an_index_that_points_elsewhere_is_damaged(tmp_path: Path, blocks: list[int]) -> None:
    opened, _ = dataset(tmp_path)
    index = opened.index.copy()
    index["block"] = blocks
    changed = again(tmp_path, opened.shards.copy(), index)
    for first in (0, 16, 32):
        message = quickly(lambda first=first: ShardReader(changed).read(first, 8))  # type: ignore[misc]
        assert message == "" or "index.npy does not agree with manifest.json" in message


HUGE = 2**63 + 1


@pytest.mark.parametrize("column", ["sample", "offset", "size"])
@pytest.mark.parametrize("value", [0, 2**31, HUGE, 2**64 - 1])
def test_a_table_that_points_elsewhere_is_damaged(tmp_path: Path, column: str, value: int) -> None:
    opened, _ = dataset(tmp_path, scattered=True)
    table = opened.table(0).copy()
    table[column][5] = value % 2**32 if column == "sample" else value
    content = npy.content_of(table)
    (tmp_path / "s-0.tar.table.npy").write_bytes(content)
    shards = opened.shards.copy()
    shards["table"] = xxhash.xxh3_64_intdigest(content)
    changed = again(tmp_path, shards, opened.index.copy())
    message = quickly(lambda: ShardReader(changed).read(0, 40))
    assert message == "" or "table.npy does not agree with manifest.json" in message
    assert (column, value) in {("offset", 0), ("size", 0)} or message


def test_only_tables_of_members_are_tables(tmp_path: Path) -> None:
    opened, shard = dataset(tmp_path, scattered=True)
    table = opened.table(0)
    assert is_table(table, 40, len(shard))
    for other in (
        table[:0],
        table[:-2],
        table[::-1],
        table.reshape(2, -1),
        table[["sample", "key"]],
        np.zeros(3),
        table.astype(table_dtype(2000, 3)),
        np.array(5),
    ):
        assert not is_table(other, 40, len(shard))
    (tmp_path / "s-0.tar.table.npy").write_bytes(b"no array")
    with pytest.raises(DamagedDataset):
        opened.table(0)


def test_a_damaged_range_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedShard):
        parse_samples(io.BytesIO(pax(record(b"size", b"-512")) + member()).getvalue())
