"""For shards of any origin, ranges hold exactly the samples that stock tarfile and webdataset read from the shard."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext, group_by_keys

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.format import tar as tar_module
from crate_ray.data.format.dataset import ShardSet, load_dataset, save_dataset
from crate_ray.data.format.index import SHARD_DTYPE, index_shard
from crate_ray.data.format.manifest import TABLE_SUFFIX, name_pattern, parse_manifest
from crate_ray.data.format.names import split_name
from crate_ray.data.format.samples import parse_samples, read_table
from crate_ray.data.format.tar import DamagedShard, Member, range_members, whole_members
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack, shard_writer
from crate_ray.data.prepare.sources import Item, Source, find_shards, open_source
from crate_ray.data.prepare.statistics import SampleCounts
from crate_ray.data.read.shard_reader import ShardReader
from crate_ray.errors import UserError
from crate_ray.storage.interface import AlreadyExists, Storage, open_storage
from crate_ray.storage.local import LocalStorage

Samples = list[tuple[str, dict[str, bytes]]]


def local(path: Path) -> Storage:
    return open_storage(str(path), S3Config())


def config(**values: Any) -> PrepareConfig:
    return PrepareConfig(**{"output": "unused", **values})


def picture(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(noise.squeeze(2) if mode == "L" else noise, mode).save(file, kind)
    return file.getvalue()


def tar_of(members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def stock_samples(shard: bytes) -> Samples:
    """What webdataset makes of a shard, keys without './'."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        files = [
            {"fname": info.name, "data": tar.extractfile(info).read(), "__url__": ""}  # type: ignore[union-attr]
            for info in tar
            if info.isreg()
        ]
    return [
        (sample["__key__"].removeprefix("./"), {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in group_by_keys(files)
    ]


def stock_read(path: Path) -> Samples:
    dataset = wds.WebDataset(str(path), shardshuffle=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in dataset]


def gathered(shard: bytes) -> Samples:
    """What stock tarfile reads from a shard, hard links included, by webdataset's keys."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        for info in tar:
            if info.isreg() or info.islnk():
                key, suffix = base_plus_ext(info.name.removeprefix("./"))
                samples.setdefault(key, {})[suffix.lower()] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return list(samples.items())


def read_shard(dataset: ShardSet, shard: int, stride: int = 7) -> Samples:
    """All samples of a shard by what the index says: ranges of it, or its table."""
    name = dataset.shard_name(shard)
    count = int(dataset.samples[shard])
    if dataset.has_table(shard):
        found: list[tuple[str, dict[str, bytes]]] = []
        for row in dataset.table(shard):
            key = row["key"].decode()
            if int(row["sample"]) == len(found):
                found.append((key, {}))
            content = dataset.shard_storage.read(name, int(row["offset"]), int(row["size"]))
            assert xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF == row["digest"]
            assert found[int(row["sample"])][0] == key
            found[int(row["sample"])][1][row["suffix"].decode()] = content
        return found
    found = []
    for first in range(0, count, stride):
        wanted = min(stride, count - first)
        start, end, covered = dataset.byte_range(shard, first, wanted)
        data = dataset.shard_storage.read(name, start, end - start)
        dataset.check(shard, start, data)
        found += plain(parse_samples(data, name))[first - covered :][:wanted]
    return found


def plain(samples: list[Any]) -> Samples:
    return [(key, {suffix: bytes(content) for suffix, content in members.items()}) for key, members in samples]


# --- Parsing and index ----------------------------------------------------------------------------------------------

letters = st.text("abcXYZ019-é語", min_size=1, max_size=12)
keys = st.one_of(
    letters,
    st.builds("{}/{}".format, letters, letters),
    st.builds("{}/{}".format, letters, st.integers(90, 180).map("n".__mul__)),  # past ustar's 100 bytes
)
suffix_sets = st.sets(st.sampled_from(["jpg", "cls", "mask.png", "JSON", "npy"]), min_size=1).map(sorted)
datasets = st.lists(st.tuples(keys, suffix_sets), min_size=1, max_size=70, unique_by=lambda sample: sample[0])


@given(datasets, st.sampled_from(["ustar", "gnu", "pax", "webdataset"]), st.integers(0, 2**32), st.booleans())
def test_ranges_hold_what_stock_readers_read(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, list[str]]], writer: str, seed: int, dots: bool
) -> None:
    rng = random.Random(seed)
    if writer == "ustar":  # cannot hold longer ones
        names = [(key[:80], suffixes) for key, suffixes in names if len(key.encode()) < 80]
        names = names or [("a", ["jpg"])]
    content = {
        (k, s): rng.randbytes(rng.choice([0, 1, 511, 512, 513, 1500])) for k, suffixes in names for s in suffixes
    }
    if writer == "webdataset":
        file = io.BytesIO()
        with wds.TarWriter(file, encoder=False) as tar:
            for key, suffixes in names:
                tar.write({"__key__": key, **{suffix: content[key, suffix] for suffix in suffixes}})
        shard = file.getvalue()
    else:
        tar_format = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[writer]
        before = "./" if dots else ""
        shard = tar_of([(f"{before}{key}.{suffix}", data) for (key, suffix), data in content.items()], tar_format)

    expected = stock_samples(shard)
    assert [key for key, _ in expected] == [key for key, _ in names]
    assert plain(parse_samples(shard)) == expected

    folder = tmp_path_factory.mktemp("shards")
    (folder / "x.tar").write_bytes(shard)
    table = read_table(shard, "x.tar").rows
    assert [(row.key, {s: shard[o : o + n] for s, (o, n) in row.members.items()}) for row in table] == expected
    dataset = _indexed(folder, shard)
    for _ in range(5):
        first = rng.randrange(len(names))
        count = rng.randint(1, len(names) - first)
        start, end, covered = dataset.byte_range(0, first, count)
        samples = plain(parse_samples(dataset.storage.read("x.tar", start, end - start)))
        assert first - 15 <= covered <= first
        assert len(samples) <= count + 30
        assert samples[first - covered :][:count] == expected[first : first + count]


def _indexed(folder: Path, shard: bytes) -> ShardSet:
    """The dataset of one shard whose members are no real images, which packing.index_existing would not take."""
    row, entries, table = index_shard(shard, read_table(shard, "x.tar").rows)
    storage = local(folder)
    if table is not None:
        storage.write("x.tar.table.npy", table)
    described = {"kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 3, "num_measured": 1}
    save_dataset(
        storage, ["x.tar"], np.array([row], SHARD_DTYPE), [entries], **described, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return load_dataset(storage)


@given(datasets, st.sampled_from(["ustar", "gnu", "pax"]), st.randoms(use_true_random=False), st.booleans())
def test_members_anywhere_in_a_shard_and_hard_links_are_gathered(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, list[str]]], writer: str, rng: Any, links: bool
) -> None:
    if writer == "ustar":  # cannot hold longer ones
        names = [(key[:80], suffixes) for key, suffixes in names if len(key.encode()) < 80] or [("a", ["jpg"])]
    members = [f"{key}.{suffix}" for key, suffixes in names for suffix in suffixes]
    rng.shuffle(members)
    file = io.BytesIO()
    tar_format = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[writer]
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for number, name in enumerate(members):
            info = tarfile.TarInfo(rng.choice(["", "./"]) + name)
            content = rng.randbytes(rng.choice([0, 1, 511, 512, 513, 1500]))
            info.size = len(content)
            if links and number and rng.random() < 0.3:  # also to a link
                info.type, info.linkname, info.size = tarfile.LNKTYPE, rng.choice(members[:number]), 0
            tar.addfile(info, io.BytesIO(content))
    shard = file.getvalue()
    folder = tmp_path_factory.mktemp("shards")
    (folder / "x.tar").write_bytes(shard)
    assert read_shard(_indexed(folder, shard), 0) == gathered(shard)


@given(datasets, st.sampled_from(["ustar", "gnu", "pax", "webdataset"]), st.randoms(use_true_random=False))
def test_the_fast_parser_and_tarfile_find_the_same_members(
    names: list[tuple[str, list[str]]], writer: str, rng: Any
) -> None:
    if writer == "ustar":
        names = [(key[:80], suffixes) for key, suffixes in names if len(key.encode()) < 80] or [("a", ["jpg"])]
    file = io.BytesIO()
    if writer == "webdataset":
        with wds.TarWriter(file, encoder=False) as sink:
            for key, suffixes in names:
                sink.write({"__key__": key, **{s: rng.randbytes(rng.choice([0, 1, 512, 700])) for s in suffixes}})
    else:
        tar_format = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[writer]
        with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
            for number, (key, suffixes) in enumerate(names):
                for suffix in suffixes:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.mtime = rng.choice([0, 12.5])
                    info.size = rng.choice([0, 1, 512, 700])
                    if number and rng.random() < 0.1:
                        info.type, info.linkname, info.size = tarfile.LNKTYPE, f"{names[0][0]}.{names[0][1][0]}", 0
                    elif rng.random() < 0.1:
                        info.type, info.size = tarfile.DIRTYPE, 0
                    tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    view = memoryview(file.getvalue())
    with tarfile.open(fileobj=io.BytesIO(view)) as tar:
        stock = [
            Member(i.name, i.offset, i.offset_data, i.size if i.isreg() else 0, i.linkname if i.islnk() else None)
            for i in tar
            if not i.isdir()
        ]
    assert list(range_members(view, "x")) == list(whole_members(view, "x")) == stock
    for start in {0, *(member.start for member in stock[:5])}:  # from any member on
        by_tarfile = list(tar_module._tarfile_members(view, start, "x"))
        assert by_tarfile == [member for member in stock if member.start >= start]


def test_tarfile_does_not_take_damage_for_the_end() -> None:
    """Stock tarfile does: its list of members ends before a damaged header, without an error."""
    members = [("n" * 120 + f"{i}.jpg", bytes([65 + i]) * 600) for i in range(4)]
    for tar_format, header in ((tarfile.GNU_FORMAT, 0), (tarfile.PAX_FORMAT, 0), (tarfile.GNU_FORMAT, 1024)):
        shard = bytearray(tar_of(members, tar_format))
        with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
            start = tar.getmembers()[2].offset
        shard[start + header + 150] ^= 1
        if not header:
            with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
                assert len(tar.getmembers()) == 2
        for read in (read_table, parse_samples):
            with pytest.raises(DamagedShard, match="damaged: .*header at byte"):
                read(bytes(shard), "x.tar")


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"path": "a.jpg"}, "a global header with a file's name or size"),
        ({"size": "3"}, "a global header with a file's name or size"),
        ({"comment": "of git archive"}, None),
    ],
)
def test_global_headers(headers: dict[str, str], message: str | None) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        info = tarfile.TarInfo("1.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"one"))
    shard = file.getvalue()
    if message is None:
        assert plain(parse_samples(shard)) == [("1", {"jpg": b"one"})]
        assert read_table(shard, "x.tar").rows[0].start == 1024, "after the global header"
        return
    with pytest.raises(DamagedShard, match=message):
        read_table(shard, "x.tar")


def test_malformed_sizes_in_headers() -> None:
    for size in ("x", "-512"):
        info = tarfile.TarInfo("1.jpg")
        info.pax_headers = {"size": size}
        with pytest.raises(DamagedShard, match="no valid tar header at byte 0"):
            read_table(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024), "x.tar")
    for size in (-256, -512):  # which would send tarfile back to where it was, for ever
        header = bytearray(tarfile.TarInfo("1.jpg").tobuf(tarfile.GNU_FORMAT))
        header[124:136] = size.to_bytes(12, "big", signed=True)
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        with pytest.raises(DamagedShard, match="no valid tar header at byte 0"):
            read_table(bytes(header) + bytes(1024), "x.tar")


@given(st.integers(0, 2**32), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_damage_is_an_error_of_ours_and_never_another_sample(seed: int, tar_format: int) -> None:
    rng = random.Random(seed)
    long = 1 if tar_format == tarfile.USTAR_FORMAT else 120
    shard = tar_of([(f"{'n' * rng.choice([1, long])}{i}.jpg", b"x" * 600) for i in range(4)], tar_format)
    damaged = bytearray(shard)
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(len(shard))] = rng.randrange(256)
    whole = plain(parse_samples(shard))
    damaged = damaged[: rng.choice([len(shard), rng.randrange(len(shard))])]
    with suppress(UserError):  # a changed name may be that of another member, too
        assert len(read_table(damaged, "x.tar").rows) <= len(whole)
    try:
        samples = plain(parse_samples(damaged))
    except DamagedShard:
        return
    # a flipped byte in a PAX or GNU name block is not covered by any checksum
    assert len(samples) <= len(whole)
    if tar_format == tarfile.USTAR_FORMAT:
        assert [key for key, _ in samples] == [key for key, _ in whole][: len(samples)]


@pytest.mark.parametrize("tar_format", ["gnu", "posix", "oldgnu", "ustar", "v7"])
def test_shards_of_gnu_tar(tmp_path: Path, tar_format: str) -> None:
    source = tmp_path / "source" / "class"
    source.mkdir(parents=True)
    for i in range(40):
        (source / f"{i:03d}.png").write_bytes(picture(i))
        (source / f"{i:03d}.CLS").write_text(str(i % 7))
    (tmp_path / "out").mkdir()
    command = ["tar", "--sort=name", f"--format={tar_format}", "-cf", str(tmp_path / "out/part-7.tar"), "."]
    subprocess.run(command, cwd=tmp_path / "source", check=True)
    manifest = index_existing(local(tmp_path / "out"))
    assert (manifest.num_samples, manifest.num_classes, manifest.suffixes) == (40, 7, ("cls", "png"))
    assert (manifest.channels, manifest.height, manifest.width, manifest.num_measured) == (3, 4, 6, 40)
    dataset = load_dataset(local(tmp_path / "out"))
    start, end, first = dataset.byte_range(0, 20, 3)
    samples = plain(parse_samples(dataset.storage.read(dataset.shard_name(0), start, end - start)))
    assert first == 16
    assert samples == [(f"class/{i:03d}", {"cls": b"%d" % (i % 7), "png": picture(i)}) for i in range(16, 32)]


@pytest.mark.parametrize("tar_format", ["gnu", "posix", "oldgnu", "ustar", "v7"])
@pytest.mark.parametrize("scattered", [False, True])
def test_hard_links_and_scattered_samples_of_gnu_tar(tmp_path: Path, tar_format: str, scattered: bool) -> None:
    source = tmp_path / "source"
    folder = {"v7": "d", "ustar": "d" * 90}.get(tar_format, "dir-" + "d" * 150)
    tail = "" if tar_format in ("v7", "ustar") else "n" * 60
    (source / folder).mkdir(parents=True)
    names = []
    for i in range(37):
        names += [f"./{folder}/{i:03d}{tail}.png", f"./{folder}/{i:03d}{tail}.cls"]
        if i >= 30:  # the content of an earlier picture under a new name
            (source / names[-2]).hardlink_to(source / names[2 * (i - 30)])
        else:
            (source / names[-2]).write_bytes(picture(i))
        (source / names[-1]).write_text(str(i % 7))
    (tmp_path / "out/sub").mkdir(parents=True)
    for shard, part in (("a.tar", names), ("sub/b.tar", names[20:32])):
        listed = sorted(part, key=lambda name: (name[-3:], name)) if scattered else part
        command = ["tar", f"--format={tar_format}", "-cf", str(tmp_path / "out" / shard), "-T", "-"]
        subprocess.run(command, cwd=source, check=True, input="\n".join(listed), text=True)

    manifest = index_existing(local(tmp_path / "out"))
    assert (manifest.num_samples, manifest.num_shards, manifest.num_classes) == (43, 2, 7)
    dataset = load_dataset(local(tmp_path / "out"))
    found = [read_shard(dataset, shard) for shard in range(2)]
    assert found == [gathered((tmp_path / "out" / shard).read_bytes()) for shard in ("a.tar", "sub/b.tar")]
    assert [dataset.has_table(shard) for shard in range(2)] == [True, scattered]
    pictures = {key: members["png"] for key, members in found[0]}
    assert pictures == {f"{folder}/{i:03d}{tail}": picture(i if i < 30 else i - 30) for i in range(37)}
    assert {key: members["cls"] for key, members in found[0]} == {
        key: b"%d" % (i % 7) for i, key in enumerate(sorted(pictures))
    }


def test_shards_of_stock_webdataset_and_img2dataset(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=23, verbose=0) as writer:
        for i in range(60):
            details = {"key": f"{i:09d}", "caption": f"a picture of {i}", "status": "success"}
            writer.write({"__key__": f"{i:09d}", "jpg": picture(i, "JPEG"), "txt": details["caption"], "json": details})
    for shard in range(3):
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 23}')
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    manifest = index_existing(local(tmp_path))
    assert (manifest.num_samples, manifest.num_shards, manifest.shard_pattern) == (60, 3, "{:05d}.tar")
    assert (manifest.suffixes, manifest.image_suffixes) == (("jpg", "json", "txt"), ("jpg",))
    dataset = load_dataset(local(tmp_path))
    assert dataset.samples.tolist() == [23, 23, 14]
    stock = stock_read(tmp_path / "{00000..00002}.tar")
    assert [sample for shard in range(3) for sample in read_shard(dataset, shard)] == stock
    assert stock[59][1]["txt"] == b"a picture of 59"
    assert not list(tmp_path.glob("*.table.npy"))
    assert len(open_source(local(tmp_path)).items) == 60


def test_refused_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [(f"{i}.{s}", b"0") for i in range(3) for s in ("cls", "jpg")]

    def error(shard: bytes) -> str:
        with pytest.raises(UserError) as raised:
            read_table(shard, "s.tar")
        return str(raised.value)

    assert "two samples named '1' (member './1.jpg' is repeated)" in error(tar_of([*good, ("./1.jpg", b"")]))
    assert "truncated: '2.jpg' should end at byte" in error(tar_of(good)[: 512 * 11 + 0])
    assert "damaged" in error(b"no tar at all " * 100)
    for data, method in ((b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")):
        assert f"s.tar is compressed with {method}" in error(data + tar_of(good))
    for kind, what in (
        (tarfile.LNKTYPE, "a hard link, 'x.jpg', to 'y.jpg', which does not come before it"),
        (tarfile.SYMTYPE, "a symbolic link, 'x.jpg'"),
        (tarfile.FIFOTYPE, "a named pipe, 'x.jpg'"),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            info = tarfile.TarInfo("x.jpg")
            info.type, info.linkname = kind, "y.jpg"
            tar.addfile(info)
        assert f"s.tar holds {what}" in error(file.getvalue())
    with (tmp_path / "0.jpg").open("wb") as hole:
        hole.truncate(2**20)
    for tar_format in ("gnu", "posix"):
        command = ["tar", "-C", str(tmp_path), "-S", f"--format={tar_format}", "-cf", "-", "0.jpg"]
        assert "sparse" in error(subprocess.run(command, check=True, capture_output=True).stdout)

    with caplog.at_level(logging.WARNING):
        assert len(read_table(tar_of(good)[: 512 * 12], "s.tar").rows) == 3
    assert "s.tar has no end marker" in caplog.text


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("scattered", [False, True])
def test_unsafe_names_are_left_out_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tar_format: int, scattered: bool
) -> None:
    good = [*(f"{i:02d}" for i in range(36)), "./dot", "a/./b", "..c/d", "x/..y/z", ".../e"]
    unsafe = ["/etc/abs", "../../up", "a/../b", ".//etc/abs", "./../up", "..", "a/b/.."]
    names = [f"{name}.{suffix}" for name in good for suffix in ("cls", "png")]
    for number, name in enumerate(unsafe):  # the first and the last too, and between the members of one sample
        names[number * 15 : number * 15] = [f"{name}.png" if name[-2:] != ".." else f"{name}/x.png"]
    if scattered:
        names.sort(key=lambda name: name[-3:])
    members = [(name, picture(i) if name.endswith("png") else b"1") for i, name in enumerate(names)]
    (tmp_path / "x.tar").write_bytes(tar_of(members, tar_format))
    with caplog.at_level(logging.WARNING):
        manifest = index_existing(local(tmp_path))
    assert "x.tar: skipped 7 members with unsafe names" in caplog.text
    assert all(f"{name}.png" in caplog.text or f"{name}/x.png" in caplog.text for name in unsafe)
    assert manifest.num_samples == len(good) and manifest.num_classes == 2
    content = dict(members)
    expected = [
        (name.removeprefix("./"), {suffix: content[f"{name}.{suffix}"] for suffix in ("cls", "png")}) for name in good
    ]
    dataset = load_dataset(local(tmp_path))
    assert dataset.has_table(0) == scattered
    assert read_shard(dataset, 0) == expected
    source = open_source(local(tmp_path))
    assert len(source.items) == len(good)

    left_out = {f"x.tar: {name}" for name, _ in members if name.removesuffix("/x.png").removesuffix(".png") in unsafe}
    packed = pack(source, local(tmp_path / "packed"), PrepareConfig(output="unused"))
    for described in (dataset.manifest, packed):
        assert described.num_unsafe == 7 and described.left_out == dict.fromkeys(left_out, "unsafe_name")
    # Manifests from before, and of shards without such members, have no word of them.
    later = ("num_unsafe", "unsafe_names", "source_names")
    before = {key: value for key, value in manifest.model_dump(mode="json").items() if key not in later}
    (tmp_path / "manifest.json").write_text(json.dumps(before))
    earlier = load_dataset(local(tmp_path)).manifest
    assert json.loads(earlier.to_json()) == before | {"sha256": earlier.checksum()} and earlier.left_out == {}
    canonical = json.dumps(before, sort_keys=True, separators=(",", ":"))
    assert earlier.digest() == manifest.digest() == hashlib.sha256(canonical.encode()).hexdigest()


def test_of_many_unsafe_names_some_are_kept() -> None:
    counts, part = SampleCounts(), SampleCounts()
    part.add_unsafe([f"x.tar: ../{number}\udcff" for number in range(80)])
    for _ in range(2):
        counts.merge(SampleCounts.model_validate_json(part.model_dump_json()))
    assert counts.num_unsafe == 160 and len(counts.unsafe_names) == 100
    assert counts.unsafe_names[80] == "x.tar: ../0\\udcff"


def test_numbers_too_large_for_octal() -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.jpg")
        info.size = 9 * 2**30
        header = info.tobuf(tar_format) + bytes(1024)
        with pytest.raises(DamagedShard, match=f"should end at byte {len(header) - 1024 + 9 * 2**30}"):
            read_table(header, "s.tar")


# --- Manifest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["shard-000000.tar", "shard-000001.tar"], ("shard-{:06d}.tar", 0)),
        (["a9/x07.tar", "a9/x08.tar", "a9/x09.tar"], ("a9/x{:02d}.tar", 7)),
        (["x9.tar", "x10.tar"], ("x{:01d}.tar", 9)),
        (["x1.tar", "x3.tar"], (None, 0)),
        (["test-0.tar", "train-0.tar"], (None, 0)),
        (["only.tar"], (None, 0)),
    ],
)
def test_name_pattern(names: list[str], pattern: tuple[str | None, int]) -> None:
    assert name_pattern(names) == pattern


def test_manifest_and_files_must_agree(tmp_path: Path) -> None:
    storage = local(tmp_path)
    with pytest.raises(UserError, match=r"no manifest at .*: it is empty or does not exist"):
        load_dataset(storage)
    items = [Item(str(i), lambda i=i: {"png": picture(i)}) for i in range(40)]  # type: ignore[misc]
    manifest = pack(Source(items), storage, config(shard_samples=9))
    digest = manifest.digest()
    assert load_dataset(storage).manifest == manifest
    assert parse_manifest(storage.read("manifest.json"), "").digest() == digest
    assert manifest.model_copy(update={"mean": (0.0, 0.0, 0.0)}).digest() != digest

    text = storage.read("manifest.json")
    for damage, message in (
        (b"{", "is not a JSON object"),
        (text.replace(b'"version": 2', b'"version": 1'), "format version 1, this crate-ray reads version 2"),
        (text.replace(b'"kind": "image"', b'"kind": "sound"'), "damaged: kind"),
        (text.replace(b"{:06d}", b"{0.__class__}"), "damaged: shard_pattern"),
    ):
        assert damage != text
        storage.write("manifest.json", damage)
        with pytest.raises(UserError, match=message):
            load_dataset(storage)
    storage.write("manifest.json", text)
    for name in ("shards.npy", "index.npy"):
        content = storage.read(name)
        storage.write(name, content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} does not agree with manifest.json"):
            load_dataset(storage)
        storage.delete(name)
        with pytest.raises(UserError, match=f"{name} does not exist, although manifest.json refers to it"):
            load_dataset(storage)
        storage.write(name, content)
    assert load_dataset(storage).locate(39) == (4, 3)


def test_a_folder_without_a_manifest_names_the_command_that_makes_one(tmp_path: Path) -> None:
    def error(folder: Path) -> str:
        with pytest.raises(UserError) as raised:
            load_dataset(local(folder))
        return str(raised.value)

    for name, content in (("cat/1.JPG", picture()), ("cat/notes.txt", b""), (".git/x.tar", b"")):
        local(tmp_path / "my photos").write(name, content)
    photos = f"{tmp_path}/my photos"
    assert error(tmp_path / "my photos") == (
        f"no manifest at {photos}: these are images, run `crate-ray prepare --source '{photos}' --output ...`"
    )
    local(tmp_path / "grids").write("a.npy", b"")
    assert "these are grids, run `crate-ray prepare --source" in error(tmp_path / "grids")
    local(tmp_path / "shards").write("x-0.tar", tar_of([("a.png", picture())]))
    shards = f"{tmp_path}/shards"
    assert (
        error(tmp_path / "shards")
        == f"no manifest at {shards}: run `crate-ray prepare --output {shards}` to index the shards"
    )
    index_existing(local(tmp_path / "shards"))
    assert f"there are datasets below it: use {shards}" in error(tmp_path)
    local(tmp_path / "begun").write(".packing/plan.json", b"{}")
    assert "`crate-ray prepare` has not finished there; run it again to continue" in error(tmp_path / "begun")
    local(tmp_path / "texts").write("a.txt", b"")
    assert f"{tmp_path}/texts: it holds a.txt; give the output of `crate-ray prepare" in error(tmp_path / "texts")
    assert not any("overwrite" in error(folder) for folder in (tmp_path, tmp_path / "begun", tmp_path / "texts"))


def test_of_two_that_make_a_dataset_one_wins(tmp_path: Path) -> None:
    """The manifest is written where there is none, and never over another's."""
    manifest = _indexed(tmp_path, tar_of([("a.jpg", b"")])).manifest
    with pytest.raises(AlreadyExists, match=r"manifest\.json already exists"):
        _indexed(tmp_path, tar_of([("b.jpg", b""), ("c.jpg", b"")]))
    assert parse_manifest((tmp_path / "manifest.json").read_bytes(), "") == manifest


# --- Packing --------------------------------------------------------------------------------------------------------


def image_folder(root: Path) -> dict[str, bytes]:
    """Two classes, odd names, a mask, a file that is not what its name says, broken files; content by name."""
    files = {f"cat/deep/IMG_1.{i}.jpg": picture(i, "JPEG") for i in range(30)}
    files |= {f"dog/{i}.PNG": picture(100 + i) for i in range(30)}
    files |= {"dog/m.jpeg": picture(200, "JPEG"), "dog/m.mask.png": picture(201, mode="L")}
    files |= {"cat/really-webp.jpg": picture(202, "WEBP")}
    broken = {"cat/broken.jpg": picture(0, "JPEG", (64, 64))[:700], "cat/text.png": b"text", "dog/.hidden.jpg": b"x"}
    for name, content in (files | broken | {"notes.txt": b"notes"}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return files


def test_stock_webdataset_reads_what_we_pack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = image_folder(tmp_path / "in")
    storage = local(tmp_path / "out")
    manifest = pack(open_source(local(tmp_path / "in")), storage, config(shard_samples=25))
    assert "2 of 64 samples cannot be decoded" in caplog.text
    assert "cat/text.png (not a JPEG, PNG or WebP image)" in caplog.text
    assert (manifest.num_samples, manifest.num_shards, manifest.classes) == (62, 3, ("cat", "dog"))
    assert (manifest.suffixes, manifest.image_suffixes) == (
        ("cls", "jpg", "mask.png", "png", "webp"),
        ("jpg", "png", "webp"),
    )

    dataset = load_dataset(storage)
    ours, stock = [], []
    for shard in range(manifest.num_shards):
        path = storage.local_path(dataset.shard_name(shard))
        assert path is not None
        ours += plain(parse_samples(path.read_bytes()))
        stock += stock_read(path)
    assert ours == stock
    keys = [int(key) for key, _ in ours]
    assert keys == sorted(set(keys)) and set(keys) < set(range(64)), "positions in the packing order, bad ones left out"
    images = [next(m[s] for s in manifest.image_suffixes if s in m) for _, m in ours]
    sources = {content: name for name, content in files.items() if "mask" not in name}
    assert sorted(images) == sorted(sources)
    assert images != list(sources), "shuffled"
    assert all(
        m["cls"] == (b"0" if sources[i].startswith("cat") else b"1") for i, (_, m) in zip(images, ours, strict=True)
    )
    masked = [m for _, m in ours if "mask.png" in m]
    assert [(m["jpg"], m["mask.png"]) for m in masked] == [(files["dog/m.jpeg"], files["dog/m.mask.png"])]

    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]) / 255
    assert manifest.mean == pytest.approx(pixels.mean((0, 1, 2)), rel=1e-5)
    assert manifest.std == pytest.approx(pixels.std((0, 1, 2)), rel=1e-5)


def test_webdatasets_writer_gives_plain_ustar() -> None:
    """The bytes that tarfile gives, and so those of datasets packed before webdataset's writer was used."""
    samples = [
        (f"{i:06d}", {"cls": b"%d" % i, "jpg": b"x" * 511 * i, "_meta": b"1", "mask.png": b""}) for i in range(40)
    ]
    file = io.BytesIO()
    with shard_writer(file) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    expected = tar_of(
        [(f"{key}.{suffix}", content) for key, members in samples for suffix, content in sorted(members.items())]
    )
    assert file.getvalue() == expected


def test_suffixes_that_ustar_cannot_hold_are_packed(tmp_path: Path) -> None:
    members = {"é.txt": b"e", "n" * 120: b"long", "png": picture()}
    pack(Source([Item("a", lambda: members)]), local(tmp_path), config())
    assert read_shard(load_dataset(local(tmp_path)), 0) == [("000000", members)]
    assert stock_read(tmp_path / "shard-000000.tar") == [("000000", members)]


def test_members_that_webdataset_cannot_write_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar_of([("1.png", picture()), ("2.png", picture()), ("2.", b""), ("3.__key__", b"")])
    )
    manifest = pack(open_source(local(tmp_path)), local(tmp_path / "out"), config())
    assert manifest.num_samples == 1
    assert "x.tar/2 (it has a member that webdataset cannot write" in caplog.text


def test_same_input_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    image_folder(tmp_path / "in")
    source = local(tmp_path / "in")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(open_source(source), local(tmp_path / name), config(seed=seed, shard_bytes=20_000))
    content = {name: [(p.name, p.read_bytes()) for p in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert len(content["a"]) > 4
    assert content["a"] == content["b"] != content["c"]


def test_repacking_puts_samples_together(tmp_path: Path) -> None:
    members = [(f"./{i}.{s}", picture(i) if s == "png" else b"%d" % i) for s in ("cls", "png") for i in range(20)]
    (tmp_path / "x-0.tar").write_bytes(tar_of(members))
    index_existing(local(tmp_path))
    assert (tmp_path / "x-0.tar.table.npy").exists()
    manifest = pack(open_source(local(tmp_path), "x-*.tar"), local(tmp_path / "out"), config(shuffle=False))
    assert stock_read(tmp_path / "out/shard-000000.tar") == [
        (f"{i:06d}", {"cls": b"%d" % i, "png": picture(i)}) for i in range(20)
    ]
    assert manifest.num_classes == 20
    assert not load_dataset(local(tmp_path / "out")).has_table(0)
    with pytest.raises(UserError, match=r"no shards named y-\*\.tar under"):
        open_source(local(tmp_path), "y-*.tar")


def test_tables_of_an_overwritten_index_are_removed(tmp_path: Path) -> None:
    storage = local(tmp_path)
    members = [(f"{i}.{s}", picture(i) if s == "png" else b"1") for i in range(3) for s in ("cls", "png")]
    for name in ("a.tar", "sub/b.tar"):
        storage.write(name, tar_of(members[::2] + members[1::2]))
    index_existing(storage)
    assert sorted(path.name for path in tmp_path.rglob("*.table.npy")) == ["a.tar.table.npy", "b.tar.table.npy"]
    assert len(open_source(storage).items) == 6, "the tables are no grids"
    storage.write("sub/b.tar", tar_of(members))
    storage.write("kitchen.table.npy", b"somebody's grid")
    index_existing(storage, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*.table.npy")) == ["a.tar.table.npy", "kitchen.table.npy"]
    dataset = load_dataset(storage)
    assert read_shard(dataset, 0) == read_shard(dataset, 1)
    storage.delete("kitchen.table.npy")
    pack(open_source(storage), storage, config(overwrite=True))
    assert not list(tmp_path.rglob("*.table.npy"))


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        ("*.tar", ["extra-0.tar", "sub/train-0.tar", "train-08.tar", "train-09.tar", "train-10.tar"]),
        ("train-*.tar", ["train-08.tar", "train-09.tar", "train-10.tar"]),
        ("train-{10..08}.tar", ["train-10.tar", "train-09.tar", "train-08.tar"]),
        ("train-{08..10..2}.tar", ["train-08.tar", "train-10.tar"]),
        ("{train,extra}-*.tar", ["train-08.tar", "train-09.tar", "train-10.tar", "extra-0.tar"]),
        ("{train-0{8,9},extra-{0..0}}.tar", ["train-08.tar", "train-09.tar", "extra-0.tar"]),
        ("train-1?.tar::{sub/train,extra}-0.tar", ["train-10.tar", "sub/train-0.tar", "extra-0.tar"]),
        ("train-{08..12}.tar", r"no shards named train-11\.tar, train-12\.tar under .* \(2 of 5 are missing\)"),
        ("{train,test}-*.tar", r"no shards named test-\*\.tar under"),
        ("{train,extra-*.tar", r"the braces .* are not closed"),
        ("old-*.tar", r"no shards named old-\*\.tar .*old-1\.tar\.gz must be decompressed"),
        ("old-{1..2}.tar", r"no shards named old-1\.tar, .*old-1\.tar\.gz must be decompressed"),
    ],
)
def test_names_of_shards(tmp_path: Path, shards: str, names: list[str] | str) -> None:
    storage = local(tmp_path)
    for number in (8, 9, 10):
        storage.write(f"train-{number:02d}.tar", b"")
    for name in ("extra-0.tar", "sub/train-0.tar", "._train-08.tar", "old-1.tar.gz", "train-08.json"):
        storage.write(name, b"")
    if isinstance(names, list):
        assert find_shards(storage, shards) == names
    else:
        with pytest.raises(UserError, match=names):
            find_shards(storage, shards)


def test_shards_elsewhere_are_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = local(tmp_path / "there")
    for name in ("a/x-0.tar", "a/x-1.tar", "b/y.tar"):
        tagged = [(f"{name[0]}{name[4]}-{i}.png", picture(i)) for i in range(20)]
        elsewhere.write(
            name, tar_of([*tagged, *((n.replace("png", "cls"), b"1") for n, _ in tagged if name == "b/y.tar")])
        )
    before = [(info.key, info.etag) for info in elsewhere.list()]
    there = str(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    for number, (shards, base, names) in enumerate(
        [
            (f"{there}/a/x-{{0..1}}.tar", f"{there}/a", ["x-0.tar", "x-1.tar"]),
            (f"file://{there}/a/*.tar", f"{there}/a", ["x-0.tar", "x-1.tar"]),
            (f"{there}/{{b/y,a/x-1}}.tar", there, ["b/y.tar", "a/x-1.tar"]),
            ("./there/b/../a/x-0.tar", f"{there}/a", ["x-0.tar"]),
        ]
    ):
        output = local(tmp_path / f"index-{number}")
        manifest = index_existing(output, shards=shards)
        assert manifest.shards_uri == base
        dataset = load_dataset(output)
        assert [dataset.shard_name(shard) for shard in range(manifest.num_shards)] == names
        for shard, name in enumerate(names):
            assert read_shard(dataset, shard) == gathered((Path(base) / name).read_bytes())
            assert dataset.has_table(shard) == (name == "b/y.tar")
    assert [(info.key, info.etag) for info in elsewhere.list()] == before
    assert index_existing(elsewhere, shards=f"{there}/a/*.tar").shards_uri == f"{there}/a"
    assert index_existing(local(tmp_path / "there/a"), shards=f"{there}/a/*.tar").shards_uri is None
    for shards, message in (
        (f"{there}/a/x-{{0..2}}.tar", r"no shards named x-2\.tar under .*/there/a \(1 of 3"),
        ("s3://{one,other}/x.tar", "in several buckets"),
        ("http://host/x-{0..1}.tar", "unknown scheme 'http'"),
        ("s3://*/x.tar", "names no bucket"),
    ):
        with pytest.raises(UserError, match=message):
            index_existing(local(tmp_path / "more"), shards=shards)


def test_sizes_are_those_of_upright_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpg", "png", "webp"):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{kind}.{kind}", exif=exif)
    Image.new("L", (4, 6)).save(tmp_path / "jpg.mask.png")
    (tmp_path / "upright.png").write_bytes(picture(0, size=(4, 6)))
    manifest = pack(open_source(local(tmp_path)), local(tmp_path / "out"), config())
    assert (manifest.num_samples, manifest.height, manifest.width) == (4, 6, 4)
    again = index_existing(local(tmp_path / "out"), overwrite=True)
    assert (again.height, again.width) == (6, 4)


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    def items(count: int) -> Source:
        return Source([Item(str(i), lambda i=i: {"png": picture(i)}) for i in range(count)])  # type: ignore[misc]

    storage = local(tmp_path)
    first = pack(items(20), storage, config(shard_samples=5))
    with pytest.raises(UserError, match=r"there is a dataset at .* already; .*--overwrite true"):
        pack(items(9), storage, config())
    with pytest.raises(UserError, match="indexed already"):
        index_existing(storage)
    assert load_dataset(storage).manifest == first
    again = index_existing(storage, overwrite=True)
    assert again.model_dump(exclude={"mean", "std"}) == first.model_dump(exclude={"mean", "std"})
    assert again.mean == pytest.approx(first.mean)
    second = pack(items(9), storage, config(shard_samples=5, overwrite=True))
    assert second.num_samples == 9
    names = [f"shard-00000{number}.tar{suffix}" for number in range(2) for suffix in ("", ".names.jsonl")]
    assert [info.key for info in storage.list("shard-")] == names
    storage.delete("manifest.json")
    with pytest.raises(UserError, match="shards without a manifest"):
        pack(items(9), storage, config())


def test_grids(tmp_path: Path) -> None:
    def npy(array: Any) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    grids = np.random.default_rng(0).normal(3, 2, (20, 2, 4, 5)).astype(np.float16)
    bad = {
        "object": npy(np.array([{}], object)),
        "flat": npy(np.zeros(3)),
        "nan": npy(np.full((2, 4, 5), np.nan)),
        "channels": npy(np.zeros((4, 5))),
        "text": npy(np.full((2, 4, 5), "x")),
    }
    for i, grid in enumerate(grids):
        (tmp_path / f"{i:02d}.npy").write_bytes(npy(grid))
    for name, content in bad.items():
        (tmp_path / f"x-{name}.npy").write_bytes(content)
    manifest = pack(open_source(local(tmp_path)), local(tmp_path / "out"), config(shuffle=False))
    assert (manifest.kind, manifest.num_samples, manifest.classes) == ("grid", 20, None)
    assert (manifest.channels, manifest.height, manifest.width) == (2, 4, 5)
    assert manifest.mean == pytest.approx(grids.astype(float).mean((0, 2, 3)), rel=1e-5)
    assert manifest.std == pytest.approx(grids.astype(float).std((0, 2, 3)), rel=1e-5)
    assert [m["npy"] for _, m in stock_read(tmp_path / "out/shard-000000.tar")] == [npy(grid) for grid in grids]


def test_nothing_to_pack_or_index(tmp_path: Path) -> None:
    storage = local(tmp_path)
    with pytest.raises(UserError, match="is empty or does not exist"):
        open_source(local(tmp_path / "absent"))
    (tmp_path / "a.gif").write_bytes(b"GIF")
    with pytest.raises(UserError, match=r"no images .* it holds a\.gif"):
        open_source(storage)
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"none of the 1 samples can be packed: a\.jpg \(not a JPEG"):
        pack(open_source(storage), local(tmp_path / "out"), config())
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"both images \(a\.jpg\) and grids \(a\.npy\)"):
        open_source(storage)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"no shards named \*\.tar .*x\.tar\.gz must be decompressed"):
        index_existing(storage)
    (tmp_path / "x.tar").write_bytes(tar_of([("IMG_1.2.jpg", b""), ("IMG_1.3.jpg", b"")]))
    with pytest.raises(UserError, match=r"no sample .* '2\.jpg' come from dots within file names"):
        index_existing(storage)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("././d.x/a.Mask.PNG", ("d.x/a", "mask.png")),
        ("IMG_1.2.jpg", ("IMG_1", "2.jpg")),
        ("README", None),
        ("a.b/c", None),
        ("__meta__", None),
        ("__meta__/a.jpg", None),
        ("/a.jpg", None),
        ("..a/b..c.jpg", ("..a/b", ".c.jpg")),
    ],
)
def test_split_name(name: str, parts: tuple[str, str] | None) -> None:
    assert split_name(name) == parts


@given(st.text("aB1._/é", min_size=1, max_size=20))
def test_split_name_is_webdatasets_rule(name: str) -> None:
    key, suffix = base_plus_ext(name)
    if name.startswith(("/", "./", "__")) or ".." in name.split("/"):
        return  # where ours differs, see above
    assert split_name(name) == (None if key is None else (key, suffix.lower()))


@pytest.mark.parametrize("split", [False, True], ids=["contiguous", "table"])
def test_keys_that_are_not_utf8_are_text_that_can_be_written(split: bool, tmp_path: Path) -> None:
    """The sample 'caf\xe9' of a Latin-1 archive has the key 'caf\\xe9' wherever it is read; UTF-8 keys stay."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for suffix in ("jpg", "cls"):
            for name in ("caf\xe9", "plain"):
                if suffix == "cls" and not split:
                    continue
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = 1
                archive.addfile(info, io.BytesIO(b"1"))
    table = read_table((tmp_path / "0.tar").read_bytes(), "0.tar").rows
    assert [row.key for row in table] == ["caf\udce9", "plain"]
    indexed = index_shard((tmp_path / "0.tar").read_bytes(), table)
    assert (indexed.table is not None) == split
    storage = LocalStorage(tmp_path)
    if indexed.table is not None:
        storage.write(f"0.tar{TABLE_SUFFIX}", indexed.table)
    rows = np.array([indexed.row], SHARD_DTYPE)
    described = {"kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 3}
    save_dataset(
        storage, ["0.tar"], rows, [indexed.entries], mean=(0.0,) * 3, std=(1.0,) * 3, num_measured=0, **described
    )
    keys = [sample.key for sample in ShardReader(load_dataset(storage)).read(0, 2)]
    assert keys == ["caf\\xe9", "plain"] and all(key.encode() for key in keys)
