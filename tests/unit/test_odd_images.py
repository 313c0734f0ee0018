"""Images that every viewer shows: packing and training accept those that Pillow decodes, with Pillow's pixels."""

from __future__ import annotations

import io
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crate_ray.config import DataConfig, PrepareConfig
from crate_ray.data.decode.samples import decode_batch, decode_whole
from crate_ray.data.decode.transforms import Crops, Int64
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack, shard_writer
from crate_ray.data.prepare.sources import open_source
from crate_ray.data.stream import stream
from crate_ray.storage.local import LocalStorage

Pixels = NDArray[np.uint8]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 6, 3), np.uint8))
SIZES = {"small": (43, 37), "large": (150, 131)}  # decoded together, and one by one


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def flat_jpeg(
    size: tuple[int, int], sampling: list[tuple[int, int]], *, restart: int = 0, before: bytes = b"", ids: bytes = b""
) -> bytes:
    """A baseline JPEG of blocks of one colour, with any sampling factors (horizontal, vertical) of its components."""
    random, (width, height), n = np.random.default_rng(1), size, len(sampling)
    per_mcu = sampling if n > 1 else [(1, 1)]
    mcus = -(-width // (8 * max(h for h, _ in per_mcu))) * -(-height // (8 * max(v for _, v in per_mcu)))
    coded, bits, last = b"", "", [0] * n
    for mcu in range(mcus + 1):
        if mcu == mcus or (restart and mcu and mcu % restart == 0):
            bits += "1" * (-len(bits) % 8)
            coded += int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
            coded += bytes((0xFF, 0xD0 + (mcu // restart - 1) % 8)) if mcu < mcus else b""
            bits, last = "", [0] * n
        for component, (h, v) in enumerate(per_mcu if mcu < mcus else ()):
            for value in random.integers(-50, 50, h * v).tolist():
                difference, last[component] = value - last[component], value
                length = abs(difference).bit_length()
                bits += f"{length:04b}" + (
                    f"{difference if difference > 0 else difference + (1 << length) - 1:0{length}b}" if length else ""
                )
                bits += "0"  # no other coefficients
    ids = ids or bytes(range(1, n + 1))
    frame = struct.pack(">BHHB", 8, height, width, n)
    frame += b"".join(bytes((ids[i], h << 4 | v, 0)) for i, (h, v) in enumerate(sampling))
    scan = bytes((n, *(byte for i in range(n) for byte in (ids[i], 0)), 0, 63, 0))
    tables = segment(0xDB, b"\0" + b"\x10" * 64) + segment(0xC4, bytes((0, 0, 0, 0, 12, *[0] * 12, *range(12))))
    tables += segment(0xC4, bytes((0x10, 1, *[0] * 15, 0)))
    tables += segment(0xDD, struct.pack(">H", restart)) if restart else b""
    return b"\xff\xd8" + before + tables + segment(0xC0, frame) + segment(0xDA, scan) + coded + b"\xff\xd9"


JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
SAMPLINGS = {
    "4x2": [(4, 2), (1, 1), (1, 1)],
    "3x1": [(3, 1), (1, 1), (1, 1)],
    "1x3": [(1, 3), (1, 1), (1, 1)],
    "4x1": [(4, 1), (1, 1), (1, 1)],
    "1x4": [(1, 4), (1, 1), (1, 1)],
    "3x2": [(3, 2), (1, 1), (1, 1)],
    "2x2 and 2x1 and 1x2": [(2, 2), (2, 1), (1, 2)],
    "chroma finer than luma": [(1, 1), (2, 2), (1, 1)],
    "4:4:4 as 2x1": [(2, 1)] * 3,
    "4:2:2 as 2x2": [(2, 2), (1, 2), (1, 2)],
    "gray 4x4": [(4, 4)],
}


def odd_jpegs(size: tuple[int, int]) -> dict[str, bytes]:
    """JPEGs that Pillow decodes."""
    picture = PICTURE.resize(size, Image.Resampling.BICUBIC)
    plain, restarts = encoded(picture, quality=90), encoded(picture, quality=90, restart_marker_blocks=2)
    assert plain[2:20] == JFIF
    scan = plain.index(b"\xff\xda")
    restart = restarts.index(b"\xff\xd1", restarts.index(b"\xff\xda"))
    cmyk = encoded(picture.convert("CMYK"))
    adobe = cmyk.index(b"\xff\xee")
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "zeros before the end": plain[:-2] + bytes(7) + plain[-2:],
        "fill bytes before the end": plain[:-2] + b"\xff" * 7 + plain[-2:],
        "zeros behind the end": plain + bytes(9),
        "JFIF 2.1": plain.replace(b"JFIF\0\1\1", b"JFIF\0\2\1"),
        "JFIF 0.0": plain.replace(b"JFIF\0\1\1", b"JFIF\0\0\0"),
        "no JFIF": plain[:2] + plain[20:],
        "a short JFIF": plain[:2] + segment(0xE0, b"JF") + plain[20:],
        "zeros in the header": plain[:20] + bytes(3) + plain[20:],
        "an escaped byte in the header": plain[:20] + b"\xff\0\0" + plain[20:],
        "a long padding in the header": plain[:20] + b"\xff" * 5000 + plain[20:],
        "a restart marker in the header": plain[:20] + b"\xff\xd3" + plain[20:],
        "odd parameters of the scan": plain[: scan + 12] + b"\0" + plain[scan + 13 :],
        "another transform": plain[:20] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\5") + plain[20:],
        "extended": plain.replace(b"\xff\xc0", b"\xff\xc1"),
        "zeros before a restart": restarts[:restart] + bytes(2) + restarts[restart:],
        "another restart": restarts[: restart + 1] + b"\xd5" + restarts[restart + 2 :],
        "CMYK": cmyk,
        "CMYK without Adobe's segment": cmyk[:adobe] + cmyk[adobe + 16 :],
        "YCCK": cmyk.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
        "RGB by its names": flat_jpeg(size, [(1, 1)] * 3, ids=b"RGB"),
        "MPO": encoded(picture, "MPO", save_all=True, append_images=[ImageOps.mirror(picture)]),
        "odd and turned": encoded(picture, exif=exif)[:-2] + bytes(7) + b"\xff\xd9",
        **{
            f"{name}{f', restarts of {restart}' if restart else ''}": flat_jpeg(size, s, restart=restart, before=JFIF)
            for name, s in SAMPLINGS.items()
            for restart in (0, 3)
        },
    }


def other_images(size: tuple[int, int]) -> dict[str, bytes]:
    picture = PICTURE.resize(size, Image.Resampling.BICUBIC)
    mirrored = ImageOps.mirror(picture)
    gray_16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 8
    frames: dict[str, Any] = {"save_all": True, "append_images": [mirrored], "duration": 50}
    palette = picture.convert("P")
    png = encoded(picture, "PNG")
    deep = np.repeat(np.asarray(picture).astype(np.uint16) * 257, 1, 2).astype(">u2")
    return {
        "PNG": png,
        "16-bit gray PNG": encoded(gray_16, "PNG"),
        "16-bit RGB PNG": png_of(deep, 16, 2),
        "16-bit gray and alpha PNG": png_of(deep[..., :2], 16, 4),
        "interlaced PNG": png_of(np.asarray(picture), 8, 2, interlace=True),
        "palette": encoded(palette, "PNG"),
        "palette with transparency": encoded(palette, "PNG", transparency=3),
        "palette with alpha": encoded(palette, "PNG", transparency=bytes(range(256))),
        "palette of 2 bits": encoded(picture.quantize(4), "PNG", bits=2),
        "gray and alpha": encoded(picture.convert("LA"), "PNG"),
        "gray with transparency": encoded(picture.convert("L"), "PNG", transparency=7),
        "one bit": encoded(picture.convert("1"), "PNG"),
        "RGBA": encoded(picture.convert("RGBA"), "PNG"),
        "APNG": encoded(picture, "PNG", **frames),
        "APNG with another first picture": encoded(picture, "PNG", default_image=True, **frames),
        "turned PNG": encoded(picture, "PNG", exif=exif),
        "WebP": encoded(picture, "WEBP", lossless=True),
        "animated WebP": encoded(picture, "WEBP", lossless=True, **frames),
        "turned WebP with alpha": encoded(picture.convert("RGBA"), "WEBP", lossless=True, exif=exif),
    }


def png_of(pixels: NDArray[Any], depth: int, colour: int, *, interlace: bool = False) -> bytes:
    """A PNG of a form that Pillow does not write."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, across in passes if interlace else [(0, 0, 1, 1)]:
        part = pixels[top::down, left::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlace))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


IMAGES = {
    f"{name}, {which}": content
    for which, size in SIZES.items()
    for name, content in (odd_jpegs(size) | other_images(size)).items()
}


def by_pillow(content: bytes) -> Pixels:
    """RGB, upright. 16-bit grayscale is scaled, which Pillow's convert does not do."""
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
        image.seek(0)
        if image.mode.startswith("I"):
            return np.repeat((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)[:, :, None], 3, 2)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def everything(heights: Int64, widths: Int64) -> Crops:
    zeros = np.zeros_like(heights)
    return Crops(zeros, zeros, heights, widths, np.zeros(len(heights), np.bool_))


def trained(content: bytes, hw: tuple[int, int]) -> Pixels:
    out = torch.empty(1, 3, *hw, dtype=torch.uint8)
    assert decode_batch([content], "image", everything, out) == [None]
    return out[0].permute(1, 2, 0).numpy()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", IMAGES)
def test_packing_and_training_show_what_pillow_shows(name: str) -> None:
    expected = by_pillow(IMAGES[name]).astype(int)
    with decode_whole(IMAGES[name]) as image:
        assert np.abs(np.broadcast_to(image.pixels, expected.shape) - expected).max() <= 2
    # Small JPEGs are converted to RGB without rounding and clipping in between.
    assert np.abs(trained(IMAGES[name], expected.shape[:2]) - expected).max() <= 12
    height, width = (2 * side // 3 for side in expected.shape[:2])

    def part(heights: Int64, widths: Int64) -> Crops:
        top, left, rows, columns = (np.array([value]) for value in (5, 3, height, width))
        return Crops(top, left, rows, columns, np.zeros(1, np.bool_))

    out = torch.empty(1, 3, height, width, dtype=torch.uint8)
    assert decode_batch([IMAGES[name]], "image", part, out) == [None]
    assert np.abs(out[0].permute(1, 2, 0).numpy() - expected[5 : 5 + height, 3 : 3 + width]).max() <= 12


def test_an_odd_image_does_not_change_its_neighbours() -> None:
    contents = list(IMAGES.values())

    def decode(contents: list[bytes]) -> torch.Tensor:
        out = torch.empty(len(contents), 3, 32, 32, dtype=torch.uint8)
        assert decode_batch(contents, "image", everything, out) == [None] * len(contents)
        return out

    together = decode(contents)
    for number in range(0, len(contents), 3):
        assert torch.equal(decode(contents[number : number + 1])[0], together[number])
    plain = encoded(PICTURE.resize(SIZES["small"]))
    alike = [plain, plain[:-2] + bytes(7) + plain[-2:], plain]  # with the same header
    pictures = decode(alike)
    assert torch.equal(pictures[0], pictures[2])
    assert (pictures[0].int() - pictures[1].int()).abs().max() <= 5


def test_a_folder_of_odd_images_is_packed_indexed_and_trained_as_a_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever their suffixes say."""
    suffixes = (".jpg", ".JPG", ".JPEG", ".png", ".PNG", ".webp")
    (tmp_path / "source").mkdir()
    (tmp_path / "shards").mkdir()
    with (tmp_path / "shards/a.tar").open("wb") as file, shard_writer(file) as writer:
        for number, content in enumerate(IMAGES.values()):
            (tmp_path / f"source/{number}{suffixes[number % len(suffixes)]}").write_bytes(content)
            writer.write({"__key__": f"{number}", "jpg": content})
    with caplog.at_level(logging.WARNING):
        packed = pack(
            open_source(LocalStorage(tmp_path / "source")),
            LocalStorage(tmp_path / "packed"),
            PrepareConfig(output="unused"),
        )
    assert packed.num_samples == len(IMAGES) and "cannot be decoded" not in caplog.text
    assert "images are odd JPEGs that libjpeg-turbo refuses; Pillow decodes them, which is slower: " in caplog.text
    assert "unknown JFIF revision number" in caplog.text or " more" in caplog.text
    caplog.clear()
    indexed = index_existing(LocalStorage(tmp_path / "shards"))
    assert indexed.num_measured == len(IMAGES) and "images are odd JPEGs" in caplog.text
    for folder in ("packed", "shards"):
        with stream(str(tmp_path / folder), batch_size=len(IMAGES), image_size=32, steps=2) as batches:
            assert [len(batch.images) for batch in batches] == [len(IMAGES)] * 2
            assert not batches.bad.counts


def test_large_images_are_packed_if_they_are_shrunk_or_a_setting_allows_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "source").mkdir()
    content = encoded(Image.new("L", (9000, 8000), 128), quality=20)
    (tmp_path / "source/large.jpg").write_bytes(content)
    (tmp_path / "source/small.jpg").write_bytes(encoded(PICTURE))

    def packed(**options: Any) -> int:
        config = PrepareConfig(output="unused", overwrite=True, **options)
        return pack(open_source(LocalStorage(tmp_path / "source")), LocalStorage(tmp_path / "out"), config).num_samples

    assert packed() == 1
    assert "9000×8000 pixels are more than the limit of 67108864 (max_pixels)" in caplog.text
    assert packed(max_side=100) == 2
    assert load_dataset(LocalStorage(tmp_path / "out")).manifest.total_bytes < 20_000
    assert packed(max_side=100, max_pixels=10**6) == 1
    assert packed(max_pixels=72_000_000) == 2
    assert DataConfig(train="x").max_pixels == 2**26 == PrepareConfig(output="x").largest_image
