"""Whoever wrote a shard, ranges of it hold exactly the samples that stock tarfile and webdataset read from it."""

from __future__ import annotations

import io
import logging
import random
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import group_by_keys

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.packing import Item, Source, index_existing, open_source, pack
from crate_ray.data.shards import (
    DamagedShard,
    Manifest,
    load_dataset,
    name_pattern,
    parse_samples,
    read_table,
    split_name,
)
from crate_ray.data.storage import Storage, open_storage
from crate_ray.errors import UserError

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


@settings(max_examples=60, deadline=None)
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
    table = read_table(shard, "x.tar")
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


def _indexed(folder: Path, shard: bytes) -> Any:
    """The dataset of one shard whose members are no real images."""
    from crate_ray.data.packing import _index  # its measuring wants real images
    from crate_ray.data.shards import SHARD_DTYPE, save_dataset

    row, offsets = _index(shard, read_table(shard, "x.tar"))
    described = {"kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 3, "num_measured": 1}
    save_dataset(
        local(folder), ["x.tar"], np.array([row], SHARD_DTYPE), [offsets], **described, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return load_dataset(local(folder))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_damage_is_an_error_of_ours_and_never_another_sample(seed: int, tar_format: int) -> None:
    rng = random.Random(seed)
    long = 1 if tar_format == tarfile.USTAR_FORMAT else 120
    shard = tar_of([(f"{'n' * rng.choice([1, long])}{i}.jpg", b"x" * 600) for i in range(4)], tar_format)
    damaged = bytearray(shard)
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(len(shard))] = rng.randrange(256)
    whole = plain(parse_samples(shard))
    try:
        samples = plain(parse_samples(damaged[: rng.choice([len(shard), rng.randrange(len(shard))])]))
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


def test_refused_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [(f"{i}.{s}", b"0") for i in range(3) for s in ("cls", "jpg")]

    def error(shard: bytes) -> str:
        with pytest.raises(UserError) as raised:
            read_table(shard, "s.tar")
        return str(raised.value)

    message = error(tar_of([*good, ("0.txt", b"")]))
    assert "sample '0' do not lie together in s.tar ('0.txt' comes apart" in message
    assert "--source" in message
    assert "two samples named '1' (member './1.jpg' is repeated)" in error(tar_of([*good, ("./1.jpg", b"")]))
    assert "truncated: '2.jpg' should reach to byte" in error(tar_of(good)[: 512 * 11 + 0])
    assert "damaged" in error(b"no tar at all " * 100)
    for data, method in ((b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")):
        assert f"s.tar is compressed with {method}" in error(data + tar_of(good))
    for kind, what in ((tarfile.LNKTYPE, "a hard link"), (tarfile.SYMTYPE, "a symbolic link")):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            info = tarfile.TarInfo("x.jpg")
            info.type, info.linkname = kind, "y.jpg"
            tar.addfile(info)
        assert f"s.tar holds {what}, 'x.jpg'" in error(file.getvalue())
    with (tmp_path / "0.jpg").open("wb") as hole:
        hole.truncate(2**20)
    for tar_format in ("gnu", "posix"):
        command = ["tar", "-C", str(tmp_path), "-S", f"--format={tar_format}", "-cf", "-", "0.jpg"]
        assert "sparse" in error(subprocess.run(command, check=True, capture_output=True).stdout)

    with caplog.at_level(logging.WARNING):
        assert len(read_table(tar_of(good)[: 512 * 12], "s.tar")) == 3
    assert "s.tar has no end marker" in caplog.text


def test_numbers_too_large_for_octal() -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.jpg")
        info.size = 9 * 2**30
        header = info.tobuf(tar_format) + bytes(1024)
        with pytest.raises(DamagedShard, match=f"should reach to byte {len(header) - 1024 + 9 * 2**30}"):
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
    with pytest.raises(UserError, match=r"no manifest at .*; run jobs/prepare.py"):
        load_dataset(storage)
    items = [Item(str(i), lambda i=i: {"png": picture(i)}) for i in range(40)]  # type: ignore[misc]
    manifest = pack(Source(items), storage, config(shard_samples=9))
    digest = manifest.digest()
    assert load_dataset(storage).manifest == manifest
    assert Manifest.model_validate_json(storage.read("manifest.json")).digest() == digest
    assert manifest.model_copy(update={"mean": (0.0, 0.0, 0.0)}).digest() != digest

    text = storage.read("manifest.json")
    for damage, message in (
        (b"{", "is not a JSON object"),
        (text.replace(b'"version": 1', b'"version": 2'), "format version 2, this crate-ray reads version 1"),
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
        with pytest.raises(UserError, match=f"{name} does not agree with manifest.json"):
            load_dataset(storage)
        storage.write(name, content)
    assert load_dataset(storage).locate(39) == (4, 3)


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
    assert [key for key, _ in ours] == [f"{i:06d}" for i in range(62)]
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


def test_same_input_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    image_folder(tmp_path / "in")
    source = local(tmp_path / "in")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(open_source(source), local(tmp_path / name), config(seed=seed, shard_bytes=20_000))
    content = {name: [(p.name, p.read_bytes()) for p in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert len(content["a"]) > 4
    assert content["a"] == content["b"] != content["c"]


def test_repacking_mends_what_cannot_be_indexed(tmp_path: Path) -> None:
    members = [(f"./{i}.{s}", picture(i) if s == "png" else b"%d" % i) for s in ("cls", "png") for i in range(20)]
    (tmp_path / "x-0.tar").write_bytes(tar_of(members))
    with pytest.raises(UserError, match="repack"):
        index_existing(local(tmp_path))
    manifest = pack(open_source(local(tmp_path), "x-*.tar"), local(tmp_path / "out"), config(shuffle=False))
    assert stock_read(tmp_path / "out/shard-000000.tar") == [
        (f"{i:06d}", {"cls": b"%d" % i, "png": picture(i)}) for i in range(20)
    ]
    assert manifest.num_classes == 20
    with pytest.raises(UserError, match=r"no shards named y-\*\.tar under"):
        open_source(local(tmp_path), "y-*.tar")


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
    assert [info.key for info in storage.list("shard-")] == ["shard-000000.tar", "shard-000001.tar"]
    storage.delete("manifest.json")
    with pytest.raises(UserError, match="interrupted"):
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
    ],
)
def test_split_name(name: str, parts: tuple[str, str] | None) -> None:
    assert split_name(name) == parts
