"""From encoded bytes to model input: every format as Pillow reads it, crops as torchvision draws them, pictures as
Pillow resizes them. What is not an honest image or grid is refused, and nothing in it runs."""

from __future__ import annotations

import io
import math
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chisquare, ks_2samp

from crate_ray.data.decode import DecodeError, decode_grid, decode_image
from crate_ray.data.order import uniform
from crate_ray.data.packing import measure_image
from crate_ray.data.transforms import (
    CROP_UNIFORMS,
    Crop,
    centre_crop,
    crop_resize,
    crop_resize_grid,
    random_crop,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "imagenet-samples"
Pixels = NDArray[np.uint8]


def smooth(height: int, width: int, seed: int = 0, cells: int = 4) -> Pixels:
    """A smooth random colour image."""
    noise = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def resized(pixels: Pixels, crop: Crop, out_hw: tuple[int, int]) -> Pixels:
    out = torch.empty(pixels.shape[2], *out_hw, dtype=torch.uint8)
    crop_resize(pixels, crop, out)
    return out.permute(1, 2, 0).numpy()


# --- Crops ----------------------------------------------------------------------------------------------------------


def torchvision_crop(height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision 0.25, with its own draws: (top, left, height, width)."""
    for _ in range(10):
        target_area = height * width * random.uniform(*SCALE)
        aspect_ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w
    in_ratio = width / height
    if in_ratio < RATIO[0]:
        w, h = width, round(width / RATIO[0])
    elif in_ratio > RATIO[1]:
        w, h = round(height * RATIO[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (300, 60)])  # the last one is too narrow for most
def test_random_crop_has_torchvisions_distribution(height: int, width: int) -> None:
    count, random = 3000, np.random.default_rng(1)
    u = uniform(11, np.arange(count)[:, None], np.arange(CROP_UNIFORMS))
    crops = [random_crop(height, width, row, SCALE, RATIO, True) for row in u]
    ours = np.array([(c.top, c.left, c.height, c.width) for c in crops])
    theirs = np.array([torchvision_crop(height, width, random) for _ in range(count)])
    for name, value in {
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: c[:, 3] / c[:, 2],
        "bottom margin": lambda c: height - c[:, 0] - c[:, 2],
    }.items():
        assert ks_2samp(value(ours), value(theirs), method="asymp").pvalue > 1e-3, name
    assert abs(sum(c.flip for c in crops) - count / 2) < 4 * math.sqrt(count / 4)
    flips = np.array([c.flip for c in crops], float)
    assert abs(np.corrcoef(flips, ours[:, 1])[0, 1]) < 4 / math.sqrt(count)
    if height == width:  # every crop fits, so the share of the area is uniform, up to rounding and the corners
        share = ours[:, 2] * ours[:, 3] / (height * width)
        inner = share[share < 0.7]  # above, some aspect ratios do not fit
        assert chisquare(np.histogram(inner, 10, (0.2, 0.7))[0]).pvalue > 1e-3


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(0, 2**63),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_random_crop_keeps_its_bounds(
    height: int, width: int, seed: int, scale: tuple[float, float], ratio: tuple[float, float], flip: bool
) -> None:
    u = uniform(seed, np.arange(CROP_UNIFORMS))
    crop = random_crop(height, width, u, scale, ratio, flip)
    assert crop == random_crop(height, width, u.copy(), scale, ratio, flip)
    assert 0 <= crop.top and 0 < crop.height and crop.top + crop.height <= height
    assert 0 <= crop.left and 0 < crop.width and crop.left + crop.width <= width
    assert flip or not crop.flip
    if min(crop.width, crop.height) > 1:  # a side of one pixel may stand for less
        low, high = (crop.width - 0.51) / (crop.height + 0.51), (crop.width + 0.51) / (crop.height - 0.51)
        assert low <= ratio[1] and ratio[0] <= high
    half = (crop.width + crop.height) / 2 + 0.5  # of a pixel all around
    fallback = crop.width == width or crop.height == height
    assert crop.height * crop.width <= scale[1] * height * width + half or fallback
    assert crop.height * crop.width >= scale[0] * height * width - half or fallback


def test_extreme_uniform_numbers_stay_inside() -> None:
    for value in (0.0, 1 - 2.0**-53):
        crop = random_crop(7, 5, np.full(CROP_UNIFORMS, value), (0.1, 0.5), (1, 1), True)
        assert 0 <= crop.top <= 7 - crop.height and 0 <= crop.left <= 5 - crop.width


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 256), st.integers(1, 256))
@settings(max_examples=150, deadline=None)
def test_centre_crop_is_the_largest_central_one(height: int, width: int, out_h: int, out_w: int) -> None:
    crop = centre_crop(height, width, (out_h, out_w))
    assert crop.height == height or crop.width == width
    scale = min(height / out_h, width / out_w)
    assert (
        abs(crop.height - max(scale * out_h, 1)) <= 0.5 + 1e-9 and abs(crop.width - max(scale * out_w, 1)) <= 0.5 + 1e-9
    )
    assert 0 <= height - crop.height - 2 * crop.top <= 1 and 0 <= width - crop.width - 2 * crop.left <= 1
    assert not crop.flip


# --- Resizing -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(2, 90), st.integers(2, 90), st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_crop_resize_is_pillows(seed: int, height: int, width: int, out_h: int, out_w: int) -> None:
    # Away from 0 and 255: between the two passes torch clips overshoots, Pillow does not.
    pixels = np.random.default_rng(seed).integers(64, 192, (height, width, 3), np.uint8)
    crop = random_crop(height, width, uniform(seed, np.arange(CROP_UNIFORMS)), SCALE, RATIO, True)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    expected = np.asarray(Image.fromarray(pixels).crop(box).resize((out_w, out_h), Image.Resampling.BICUBIC))
    if crop.flip:
        expected = expected[:, ::-1]
    before = pixels.copy()
    pixels.flags.writeable = False  # as Pillow hands images out
    got = resized(pixels, crop, (out_h, out_w))
    assert np.abs(got.astype(int) - expected).max() <= 2
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize(
    ("shape", "out"), [((375, 500), (224, 224)), ((480, 333), (224, 224)), ((301, 299), (96, 128))]
)
def test_centre_crop_and_resize_agree_with_pillows_resize_and_crop(
    shape: tuple[int, int], out: tuple[int, int]
) -> None:
    pixels = smooth(*shape)
    image = Image.fromarray(pixels)
    scale = max(out[0] / image.height, out[1] / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - out[1]) // 2, (image.height - out[0]) // 2
    expected = np.asarray(image.crop((left, top, left + out[1], top + out[0])))
    assert psnr(resized(pixels, centre_crop(*shape, out), out), expected) >= 38


def test_resizing_photographs_is_pillows() -> None:
    shards = sorted(SAMPLES.glob("*.tar"))
    if not shards:
        pytest.skip(f"no photographs at {SAMPLES}")
    with tarfile.open(shards[0]) as tar:
        members = [info for info in tar if info.name.endswith(".jpg")][:6]
        encoded = [tar.extractfile(info).read() for info in members]  # type: ignore[union-attr]
    for content in encoded:
        pixels = decode_image(content, 3)
        crop = centre_crop(*pixels.shape[:2], (224, 224))
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        with Image.open(io.BytesIO(content)) as image:
            expected = image.convert("RGB").crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        assert psnr(resized(pixels, crop, (224, 224)), np.asarray(expected)) >= 60


def test_a_crop_of_the_right_size_is_copied_bit_by_bit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    assert np.array_equal(resized(pixels, Crop(2, 3, 5, 6), (5, 6)), pixels[2:7, 3:9])
    assert np.array_equal(resized(pixels, Crop(2, 3, 5, 6, flip=True), (5, 6)), pixels[2:7, 3:9][:, ::-1])
    grid = np.random.default_rng(0).normal(size=(2, 9, 12)).astype(np.float32)
    out = torch.empty(2, 5, 6)
    crop_resize_grid(grid, Crop(2, 3, 5, 6, flip=True), out)
    assert np.array_equal(out.numpy(), grid[:, 2:7, 3:9][:, :, ::-1])


def test_grids_are_resized_like_pillows_float_images() -> None:
    grid = np.random.default_rng(0).normal(size=(2, 41, 33)).astype(np.float32) * 1000 - 5  # no byte range
    out = torch.empty(2, 16, 20)
    crop_resize_grid(grid, Crop(1, 2, 40, 30), out)
    for channel, plane in zip(out.numpy(), grid, strict=True):
        image = Image.fromarray(np.ascontiguousarray(plane[1:41, 2:32]))
        expected = np.asarray(image.resize((20, 16), Image.Resampling.BICUBIC))
        assert np.allclose(channel, expected, atol=1e-2)


# --- Decoding -------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PICTURE = Image.fromarray(smooth(47, 61, seed=5))
GRADIENT_16 = np.add.outer(np.arange(40) * 1000, np.arange(30) * 800).astype(np.uint16)
FORMATS = {
    "JPEG": encoded(PICTURE, "JPEG", quality=90),
    "JPEG 4:4:4 progressive": encoded(PICTURE, "JPEG", subsampling=0, progressive=True),
    "grayscale JPEG": encoded(PICTURE.convert("L"), "JPEG"),
    "CMYK JPEG": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "RGB JPEG": encoded(PICTURE, "JPEG", keep_rgb=True),
    "PNG": encoded(PICTURE, "PNG"),
    "palette PNG": encoded(PICTURE.convert("P"), "PNG"),
    "RGBA PNG": encoded(PICTURE.convert("RGBA"), "PNG"),
    "gray and alpha PNG": encoded(PICTURE.convert("LA"), "PNG"),
    "bilevel PNG": encoded(PICTURE.convert("1"), "PNG"),
    "WebP": encoded(PICTURE, "WEBP"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_decoded_as_pillow_does(name: str, channels: int) -> None:
    got = decode_image(memoryview(FORMATS[name]), channels)  # members of a shard are memoryviews
    with Image.open(io.BytesIO(FORMATS[name])) as image:
        expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(47, 61, channels)
    assert got.dtype == np.uint8 and got.shape == expected.shape
    # Luma straight from a JPEG differs by rounding from luma of its RGB, and where that was clipped.
    assert np.abs(got.astype(int) - expected).mean() < 0.1 and np.abs(got.astype(int) - expected).max() <= 3


def test_16_bit_pictures_keep_their_range() -> None:
    content = encoded(Image.fromarray(GRADIENT_16), "PNG")
    for channels in (1, 3):
        pixels = decode_image(content, channels)
        assert pixels.shape == (40, 30, channels)
        assert np.array_equal(pixels, np.rint(GRADIENT_16 / 257)[:, :, None].repeat(channels, 2))
    measured = measure_image(content)[1]
    assert measured.mean == pytest.approx([GRADIENT_16.mean() / 65535], abs=0.002)


def npy(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_grids_keep_their_numbers() -> None:
    for dtype in (np.float16, np.float64, np.int16, np.uint8, bool):
        grid = np.arange(24).reshape(2, 3, 4).astype(dtype)
        got = decode_grid(memoryview(npy(grid)), 2)
        assert got.dtype == np.float32 and np.array_equal(got, grid.astype(np.float32))
    fortran = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    assert np.array_equal(decode_grid(npy(fortran), 1), fortran[None])


BAD_IMAGES = {
    "truncated JPEG": (FORMATS["JPEG"][: len(FORMATS["JPEG"]) // 2], ".+"),
    "JPEG magic only": (b"\xff\xd8\xff\xe0", ".+"),
    "truncated PNG": (FORMATS["PNG"][: len(FORMATS["PNG"]) // 2], ".+"),
    "text": (b"this is not an image, " * 20, "^not a JPEG, PNG or WebP image$"),
    "nothing": (b"", "^not a JPEG, PNG or WebP image$"),
    "PostScript in .jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(made) (w) file\n%%EOF\n",
        "^not a JPEG, PNG or WebP image$",
    ),
    "GIF": (encoded(PICTURE, "GIF"), "^not a JPEG, PNG or WebP image$"),
    "TIFF": (encoded(PICTURE, "TIFF"), "^not a JPEG, PNG or WebP image$"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_image_is_refused(name: str) -> None:
    content, message = BAD_IMAGES[name]
    with pytest.raises(DecodeError, match=message):
        decode_image(content, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["JPEG", "grayscale JPEG", "CMYK JPEG", "PNG", "WebP"])
def test_a_decompression_bomb_is_refused_at_pillows_own_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    area = 47 * 61
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", area // 2 - 1)
    with pytest.raises(DecodeError, match=r"(limit of|exceeds limit)"):
        decode_image(FORMATS[name], 3)
    for limit in (area // 2 + 1, None):  # from here to twice the limit Pillow warns, and packing accepts
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode_image(FORMATS[name], 3).shape == (47, 61, 3)


def test_images_for_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(DecodeError, match=r"images have 1 or 3 channels, the model has 4; store .* as \.npy grids"):
        decode_image(FORMATS["PNG"], 4)


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
        with pytest.raises(DecodeError, match=r"^not a plain \.npy array"):
            decode_grid(content, 1)
        assert not made.exists()
    np.load(io.BytesIO(npy(objects, allow_pickle=True)), allow_pickle=True)
    assert made.exists()  # the payload does work where it is let


def test_what_is_no_grid_is_refused() -> None:
    archive = io.BytesIO()
    np.savez(archive, np.zeros(3))
    huge = npy(np.zeros((2, 2))).replace(b"(2, 2)", b"(9999999999, 9999999999)".ljust(6))
    nan, infinite = np.ones((1, 3, 3)), np.ones((1, 3, 3))
    nan[0, 1, 1], infinite[0, 1, 1] = math.nan, -math.inf
    for content, message in {
        npy(np.zeros((2, 3, 4))): r"shape \(2, 3, 4\), but the model expects \(1, height, width\)",
        npy(np.zeros(3)): r"shape \(3,\), but the model expects",
        npy(np.zeros((1, 0, 4))): r"shape \(1, 0, 4\)",
        npy(np.zeros((2, 2), complex)): "an array of complex128 .*, not of numbers",
        npy(np.array([["a"]])): "an array of <U1 .*, not of numbers",
        npy(nan): "not finite",
        npy(infinite): "not finite",
        npy(np.zeros((2, 2)))[:-3]: r"not a plain \.npy array",
        huge: r"not a plain \.npy array",
        archive.getvalue(): r"not a plain \.npy array",
        b"PK\x03\x04 but no archive": r"not a plain \.npy array",
        b"": r"not a plain \.npy array",
    }.items():
        with pytest.raises(DecodeError, match=message):
            decode_grid(content, 1)


@given(st.sampled_from([*FORMATS.values(), npy(np.ones((1, 4, 4)))]), st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_bytes_decode_or_are_refused(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    last = min(len(damaged), data.draw(st.sampled_from([80, 250, len(content)]))) - 1  # headers above all
    for _ in range(data.draw(st.integers(0 if len(damaged) < len(content) else 1, 6))):
        if last >= 0:
            damaged[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if content.startswith(b"\x93NUMPY"):
                assert np.isfinite(decode_grid(bytes(damaged), 1)).all()
            else:
                assert decode_image(bytes(damaged), 3).shape[2] == 3
        except DecodeError:
            pass
