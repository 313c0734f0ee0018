"""Samples that somebody has made to cost time or memory, to end a job, or to change other samples."""

from __future__ import annotations

import io
import logging
import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from crate_ray.bounded import MAX_CLASSES, MAX_MEMBER_BYTES
from crate_ray.config import PrepareConfig
from crate_ray.data.decode import room
from crate_ray.data.decode.samples import decode_batch, read_image_header
from crate_ray.data.decode.transforms import Crops, centre_crops
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.npy import content_of
from crate_ray.data.format.samples import Sample
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack, shard_writer
from crate_ray.data.prepare.shrink import shrink_mask
from crate_ray.data.prepare.sources import Item, Source, in_order, open_source
from crate_ray.data.prepare.statistics import BadSample, grid_statistics, image_statistics
from crate_ray.data.read.content import NO_LABEL, sample_contents
from crate_ray.storage.local import LocalStorage


def encoded(pixels: NDArray[Any], kind: str, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, height: int = 24, width: int = 20) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def decode(contents: list[bytes], kind: Any = "image", channels: int = 3) -> tuple[list[str | None], torch.Tensor]:
    dtype = torch.float32 if kind == "grid" else torch.uint8
    out = torch.zeros(len(contents), channels, 16, 16, dtype=dtype)
    errors = decode_batch(contents, kind, lambda h, w: centre_crops(h, w, (16, 16)), out)
    return [None if error is None else error.cause for error in errors], out


# --- Time -----------------------------------------------------------------------------------------------------------


def progressive(scans: int, side: int = 600) -> bytes:
    content = encoded(noise(0, side, side), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (progressive(3000), "too_large"),
        (b"\xff\xd8" + b"\xff" * 10_000_000, "damaged"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 3_000_000, "damaged"),
        (b"\xff\xd8" + b"\xff\xe1\0\x0aExif\0\0II" * 1_000_000, "damaged"),
        (encoded(noise(0), "PNG")[:33] + b"\0\0\0\0teSt\0\0\0\0" * 500_000, "too_large"),
        (encoded(noise(0), "WEBP", icc_profile=b"any")[:30] + b"EXIF\0\0\0\0" * 500_000, "too_large"),
    ],
    ids=["scans", "fill bytes", "segments", "EXIF segments", "PNG chunks", "WebP chunks"],
)
def test_images_of_many_parts_are_refused_at_once(content: bytes, cause: str) -> None:
    begun = time.thread_time()
    assert decode([content])[0] == [cause]
    with pytest.raises(BadSample):
        image_statistics(content)
    assert time.thread_time() - begun < 2


def test_usual_numbers_of_scans_are_decoded() -> None:
    assert decode([progressive(1), encoded(noise(1), "JPEG")])[0] == [None] * 2


# --- Memory ---------------------------------------------------------------------------------------------------------


def with_chunk(png: bytes, kind: bytes, data: bytes, before: bytes = b"IEND") -> bytes:
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    at = png.index(before) - 4
    return png[:at] + chunk + png[at:]


def test_nothing_is_decoded_to_read_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    png, webp = encoded(noise(0), "PNG"), encoded(noise(0), "WEBP", exif=exif)
    late = with_chunk(png, b"eXIf", exif.tobytes()[6:])

    def opens(*_: object, **__: object) -> None:
        raise AssertionError("Pillow takes memory when it opens an image")

    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", opens)
        assert [read_image_header(content)[:2] for content in (png, late, webp)] == [(24, 20), (20, 24), (20, 24)]
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for content in (
        with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp, b"IDAT"),
        encoded(noise(0), "WEBP", xmp=xmp),
    ):
        assert read_image_header(content)[:2] == (20, 24)


def test_threads_share_the_memory_for_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image is decoded alone, and small ones that come later do not keep it waiting."""
    shared = room._Room(100 * 2**20)
    monkeypatch.setattr(room, "_room", shared)
    taken, most, order, lock = 0, 0, [], threading.Lock()
    large_waits = threading.Event()

    def use(size: int) -> None:
        nonlocal taken, most
        with room.room_for(size * 2**20):
            with lock:
                taken += size
                most = max(most, taken if size <= 100 else 100 if taken == size else 1000)
                order.append(size)
            if not large_waits.is_set():
                large_waits.wait(5)
            time.sleep(0.002)
            with lock:
                taken -= size

    first = [threading.Thread(target=use, args=(30,)) for _ in range(3)]
    large = threading.Thread(target=use, args=(500,))
    later = [threading.Thread(target=use, args=(30,)) for _ in range(20)]
    for thread in (*first, large):
        thread.start()
        time.sleep(0.05)
    for thread in later:
        thread.start()
    large_waits.set()
    for thread in (*first, large, *later):
        thread.join(20)
    assert most <= 100 and order[:4] == [30, 30, 30, 500] and len(order) == 24


def test_little_is_read_ahead_of_packing() -> None:
    held, most = 0, 0
    lock = threading.Lock()

    def load(size: int) -> int:
        nonlocal held, most
        with lock:
            held += size
            most = max(most, held)
        return size

    sizes = [2**27, 2**20, 2**28, 2**29, *[2**26] * 20]
    for found, size in zip(in_order(load, sizes, lambda size: size), sizes, strict=True):
        assert found == size
        held -= size
    assert most <= 2**29 + 2**28


# --- Neighbours -----------------------------------------------------------------------------------------------------


def test_no_jpeg_holds_pixels_of_its_neighbours() -> None:
    """More images behind restart markers: eight, after which the numbers go on as expected, or all up to the end."""
    pictures = [encoded(noise(i, 32, 32), "JPEG", quality=60) for i in range(14)]
    begin = pictures[0].index(b"\xff\xda") + 14
    assert len({picture[:begin] for picture in pictures}) == 1
    alone = [decode([picture])[1][0] for picture in pictures]
    coded = encoded(noise(99, 32, 32), "JPEG", quality=60)[begin:-2]
    for place in (0, 3):
        for count, end in ((8, b""), (len(pictures) - 1 - place, b"\xff\xd9")):
            extra = b"".join(bytes((0xFF, 0xD0 + (place + i) % 8)) + coded for i in range(count))
            hostile = pictures[place][:-2] + extra + end + pictures[place][-2:]
            _, together = decode([*pictures[:place], hostile, *pictures[place + 1 :]])
            for i in range(len(pictures)):
                assert i == place or torch.equal(together[i], alone[i])


@given(st.data())
def test_damage_stays_in_its_image(data: st.DataObject) -> None:
    pictures = [encoded(noise(i, 32, 32), "JPEG", quality=60) for i in range(9)]
    alone = [decode([picture])[1][0] for picture in pictures]
    place = data.draw(st.integers(0, 8))
    damaged = bytearray(pictures[place])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(600, len(damaged) - 3))] = data.draw(st.sampled_from([0, 0xD0, 0xD9, 0xFF, 7]))
    _, together = decode([*pictures[:place], bytes(damaged), *pictures[place + 1 :]])
    for i in range(9):
        assert i == place or torch.equal(together[i], alone[i])


# --- Bad samples ----------------------------------------------------------------------------------------------------


def npy(descr: str, shape: str, data: bytes = bytes(64)) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data


GRIDS = {
    "huge": npy("<f4", "(99999999999999999999, 2)"),
    "overflowing": npy("<f4", "(1, 4294967296, 4294967296)"),
    "of truths": npy("<f4", "(True, True)"),
    "negative": npy("<f4", "(-1, 4)"),
    "of many digits": npy("<f4", f"({'9' * 4000}, 1)"),
    "of too many pixels": npy("|u1", "(1, 100000, 1000)", bytes(10**8)),
    "too large for float32": content_of(np.full((1, 4, 4), 1e200)),
    "not finite": content_of(np.full((1, 4, 4), np.nan)),
    "empty": content_of(np.zeros((0, 4, 4))),
    "of dates": content_of(np.zeros((1, 4, 4), "M8[s]")),
    "no array": b"\x93NUMPY",
}
GOOD_GRIDS = [content_of(np.ones(shape, dtype)) for shape in ((1, 4, 4), (5, 3)) for dtype in ("f8", ">i2", "?", "u1")]


@given(st.sampled_from([*GRIDS.values(), *GOOD_GRIDS]), st.integers(0, 90), st.integers(0, 255), st.booleans())
@example(GRIDS["too large for float32"], 0, 0x93, False)
def test_packing_and_training_refuse_the_same_grids(content: bytes, place: int, value: int, cut: bool) -> None:
    changed = bytearray(content[: len(content) - 8 * cut])
    if place < len(changed):
        changed[place] = value
    content = bytes(changed)
    try:
        channels = grid_statistics(content).channels
    except BadSample:
        assert decode([content], "grid", 1)[0] != [None]
        return
    assert decode([content], "grid", channels)[0] == [None]


def cmyk(seed: int) -> bytes:
    return encoded(noise(seed), "JPEG", "CMYK")


IMAGES = [
    *(encoded(noise(i), kind, mode) for i, (kind, mode) in enumerate([("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "P")])),
    encoded(noise(4), "WEBP"),
    encoded(noise(5, 100, 90), "JPEG", progressive=True),
    encoded(noise(5, 100, 90), "PNG"),
    cmyk(6),
]


@given(st.sampled_from(IMAGES), st.data())
def test_packing_and_training_refuse_the_same_images(content: bytes, data: st.DataObject) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.sampled_from([0, 0xFF, 0xD9, 1, 0x7F]))
    content = bytes(changed[: data.draw(st.sampled_from([len(changed), len(changed) - 2, len(changed) // 2]))])

    def whole(heights: Any, widths: Any) -> Crops:
        zeros = np.zeros_like(heights)
        return Crops(zeros, zeros, heights, widths, np.zeros(len(heights), bool))

    out = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    error = decode_batch([content], "image", whole, out)[0]
    try:
        image_statistics(content, reduce=False)
    except BadSample:
        assert error is not None
        return
    assert error is None


LABELS = {"5,000 digits": b"9" * 5000, "10^18": b"1" + b"0" * 18, "the first too large": str(MAX_CLASSES).encode()}


@pytest.mark.parametrize("label", [*LABELS.values(), b"9" * 4000, b"-3", b"cat", b"", b"\xff"])
@pytest.mark.parametrize("others", [[], [b"3", b" 4\n"]])
def test_labels_that_are_no_classes_are_no_labels(label: bytes, others: list[bytes]) -> None:
    samples = [Sample(str(i), {"jpg": memoryview(b"x"), "cls": memoryview(c)}) for i, c in enumerate([label, *others])]
    contents = sample_contents(samples, ["jpg"], "required")
    assert contents.labels == [NO_LABEL, 3, 4][: len(samples)]
    np.array(contents.labels, np.int64)
    assert [error and error.cause for error in contents.errors] == ["no_label", None, None][: len(samples)]


def test_packing_goes_on_past_every_bad_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    good = encoded(noise(0, 60, 50), "JPEG")
    text = b"upside down\0"  # where a number should be
    entry = b"\x12\x01\x02\0" + len(text).to_bytes(4, "little") + (26).to_bytes(4, "little")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4) + text
    mask = encoded(noise(1, 60, 50), "JPEG", "CMYK")
    files: dict[str | bytes, bytes] = {
        "a/good.jpg": good,
        "a/text orientation.jpg": encoded(noise(0, 60, 50), "JPEG", exif=exif),
        "a/scans.jpg": progressive(300, 40),
        "b/cmyk mask.jpg": good,
        "b/cmyk mask.mask.png": mask,
        b"b/\xff\xfe.jpg": good,
        b"\xe9t\xe9/\xff\xfe bad.jpg": good[:100],
    }
    for name, content in files.items():
        path = source / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.mkfifo(source / "a/pipe.jpg")
    with (source / "a/sparse.png").open("wb") as sparse:
        sparse.truncate(MAX_MEMBER_BYTES + 10)
    with caplog.at_level(logging.WARNING):
        config = PrepareConfig(output=str(tmp_path / "out"), max_side=20, shuffle=False)
        manifest = pack(open_source(LocalStorage(source)), LocalStorage(tmp_path / "out"), config)
    assert manifest.num_samples == 4 and manifest.classes == ("a", "b", "\\udce9t\\udce9")
    assert "3 of 7 samples cannot be decoded, skipped: " in caplog.text
    for name in ("a/scans.jpg", "a/sparse.png", "\\udcff\\udcfe bad.jpg"):
        assert name in caplog.text.replace("\\\\", "\\")
    assert "(not a regular file): a/pipe.jpg" in caplog.text


def test_packing_grids_goes_on_past_every_bad_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = {**GRIDS, "good": content_of(np.ones((1, 4, 4)))}
    items = [Item(name, lambda c=content: {"npy": c}) for name, content in contents.items()]  # type: ignore[misc]
    with caplog.at_level(logging.WARNING):
        manifest = pack(Source(items), LocalStorage(tmp_path), PrepareConfig(output="unused"))
    assert manifest.num_samples == 1 and manifest.mean == (1.0,)
    assert f"{len(GRIDS)} of {len(items)} samples cannot be decoded" in caplog.text
    assert sum(f"{name} (" in caplog.text for name in GRIDS) == 10, "the first ten"


@pytest.mark.parametrize("name", LABELS)
def test_classes_that_are_too_large_are_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    contents = [{"jpg": encoded(noise(i), "JPEG"), "cls": str(i).encode()} for i in range(3)]
    contents[1]["cls"] = LABELS[name]
    with (tmp_path / "x.tar").open("wb") as file, shard_writer(file) as writer:
        for number, members in enumerate(contents):
            writer.write({"__key__": f"{number:03d}", **members})
    storage = LocalStorage(tmp_path)
    with caplog.at_level(logging.WARNING):
        manifest = index_existing(storage)
        packed = pack(open_source(storage), storage.under("packed"), PrepareConfig(output="unused"))
    assert (manifest.num_samples, manifest.num_classes) == (3, 3) and load_dataset(storage).manifest == manifest
    assert (packed.num_samples, packed.num_classes) == (2, 3)
    sentence = f"x.tar/001 (its class number is not below {MAX_CLASSES})"
    assert caplog.text.count(sentence) == 2


def test_names_that_are_not_utf8_are_indexed_and_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "x.tar").open("wb") as file, shard_writer(file) as writer:
        for number, key in enumerate(["a\udcff", "b\udcfe"]):
            writer.write({"__key__": key, "jpg": encoded(noise(number), "JPEG"), "t\udcfd": b"1"})
        writer.write({"__key__": "c\udcff", "txt": b"no image"})
        writer.write({"__key__": "d\udcff", "jpg": b"no image"})
    storage = LocalStorage(tmp_path)
    with caplog.at_level(logging.WARNING):
        manifest = index_existing(storage)
        packed = pack(open_source(storage), storage.under("packed"), PrepareConfig(output="unused"))
    assert manifest.num_samples == 3 and packed.num_samples == 2, "a sample without an image is left out at indexing"
    assert manifest.suffixes == ("jpg", "t\\udcfd", "txt") and load_dataset(storage).manifest == manifest
    assert caplog.text.encode()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_png_masks_of_all_kinds_are_shrunk(mode: str) -> None:
    pixels = (noise(0, 80, 60)[:, :, 0] > 127) * 255
    mask = encoded(pixels.astype(np.uint16), "PNG") if mode == "I;16" else encoded(pixels.astype(np.uint8), "PNG", mode)
    assert Image.open(io.BytesIO(shrink_mask(mask, 30))).size == (30, 40)
    assert Image.open(io.BytesIO(shrink_mask(cmyk(0), 10))).format == "PNG"
    with pytest.raises(BadSample):
        shrink_mask(cmyk(0)[:-9] * 2, 3)
