"""From encoded bytes to model input: every format decodes as with Pillow, for every crop. Bytes that are not a valid
image or grid are refused with a cause, do not affect other samples, and are never executed."""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crate_ray.config import Kind
from crate_ray.data.decode import jpeg as decode_module
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.nvjpeg import check_nvjpeg, decode_batch_cuda
from crate_ray.data.decode.refused import num_refused
from crate_ray.data.decode.samples import decode_batch, read_image_header
from crate_ray.data.decode.transforms import CROP_UNIFORMS, Crops, Int64, centre_crops, random_crops
from crate_ray.data.decode.turbojpeg import LIBRARY_VARIABLE, Region, RegionError, find_turbojpeg
from crate_ray.data.order.hashing import uniform
from crate_ray.data.prepare.statistics import BadSample, image_statistics
from crate_ray.errors import UserError
from tests.uniforms import from_table

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "imagenet-samples"
Pixels = NDArray[np.uint8]


@pytest.fixture(params=["wheels", "libjpeg-turbo 3"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Once with the packages of the registry alone, once with the machine's libjpeg-turbo 3."""
    find_turbojpeg.cache_clear()
    if request.param == "wheels":
        monkeypatch.setenv(LIBRARY_VARIABLE, "")
    elif find_turbojpeg() is None:
        pytest.skip(f"no libjpeg-turbo 3 on this machine (set {LIBRARY_VARIABLE} to its libturbojpeg)")
    find_turbojpeg.cache_clear()
    yield request.param
    find_turbojpeg.cache_clear()


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def detailed(height: int, width: int, seed: int = 0) -> Image.Image:
    """A random picture with more power at coarse scales, as photographs have."""
    random, pixels = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells in (3, 9, 27, 81):
        noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / cells
    return Image.fromarray((pixels * (255 / pixels.max())).astype(np.uint8))


def everything(heights: Int64, widths: Int64) -> Crops:
    zeros = np.zeros_like(heights)
    return Crops(zeros, zeros, heights, widths, np.zeros(len(heights), np.bool_))


def decoded(content: bytes | memoryview, channels: int, hw: tuple[int, int]) -> Pixels:
    """All of an image, at its own size when that is hw."""
    out = torch.empty(1, channels, *hw, dtype=torch.uint8)
    if error := decode_batch([content], "image", everything, out)[0]:
        raise error
    return out[0].permute(1, 2, 0).numpy()


def by_pillow(content: bytes, channels: int) -> Image.Image:
    """Decoded as a whole, upright."""
    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")


def assert_close_to_pillow(contents: Sequence[bytes], size: int, mean: float, low: float) -> None:
    """Mean and 5th percentile of the PSNR of random resized crops against full decode and Pillow's own resize."""
    n = len(contents)
    u = uniform(5, np.arange(n)[:, None], np.arange(CROP_UNIFORMS))
    used: list[Crops] = []

    def rule(heights: Int64, widths: Int64) -> Crops:
        used.append(random_crops(heights, widths, from_table(u), SCALE, RATIO, True))
        return used[0]

    out = torch.empty(n, 3, size, size, dtype=torch.uint8)
    assert decode_batch(contents, "image", rule, out) == [None] * n
    figures = []
    for content, got, top, left, h, w, flip in zip(contents, out, *(c.tolist() for c in used[0]), strict=True):
        box = (left, top, left + w, top + h)
        expected = np.asarray(by_pillow(content, 3).resize((size, size), Image.Resampling.BICUBIC, box))
        figures.append(psnr(got.permute(1, 2, 0).numpy(), expected[:, ::-1] if flip else expected))
    assert np.mean(figures) >= mean, figures
    assert np.percentile(figures, 5) >= low, figures


# --- Every format ---------------------------------------------------------------------------------------------------


PICTURE = detailed(147, 161, seed=5)
GRADIENT_16 = np.add.outer(np.arange(140) * 300, np.arange(130) * 200).astype(np.uint16)
FORMATS = {
    "JPEG 4:2:0": encoded(PICTURE, "JPEG", quality=90),
    "JPEG 4:2:2": encoded(PICTURE, "JPEG", quality=90, subsampling=1),
    "JPEG 4:4:4": encoded(PICTURE, "JPEG", quality=90, subsampling=0),
    "JPEG progressive": encoded(PICTURE, "JPEG", progressive=True),
    "JPEG with restarts": encoded(PICTURE, "JPEG", restart_marker_rows=2),
    "JPEG grayscale": encoded(PICTURE.convert("L"), "JPEG"),
    "JPEG CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "JPEG YCCK": encoded(PICTURE.convert("CMYK"), "JPEG").replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
    "JPEG RGB": encoded(PICTURE, "JPEG", keep_rgb=True),
    "JPEG and bytes behind it": encoded(PICTURE, "JPEG") + b"\0\0\r\n",
    "PNG": encoded(PICTURE, "PNG"),
    "PNG palette": encoded(PICTURE.convert("P"), "PNG"),
    "PNG gray": encoded(PICTURE.convert("L"), "PNG"),
    "PNG RGBA": encoded(PICTURE.convert("RGBA"), "PNG"),
    "PNG gray and alpha": encoded(PICTURE.convert("LA"), "PNG"),
    "PNG bilevel": encoded(PICTURE.convert("1"), "PNG"),
    "WebP lossy": encoded(PICTURE, "WEBP"),
    "WebP lossless": encoded(PICTURE, "WEBP", lossless=True),
    "WebP with alpha": encoded(PICTURE.convert("RGBA"), "WEBP"),
}
SMALL_FORMATS = {
    name: encoded(PICTURE.resize((31, 37)).convert(mode), name.split()[0], **options)
    for name, mode, options in (
        ("JPEG 4:2:0", "RGB", {}),
        ("JPEG 4:4:4 progressive", "RGB", {"subsampling": 0, "progressive": True}),
        ("JPEG grayscale", "L", {}),
        ("JPEG CMYK", "CMYK", {}),
        ("PNG palette", "P", {}),
        ("WEBP", "RGB", {}),
    )
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_decoded_as_pillow_does(library: str, name: str, channels: int) -> None:
    content = FORMATS[name]
    got = decoded(memoryview(content), channels, (147, 161))  # members of a shard are memoryviews
    expected = np.asarray(by_pillow(content, channels)).reshape(147, 161, channels)
    # Luma straight from a JPEG differs by rounding from luma of its RGB, and where that was clipped.
    difference = np.abs(got.astype(int) - expected)
    # CMYK is truncated where Pillow rounds.
    assert difference.mean() < (1.05 if "CMYK" in name or "YCCK" in name else 0.3) and difference.max() <= 8


@pytest.mark.parametrize("name", FORMATS)
def test_the_part_that_a_crop_needs_is_that_part_of_the_whole(library: str, name: str) -> None:
    content, n = FORMATS[name], 12
    whole = decoded(content, 3, (147, 161))
    random = np.random.default_rng(1)
    top, left = random.integers(0, 147 - 64, n), random.integers(0, 161 - 70, n)
    top[0], left[0], top[1], left[1] = 0, 0, 147 - 64, 161 - 70
    side = np.ones(n, np.int64)
    out = torch.empty(n, 3, 64, 70, dtype=torch.uint8)
    crops = Crops(top, left, 64 * side, 70 * side, np.arange(n) % 2 == 1)
    assert decode_batch([content] * n, "image", lambda heights, widths: crops, out) == [None] * n
    for got, t, x, flip in zip(out, top, left, crops.flip, strict=True):
        expected = whole[t : t + 64, x : x + 70]
        difference = np.abs(got.permute(1, 2, 0).numpy().astype(int) - (expected[:, ::-1] if flip else expected))
        # Interpolated chroma at the edge of a region has no neighbours, as at the edge of an image.
        assert difference[:, 1:-1].max() == 0 and difference.mean() < 0.5


@pytest.mark.parametrize("name", SMALL_FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_are_pillows_too(library: str, name: str, channels: int) -> None:
    content, n = SMALL_FORMATS[name], 6
    u = uniform(2, np.arange(n)[:, None], np.arange(CROP_UNIFORMS))
    crops = random_crops(np.full(n, 37), np.full(n, 31), from_table(u), SCALE, RATIO, True)
    out = torch.empty(n, channels, 32, 32, dtype=torch.uint8)
    assert decode_batch([content] * n, "image", lambda heights, widths: crops, out) == [None] * n
    whole = by_pillow(content, channels)
    for got, top, left, h, w, flip in zip(out, *(c.tolist() for c in crops), strict=True):
        cut = whole.crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BICUBIC)
        expected = np.asarray(cut).reshape(32, 32, channels)
        assert psnr(got.permute(1, 2, 0).numpy(), expected[:, ::-1] if flip else expected) >= 45


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [161, 31])  # read in part, and as a whole
def test_pictures_are_put_upright(library: str, side: int, orientation: int) -> None:
    picture = PICTURE.resize((side, side * 3 // 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    contents = [
        encoded(picture, "JPEG", quality=95, subsampling=0, exif=exif),
        encoded(picture, "JPEG", quality=95, subsampling=0, exif=exif.tobytes(), comment=b"before the frame"),
        encoded(picture.convert("CMYK"), "JPEG", quality=95, subsampling=0, exif=exif),
        encoded(picture, "PNG", exif=exif),
        encoded(picture, "WEBP", lossless=True, exif=exif),
    ]
    sizes: list[tuple[int, int]] = []

    def rule(heights: Int64, widths: Int64) -> Crops:
        sizes.extend(zip(heights.tolist(), widths.tolist(), strict=True))
        n = np.ones_like(heights)
        return Crops(3 * n, 5 * n, 12 * n, 9 * n, np.ones(len(n), np.bool_))

    out = torch.empty(len(contents), 3, 12, 9, dtype=torch.uint8)
    assert decode_batch(contents, "image", rule, out) == [None] * len(contents)
    for content, size, got in zip(contents, sizes, out, strict=True):
        upright = by_pillow(content, 3)
        assert size == (upright.height, upright.width) == read_image_header(content)[:2]
        expected = np.asarray(upright)[3:15, 5:14][:, ::-1]
        assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - expected).max() <= (1 if content is contents[2] else 0)


def test_a_header_tells_what_any_decoder_can_be_given() -> None:
    plain = {name for name, content in FORMATS.items() if read_image_header(content).is_plain_jpeg}
    parts = ("4:2:0", "4:2:2", "4:4:4", "progressive", "with restarts", "grayscale")
    assert plain == {f"JPEG {part}" for part in parts}
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not read_image_header(encoded(PICTURE, "JPEG", exif=exif)).is_plain_jpeg
    assert not read_image_header(FORMATS["JPEG 4:2:0"][:-9]).is_plain_jpeg


def test_an_orientation_behind_the_pixels_counts(library: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(PICTURE, "PNG", exif=exif)
    at = content.index(b"eXIf") - 4
    chunk = content[at : at + 12 + int.from_bytes(content[at : at + 4], "big")]
    end = content.index(b"IEND") - 4
    moved = content[:at] + content[at + len(chunk) : end] + chunk + content[end:]
    assert read_image_header(moved)[:2] == (161, 147)
    assert np.array_equal(decoded(moved, 3, (161, 147)), np.asarray(by_pillow(content, 3)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_picture(library: str) -> None:
    content = encoded(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff nothing of it is true")
    assert decoded(content, 3, (147, 161)).shape == (147, 161, 3)


def test_16_bit_pictures_keep_their_range() -> None:
    content = encoded(Image.fromarray(GRADIENT_16), "PNG")
    for channels in (1, 3):
        expected = np.rint(GRADIENT_16 / 257)[:, :, None].repeat(channels, 2)
        assert np.array_equal(decoded(content, channels, (140, 130)), expected)
    measured = image_statistics(content)[1]
    assert measured.mean == pytest.approx([GRADIENT_16.mean() / 65535], abs=0.002)


# --- Quality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 96])
def test_photographs_are_those_of_full_decoding_and_pillow(library: str, size: int) -> None:
    shards = sorted(SAMPLES.glob("*.tar"))
    if not shards:
        pytest.skip(f"no photographs at {SAMPLES}")
    contents: list[bytes] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            contents += [tar.extractfile(i).read() for i in tar if i.name.endswith(".jpg")]  # type: ignore[union-attr]
    assert len(contents) >= 200
    assert_close_to_pillow(contents, size, mean=40, low=35)


@pytest.mark.parametrize("size", [224, 96, 32])
def test_generated_pictures_are_those_of_full_decoding_and_pillow(library: str, size: int) -> None:
    """Sizes up to where each reduced scale is used."""
    contents = []
    for seed, scale in enumerate(np.geomspace(0.3, 20 if size < 224 else 8, 14)):
        picture = detailed(int(size * scale * 0.8) + 3, int(size * scale) + 1, seed)
        for subsampling in (0, 2):
            contents.append(encoded(picture, "JPEG", quality=90, subsampling=subsampling))
    assert_close_to_pillow(contents, size, mean=40, low=35)


@pytest.mark.parametrize("size", [100, 60, 30, 12])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_does_not_shift_the_picture(library: str, size: int, orientation: int) -> None:
    """A fine pattern tells where the pixels come from: a shift by a fifth of an output pixel costs 10 dB."""
    wave = np.sin(np.arange(701) * (2 * math.pi / 5) * size / 600)  # five output pixels long
    pattern = (127 + 60 * np.add.outer(wave, wave)[:, :, None].repeat(3, 2)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(pattern), "JPEG", quality=97, exif=exif)
    upright = by_pillow(content, 3)
    for top, left in ((0, 0), (97, 45), (45, 99), (101, 101)):
        crops = Crops(*(np.array([x]) for x in (top, left, 600, 595)), np.array([False]))
        out = torch.empty(1, 3, size, size, dtype=torch.uint8)
        assert decode_batch([content], "image", lambda h, w, crops=crops: crops, out) == [None]
        box = (left, top, left + 595, top + 600)
        expected = np.asarray(upright.crop(box).resize((size, size), Image.Resampling.BICUBIC))
        assert psnr(out[0].permute(1, 2, 0).numpy(), expected) >= 33


def test_evaluation_resizes_the_shortest_side_and_cuts_the_centre(library: str) -> None:
    contents = [encoded(detailed(h, w, h), "JPEG", quality=95) for h, w in ((375, 500), (480, 333), (97, 96))]
    out = torch.empty(3, 3, 96, 96, dtype=torch.uint8)
    assert not any(decode_batch(contents, "image", lambda h, w: centre_crops(h, w, (96, 96)), out))
    for content, got in zip(contents, out, strict=True):
        expected = ImageOps.fit(by_pillow(content, 3), (96, 96), Image.Resampling.BICUBIC)
        assert psnr(got.permute(1, 2, 0).numpy(), np.asarray(expected)) >= 40


# --- Many at once ---------------------------------------------------------------------------------------------------


def test_bad_samples_do_not_disturb_the_others(library: str) -> None:
    good = [*FORMATS.values(), *SMALL_FORMATS.values()]
    bad = [b"", b"no picture", FORMATS["JPEG 4:2:0"][:-500], SMALL_FORMATS["JPEG 4:2:0"][:-50]]
    mixed = [content for i, content in enumerate(good) for content in (content, bad[i % len(bad)])]

    def rule(heights: Int64, widths: Int64) -> Crops:
        return centre_crops(heights, widths, (32, 32))

    alone, together = (torch.zeros(len(c), 3, 32, 32, dtype=torch.uint8) for c in (good, mixed))
    assert not any(decode_batch(good, "image", rule, alone))
    errors = decode_batch(mixed, "image", rule, together)
    assert not any(errors[::2]) and all(errors[1::2])
    assert torch.equal(together[::2], alone)


def small_jpegs() -> list[bytes]:
    """Of many headers, several of each; of those that are decoded together and of others."""
    contents = []
    for seed in range(3):
        for size in ((32, 32), (31, 17), (9, 8), (64, 64), (33, 40), (5, 3), (1, 1)):
            picture = Image.eval(detailed(*size, seed), lambda value: 70 + value * 2 // 5)  # nothing to clip
            for options in (
                {"subsampling": 0},
                {"subsampling": 1},
                {"subsampling": 2},
                {"subsampling": 2, "optimize": True},
                {"subsampling": 2, "restart_marker_rows": 1},
                {"subsampling": 2, "comment": b"no comment"},
                {"quality": 40 + 20 * seed},
            ):
                contents.append(encoded(picture, "JPEG", **{"quality": 90, **options}))
            contents.append(encoded(picture.convert("L"), "JPEG"))
            contents.append(encoded(picture.convert("CMYK"), "JPEG"))
    return contents


@pytest.mark.parametrize("channels", [1, 3])
def test_small_jpegs_are_pillows_and_do_not_depend_on_their_neighbours(channels: int) -> None:
    contents = small_jpegs()
    n = len(contents)
    u = uniform(7, np.arange(n)[:, None], np.arange(CROP_UNIFORMS))
    order = np.random.default_rng(0).permutation(n)
    used: list[Crops] = []

    def decode(numbers: Sequence[int], others: Sequence[bytes] = ()) -> torch.Tensor:
        def rule(heights: Int64, widths: Int64) -> Crops:
            rows = [*numbers, *([0] * len(others))]
            used.append(random_crops(heights, widths, from_table(u[rows]), SCALE, RATIO, True))
            return used[-1]

        batch = [*(contents[i] for i in numbers), *others]
        out = torch.zeros(len(batch), channels, 32, 30, dtype=torch.uint8)
        errors = decode_batch(batch, "image", rule, out)
        assert not any(errors[: len(numbers)]) and all(errors[len(numbers) :])
        return out[: len(numbers)]

    together = decode(range(n))
    for content, got, top, left, h, w, flip in zip(contents, together, *(c.tolist() for c in used[0]), strict=True):
        cut = by_pillow(content, channels).crop((left, top, left + w, top + h))
        expected = np.asarray(cut.resize((30, 32), Image.Resampling.BICUBIC)).reshape(32, 30, channels)
        # Pillow rounds and clips the whole picture, and again between its two passes.
        assert psnr(got.permute(1, 2, 0).numpy(), expected[:, ::-1] if flip else expected) >= 42
    assert torch.equal(decode(order.tolist()), together[order])
    damaged = [content[:-60] for content in contents if len(content) > 700]
    assert torch.equal(decode(range(n), damaged), together)
    for i in range(0, n, 5):
        assert torch.equal(decode([i])[0], together[i])


def test_threads_do_not_disturb_each_other(library: str) -> None:
    contents = [*FORMATS.values(), *SMALL_FORMATS.values(), FORMATS["JPEG 4:2:0"][:-500]]

    def decode(_: int) -> tuple[list[Any], torch.Tensor]:
        out = torch.zeros(len(contents), 3, 40, 40, dtype=torch.uint8)
        errors = decode_batch(contents, "image", lambda h, w: centre_crops(h, w, (40, 40)), out)
        return [error and error.cause for error in errors], out

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(decode, range(24)))
    for causes, out in results:
        assert causes == results[0][0] and torch.equal(out[:-1], results[0][1][:-1])


@pytest.mark.parametrize("side", [40, 100])  # resized all at once, and one by one
def test_decoded_arrays_are_treated_as_the_encoded_ones(side: int) -> None:
    pictures = [detailed(side, side + 9, seed) for seed in range(3)]
    grids = [np.random.default_rng(seed).normal(size=(3, side, side + 9)) for seed in range(3)]
    out = torch.zeros(6, 3, 24, 20, dtype=torch.uint8)
    rule = lambda h, w: centre_crops(h, w, (24, 20))._replace(flip=np.arange(6) % 3 == 1)  # noqa: E731
    pixels = [np.asarray(picture) for picture in pictures]  # read-only
    assert not any(decode_batch([*(encoded(p, "PNG") for p in pictures), *pixels], "image", rule, out))
    floats = torch.zeros(6, 3, 24, 20)
    assert not any(decode_batch([*(npy(grid) for grid in grids), *grids], "grid", rule, floats))
    assert torch.equal(out[:3], out[3:]) and torch.equal(floats[:3], floats[3:])
    for array in (np.zeros((9, 9, 3)), np.zeros((9, 9), np.uint8), np.zeros((9, 9, 1), np.uint8)):
        error = decode_batch([array], "image", everything, torch.empty(1, 3, 9, 9, dtype=torch.uint8))[0]
        assert error is not None and error.cause == "wrong_shape"


def test_a_batch_may_be_empty() -> None:
    for kind, dtype in (("image", torch.uint8), ("grid", torch.float32)):
        out = torch.empty(0, 3, 8, 8, dtype=dtype)
        assert decode_batch([], kind, lambda h, w: centre_crops(h, w, (8, 8)), out) == []  # type: ignore[arg-type]


# --- What is refused ------------------------------------------------------------------------------------------------


def refusal(content: bytes, kind: Kind = "image", channels: int = 3, **options: int) -> tuple[str, str]:
    """Cause and sentence."""
    out = torch.zeros(1, channels, 16, 16, dtype=torch.uint8 if kind == "image" else torch.float32)
    errors = decode_batch([content], kind, lambda h, w: centre_crops(h, w, (16, 16)), out, **options)
    assert isinstance(errors[0], DecodeError)
    return errors[0].cause, str(errors[0])


JPEG = FORMATS["JPEG 4:2:0"]
BAD_IMAGES = {
    "nothing": (b"", "empty", "empty"),
    "text": (b"this is not an image, " * 20, "not_an_image", "not a JPEG, PNG or WebP image"),
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(made) (w) file\n%%EOF\n",
        "not_an_image",
        "not a JPEG, PNG or WebP image",
    ),
    "GIF": (encoded(PICTURE, "GIF"), "not_an_image", "not a JPEG, PNG or WebP image"),
    "TIFF": (encoded(PICTURE, "TIFF"), "not_an_image", "not a JPEG, PNG or WebP image"),
    "JPEG magic only": (b"\xff\xd8\xff\xe0", "damaged", "header"),
    "JPEG without a frame": (JPEG[:2] + JPEG[JPEG.index(b"\xff\xda") :], "damaged", "header"),
    "JPEG without height": (encoded(PICTURE, "JPEG").replace(b"\0\x93\0\xa1", b"\0\0\0\xa1"), "damaged", "no pixels"),
    "truncated PNG": (FORMATS["PNG"][: len(FORMATS["PNG"]) // 2], "damaged", "PNG"),
    "truncated WebP": (FORMATS["WebP lossy"][: len(FORMATS["WebP lossy"]) // 2], "damaged", ""),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_image_is_refused(name: str) -> None:
    content, cause, sentence = BAD_IMAGES[name]
    got = refusal(content)
    assert got[0] == cause and sentence in got[1]


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("JPEG") and "behind" not in name])
@pytest.mark.parametrize("missing", [1, 2, 3, 40, 0.3, 0.7])
def test_truncated_jpegs_are_damaged_wherever_the_crop_lies(library: str, name: str, missing: float) -> None:
    content = FORMATS[name]
    content = content[: -int(missing if missing >= 1 else missing * len(content))]
    for top in (0, 100):
        crops = Crops(*(np.array([x]) for x in (top, 0, 32, 32)), np.array([False]))
        out = torch.empty(1, 3, 32, 32, dtype=torch.uint8)
        error = decode_batch([content], "image", lambda h, w, crops=crops: crops, out)[0]
        assert error is not None and error.cause == "damaged", (top, missing)


@pytest.mark.parametrize("height", [40, 147])
def test_pixels_that_are_missing_in_the_middle_are_noticed(library: str, height: int) -> None:
    """The picture is the one that viewers show, and it is counted."""
    for name in ("JPEG 4:2:0", "JPEG 4:4:4", "JPEG grayscale", "JPEG CMYK", "JPEG progressive"):
        content = FORMATS[name]
        content = content[: content.index(b"\xff\xda") + 300] + b"\xff\xd9"
        crops = Crops(*(np.array([x]) for x in (0, 0, height, 150)), np.array([False]))
        out = torch.empty(1, 3, 32, 32, dtype=torch.uint8)
        counted = num_refused()
        assert decode_batch([content], "image", lambda h, w, crops=crops: crops, out) == [None]
        assert num_refused() == counted + 1, name
        assert image_statistics(content)[1].refused is not None
        expected = by_pillow(content, 3).resize((32, 32), Image.Resampling.BICUBIC, (0, 0, 150, height))
        assert psnr(out[0].permute(1, 2, 0).numpy(), np.asarray(expected)) >= 40, name


@pytest.mark.parametrize("name", FORMATS)
def test_a_decompression_bomb_is_refused_by_its_header(library: str, name: str) -> None:
    content = FORMATS[name]
    cause, sentence = refusal(content, max_pixels=147 * 161 - 1)
    assert (
        cause == "too_large" and sentence == f"161×147 pixels are more than the limit of {147 * 161 - 1} (max_pixels)"
    )
    out = torch.empty(1, 3, 16, 16, dtype=torch.uint8)
    rule = lambda h, w: centre_crops(h, w, (16, 16))  # noqa: E731
    assert decode_batch([content], "image", rule, out, max_pixels=147 * 161) == [None]


def test_the_header_alone_makes_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """It promises more pixels than follow."""
    png = FORMATS["PNG"]
    header = png[12:16] + (30_000).to_bytes(4, "big") * 2 + png[24:29]
    bombs = {"PNG": png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert refusal(bombs["PNG"])[0] == "too_large"
    extended = encoded(PICTURE, "WEBP", icc_profile=b"any")
    lossy, lossless = FORMATS["WebP lossy"], FORMATS["WebP lossless"]
    assert extended[12:16] == b"VP8X" and lossy[12:16] == b"VP8 " and lossless[12:16] == b"VP8L"
    bombs = {
        "WebP extended": extended[:24] + (15_999).to_bytes(3, "little") * 2 + extended[30:],
        "WebP lossy": lossy[:26] + (16_000).to_bytes(2, "little") * 2 + lossy[30:],
        "WebP lossless": lossless[:21] + (15_999 | 15_999 << 14).to_bytes(4, "little") + lossless[25:],
    }
    for name, content in FORMATS.items():
        if name.startswith("JPEG"):
            bombs[name] = content.replace(b"\0\x93\0\xa1", b"\x75\x30\x75\x30", 1)

    def allocates(*_: object, **__: object) -> None:
        raise AssertionError("Pillow opens a WebP image by allocating for its pixels")

    monkeypatch.setattr(Image, "open", allocates)
    for name, bomb in bombs.items():
        side = 30_000 if "JPEG" in name else 16_000
        assert refusal(bomb) == (
            "too_large",
            f"{side}×{side} pixels are more than the limit of {2**26} (max_pixels)",
        ), name


def frame_of(content: bytes) -> bytes:
    """The segment with a JPEG's size."""
    at = re.search(b"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", content)
    assert at is not None
    return content[at.start() : at.start() + 2 + content[at.start() + 3]]


def shown(height: int, width: int) -> bytes:
    """A frame of another size."""
    frame = frame_of(FORMATS["JPEG 4:4:4"])
    return frame[:5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + frame[9:]


def hidden(height: int, width: int, size: int) -> bytes:
    """A comment with such a frame; fill bytes lead to it wherever one takes the header to go on."""
    content = shown(height, width)[1:].rjust(size - 4, b"\xff")
    return b"\xff\xfe" + (size - 2).to_bytes(2, "big") + content


BEFORE = st.one_of(
    st.builds(shown, st.sampled_from([40, 90]), st.just(48)),
    st.builds(hidden, st.sampled_from([40, 90]), st.just(48), st.sampled_from([30, 65_000])),
    st.integers(0, 255).map(lambda marker: bytes([0xFF, marker])),
    st.builds(lambda marker, size: bytes([0xFF, marker, 0, size]), st.integers(0, 255), st.integers(0, 5)),
    st.binary(max_size=4),
)


def assert_one_size_or_refused(content: bytes) -> None:
    """Whatever is decoded has the size that was judged."""
    sizes: list[tuple[int, int]] = []

    def rule(heights: Int64, widths: Int64) -> Crops:
        sizes.append((int(heights[0]), int(widths[0])))
        return centre_crops(heights, widths, (32, 32))

    out = torch.empty(1, 3, 32, 32, dtype=torch.uint8)
    error = decode_batch([content], "image", rule, out)[0]
    try:
        measured = image_statistics(content)[1].size
    except BadSample:
        measured = None
    try:
        judged = read_image_header(content)[:2]
    except DecodeError:
        assert error is not None and measured is None
        return
    if error is None:
        assert simplejpeg.decode_jpeg_header(content, strict=False)[:2] == judged == sizes[0]
    assert measured in (None, judged)


@given(st.sampled_from([name for name in FORMATS if "JPEG" in name]), st.lists(BEFORE, max_size=4), st.booleans())
@example("JPEG progressive", [b"\xff\x01", hidden(90, 100, 65_000), hidden(90, 100, 65_000)], False)
@example("JPEG 4:4:4", [shown(40, 48)], True)
@example("JPEG 4:4:4", [b"\0" + shown(40, 48)[1:]], True)
def test_the_size_that_is_judged_is_the_size_that_is_decoded(name: str, before: list[bytes], late: bool) -> None:
    content = FORMATS[name]
    at = content.index(frame_of(content)) if late else 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_one_size_or_refused(content[:at] + b"".join(before) + content[at:])


@pytest.mark.parametrize("marker", [0x01, 0xD0, 0xD7])
def test_a_bomb_behind_a_marker_without_a_length_is_refused(library: str, marker: int) -> None:
    bomb = bytes([0xFF, marker]) + 2 * hidden(90, 100, 65_000)
    for name in ("JPEG 4:2:0", "JPEG progressive"):
        content = FORMATS[name]
        out = torch.empty(1, 3, 16, 16, dtype=torch.uint8)
        rule = lambda h, w: centre_crops(h, w, (16, 16))  # noqa: E731
        assert decode_batch([content[:2] + bomb + content[2:]], "image", rule, out, max_pixels=90 * 100)[0] is not None


def test_a_second_frame_is_not_measured() -> None:
    at = JPEG.index(frame_of(JPEG))
    with pytest.raises(BadSample, match="damaged"):
        image_statistics(JPEG[:at] + shown(40, 48) + JPEG[at:])


def test_images_for_other_numbers_of_channels_are_refused() -> None:
    cause, sentence = refusal(FORMATS["PNG"], channels=4)
    assert cause == "wrong_shape"
    assert sentence == "images have 1 or 3 channels, the model has 4; store other data as .npy grids"


@given(st.sampled_from([*FORMATS.values(), *SMALL_FORMATS.values()]), st.data())
def test_damaged_bytes_decode_or_are_refused(content: bytes, data: st.DataObject) -> None:
    out = torch.empty(2, 3, 32, 32, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = decode_batch(
            [damage(content, data), JPEG], "image", lambda h, w: centre_crops(h, w, (32, 32)), out, max_pixels=2**20
        )
    assert (errors[0] is None or isinstance(errors[0], DecodeError)) and errors[1] is None


def damage(content: bytes, data: st.DataObject) -> bytes:
    """Cut off, or changed in up to six bytes, of the header above all."""
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    last = min(len(damaged), data.draw(st.sampled_from([80, 250, 700, len(content)]))) - 1
    for _ in range(data.draw(st.integers(0 if len(damaged) < len(content) else 1, 6))):
        if last >= 0:
            damaged[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    return bytes(damaged)


# --- The library ----------------------------------------------------------------------------------------------------


def test_a_named_library_that_does_not_serve_is_an_error_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "libturbojpeg.so"
    text.write_text("not a library")
    for path in (str(text), "libm.so.6"):
        monkeypatch.setenv(LIBRARY_VARIABLE, path)
        find_turbojpeg.cache_clear()
        with pytest.raises(UserError, match=rf"{LIBRARY_VARIABLE} names {path}, which is not libturbojpeg"):
            refusal(JPEG)
    find_turbojpeg.cache_clear()


def test_regions_outside_of_the_image_are_refused() -> None:
    turbo = find_turbojpeg()
    if turbo is None:
        pytest.skip(f"no libjpeg-turbo 3 on this machine (set {LIBRARY_VARIABLE} to its libturbojpeg)")
    turbo.decode(JPEG, (147, 161), Region(100, 16, 47, 145), np.empty((47, 145, 3), np.uint8), 3)
    for region in (Region(100, 16, 48, 145), Region(0, 8, 10, 10), Region(-1, 0, 5, 5), Region(0, 176, 1, 1)):
        with pytest.raises(RegionError):
            turbo.decode(JPEG, (147, 161), region, np.empty((region.height, region.width, 3), np.uint8), 3)
    with pytest.raises(ValueError, match="does not hold"):
        turbo.decode(JPEG, (147, 161), Region(0, 0, 10, 10), np.empty((9, 10, 3), np.uint8), 3)
    with pytest.raises(RegionError, match="has 161×147 pixels, not 100×90"):
        turbo.decode(JPEG, (90, 100), Region(0, 0, 10, 10), np.empty((10, 10, 3), np.uint8), 3)


@pytest.mark.parametrize(
    ("crop", "size", "factor"),
    [
        ((100, 200, 224, 230), 224, 1),
        ((333, 0, 300, 300), 32, 1),  # small already
        ((90, 300, 640, 641), 210, 2),
        ((0, 200, 800, 800), 100, 4),
        ((0, 0, 800, 1000), 60, 8),
    ],
)
def test_only_the_region_of_the_crop_is_decoded_and_large_ones_at_a_reduced_scale(
    monkeypatch: pytest.MonkeyPatch, crop: tuple[int, int, int, int], size: int, factor: int
) -> None:
    asked: list[tuple[Region, int]] = []

    class Library:
        """Cuts what libjpeg-turbo 3 would only decode in part."""

        def decode(
            self, content: bytes, hw: tuple[int, int], region: Region, out: Pixels, channels: int, factor: int
        ) -> None:
            assert hw == (800, 1000)
            asked.append((region, factor))
            scaled = {"min_height": -(-800 // factor), "min_width": 1000 // factor, "min_factor": factor}
            whole = simplejpeg.decode_jpeg(content, "RGBX", **scaled)
            assert channels == 4 and whole.shape[:2] == (scaled["min_height"], scaled["min_width"])
            out[...] = whole[region.top :, region.left :][: region.height, : region.width]

    content = encoded(detailed(800, 1000), "JPEG", quality=90)
    crops = Crops(*(np.array([x]) for x in crop), np.array([False]))
    images = []
    for library in (None, Library()):
        monkeypatch.setattr(decode_module, "find_turbojpeg", lambda library=library: library)
        out = torch.empty(1, 3, size, size, dtype=torch.uint8)
        assert decode_batch([content], "image", lambda h, w: crops, out) == [None]
        images.append(out.numpy())
    assert np.array_equal(*images)
    ((region, used),) = asked
    top, left, height, width = crop
    assert used == factor
    # In pixels of the whole image: at most an MCU more on the left, and what scaling cannot cut.
    assert top - factor < region.top * factor <= top
    assert left - factor - 16 < region.left * factor <= left and region.left * factor % 16 == 0
    assert top + height <= (region.top + region.height) * factor < top + height + factor
    assert left + width <= (region.left + region.width) * factor < left + width + factor


# --- On the GPU -----------------------------------------------------------------------------------------------------


def test_decoding_on_a_gpu_that_is_not_there_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="needs a CUDA device, not cpu: set it to 'cpu', or use a machine with a GPU"):
        check_nvjpeg(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gpu_decodes_as_the_cpu_does(channels: int) -> None:
    pytest.importorskip("torchvision")
    contents = [*FORMATS.values(), b"", b"no picture", FORMATS["JPEG 4:2:0"][:-500]]
    n = len(contents)
    u = uniform(5, np.arange(n)[:, None], np.arange(CROP_UNIFORMS))

    def rule(heights: Int64, widths: Int64) -> Crops:
        return random_crops(heights, widths, from_table(u), SCALE, RATIO, True)

    expected = torch.zeros(n, channels, 96, 96, dtype=torch.uint8)
    out = torch.zeros_like(expected, device="cuda")
    errors = decode_batch(contents, "image", rule, expected)
    got = decode_batch_cuda(contents, "image", rule, out)
    assert [error and error.cause for error in got] == [error and error.cause for error in errors]
    for a, b, error in zip(out.cpu().numpy(), expected.numpy(), errors, strict=True):
        assert error is not None or psnr(a, b) >= 35
    grids, out = [npy(np.full((channels, 9, 9), 2.0))], torch.empty(1, channels, 4, 4, device="cuda")
    assert decode_batch_cuda(grids, "grid", lambda h, w: centre_crops(h, w, (4, 4)), out) == [None]
    assert (out == 2).all()


# --- Grids ----------------------------------------------------------------------------------------------------------


def npy(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("side", [20, 200])  # resized all at once, and one by one
def test_grids_keep_their_numbers(side: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 100, (2, side, side + 3))
    arrays = [numbers.astype(t) for t in (np.float16, np.float64, np.int16, np.uint8, bool, ">f4")]
    arrays.append(np.asfortranarray(arrays[1]))
    out = torch.empty(len(arrays), 2, side, side + 3)
    assert not any(decode_batch([memoryview(npy(a)) for a in arrays], "grid", everything, out))
    for array, got in zip(arrays, out.numpy(), strict=True):
        assert np.array_equal(got, array.astype(np.float32))
    flat = torch.empty(1, 1, side, side + 3)
    assert decode_batch([npy(numbers[0])], "grid", everything, flat) == [None]
    assert np.array_equal(flat[0, 0].numpy(), numbers[0])


def test_grids_of_any_sizes_are_cut_resized_and_mirrored() -> None:
    random = np.random.default_rng(0)
    grids = [random.normal(size=(2, h, w)) * 100 - 7 for h, w in ((30, 40), (64, 64), (120, 90), (30, 40), (1, 1))]
    n = len(grids)
    u = uniform(3, np.arange(n)[:, None], np.arange(CROP_UNIFORMS))
    used: list[Crops] = []

    def rule(heights: Int64, widths: Int64) -> Crops:
        used.append(random_crops(heights, widths, from_table(u), SCALE, RATIO, True))
        return used[0]

    out = torch.empty(n, 2, 24, 20)
    assert not any(decode_batch([npy(grid) for grid in grids], "grid", rule, out))
    for grid, got, top, left, h, w, flip in zip(grids, out.numpy(), *(c.tolist() for c in used[0]), strict=True):
        for channel, plane in zip(got, grid[:, top : top + h, left : left + w], strict=True):
            image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
            expected = np.asarray(image.resize((20, 24), Image.Resampling.BICUBIC))
            assert np.allclose(channel, expected[:, ::-1] if flip else expected, atol=2e-3)


class Payload:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickles_in_a_grid_are_refused_and_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    objects = np.empty(1, object)
    objects[0] = Payload(made)
    for content in (npy(objects, allow_pickle=True), pickle.dumps(Payload(made))):
        assert refusal(content, "grid", 1)[0] == "pickled"
        assert not made.exists()
    np.load(io.BytesIO(npy(objects, allow_pickle=True)), allow_pickle=True)
    assert made.exists()  # the payload does work where it is let


def test_what_is_no_grid_is_refused() -> None:
    archive = io.BytesIO()
    np.savez(archive, np.zeros(3))
    plain = npy(np.zeros((2, 2)))
    huge = plain.replace(b"(2, 2)", b"(99999, 99999)").replace(b" " * 20, b" " * 12, 1)
    nan, infinite, beyond = np.ones((1, 3, 3)), np.ones((1, 3, 3)), np.ones((1, 3, 3))
    nan[0, 1, 1], infinite[0, 1, 1], beyond[0, 1, 1] = math.nan, -math.inf, 1e300
    shape = "but the model expects (1, height, width)"
    for content, cause, sentence in (
        (b"", "empty", "empty"),
        (npy(np.zeros((2, 3, 4))), "wrong_shape", f"shape (2, 3, 4), {shape}"),
        (npy(np.zeros(3)), "wrong_shape", f"shape (3,), {shape}"),
        (npy(np.zeros((1, 1, 3, 3))), "wrong_shape", f"shape (1, 1, 3, 3), {shape}"),
        (npy(np.zeros((1, 0, 4))), "wrong_shape", f"shape (1, 0, 4), {shape}"),
        (npy(np.zeros((2, 2), complex)), "not_numbers", "an array of complex128"),
        (npy(np.array([["a"]])), "not_numbers", "an array of <U1"),
        (npy(np.zeros((2, 2), [("x", float)])), "not_numbers", "not of numbers"),
        (npy(nan), "not_finite", "not finite"),
        (npy(infinite), "not_finite", "not finite"),
        (npy(beyond), "not_finite", "not finite"),
        (plain[:-3], "damaged", "ends before"),
        (plain[:50], "not_an_array", "not a plain .npy array"),
        (plain[:9], "not_an_array", "not a plain .npy array"),
        (huge, "too_large", "99999×99999 pixels"),
        (huge.replace(b"(99999, 99999)", b"(7999, 8001)  "), "damaged", "ends before"),
        (archive.getvalue(), "not_an_array", "not a plain .npy array"),
        (b"PK\x03\x04 but no archive", "not_an_array", "not a plain .npy array"),
        (FORMATS["PNG"], "not_an_array", "not a plain .npy array"),
    ):
        got = refusal(content, "grid", 1)
        assert got[0] == cause and sentence in got[1], (content[:80], got)


@given(st.sampled_from([npy(np.ones((1, 4, 4))), npy(np.ones((5, 3), np.int16))]), st.data())
def test_damaged_grids_decode_or_are_refused(content: bytes, data: st.DataObject) -> None:
    out = torch.zeros(2, 1, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contents = [damage(content, data), npy(np.full((9, 9), 2.0))]
        errors = decode_batch(contents, "grid", lambda h, w: centre_crops(h, w, (4, 4)), out)
    assert torch.isfinite(out[0]).all() if errors[0] is None else isinstance(errors[0], DecodeError)
    assert errors[1] is None and torch.allclose(out[1], torch.full((1, 4, 4), 2.0))
