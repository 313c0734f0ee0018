"""Crops as torchvision draws them, pictures as Pillow resizes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chisquare, ks_2samp

from crate_ray.data.decode.transforms import (
    CROP_UNIFORMS,
    Box,
    Crops,
    Orientation,
    SmallResize,
    centre_crops,
    random_crops,
    resize_grid,
    resize_image,
    small_side,
)
from crate_ray.data.order.hashing import uniform
from tests.uniforms import from_table

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
Pixels = NDArray[np.uint8]


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


def crop_of_one(
    height: int,
    width: int,
    u: NDArray[np.float64],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> tuple[int, int, int, int, bool]:
    """random_crops for one image, with Python's own numbers."""
    mirrored = flip and bool(u[-1] < 0.5)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, CROP_UNIFORMS - 1, 4):
        u_area, u_ratio, u_top, u_left = (float(x) for x in u[i : i + 4])
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w, mirrored
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w, mirrored


@given(
    st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), max_size=60),
    st.integers(0, 2**63),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
    st.booleans(),
)
def test_random_crops_are_those_of_one_image_at_a_time(
    sizes: list[tuple[int, int]], seed: int, scale: tuple[float, float], ratio: tuple[float, float], flip: bool
) -> None:
    u = uniform(seed, np.arange(len(sizes))[:, None], np.arange(CROP_UNIFORMS))
    heights, widths = np.array(sizes, np.int64).reshape(-1, 2).T
    crops = random_crops(heights, widths, from_table(u), scale, ratio, flip)
    got = list(zip(*(column.tolist() for column in crops), strict=True))
    assert got == [crop_of_one(h, w, row, scale, ratio, flip) for (h, w), row in zip(sizes, u, strict=True)]
    assert [column.dtype.kind for column in crops] == ["i", "i", "i", "i", "b"]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (300, 60)])  # the last one is too narrow for most
def test_random_crops_have_torchvisions_distribution(height: int, width: int) -> None:
    count, random = 3000, np.random.default_rng(1)
    u = uniform(11, np.arange(count)[:, None], np.arange(CROP_UNIFORMS))
    crops = random_crops(np.full(count, height), np.full(count, width), from_table(u), SCALE, RATIO, True)
    ours = np.stack(crops[:4], axis=1)
    theirs = np.array([torchvision_crop(height, width, random) for _ in range(count)])
    for name, value in {
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: c[:, 3] / c[:, 2],
        "bottom margin": lambda c: height - c[:, 0] - c[:, 2],
    }.items():
        assert ks_2samp(value(ours), value(theirs), method="asymp").pvalue > 1e-3, name
    assert abs(crops.flip.sum() - count / 2) < 4 * math.sqrt(count / 4)
    assert abs(np.corrcoef(crops.flip.astype(float), crops.left)[0, 1]) < 4 / math.sqrt(count)
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
)
def test_random_crops_keep_their_bounds(
    height: int, width: int, seed: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    u = uniform(seed, np.arange(20)[:, None], np.arange(CROP_UNIFORMS))
    crops = random_crops(np.full(20, height), np.full(20, width), from_table(u), scale, ratio, False)
    for top, left, h, w, flip in zip(*(column.tolist() for column in crops), strict=True):
        assert 0 <= top and 0 < h and top + h <= height and not flip
        assert 0 <= left and 0 < w and left + w <= width
        if min(w, h) > 1:  # a side of one pixel may stand for less
            assert (w - 0.51) / (h + 0.51) <= ratio[1] and ratio[0] <= (w + 0.51) / (h - 0.51)
        half = (w + h) / 2 + 0.5  # of a pixel all around
        assert (
            scale[0] * height * width - half <= h * w <= scale[1] * height * width + half or w == width or h == height
        )


def test_extreme_uniform_numbers_stay_inside() -> None:
    for value in (0.0, 1 - 2.0**-53):
        u = from_table(np.full((1, CROP_UNIFORMS), value))
        crops = random_crops(np.array([7]), np.array([5]), u, (0.1, 0.5), (1, 1), True)
        assert 0 <= crops.top[0] <= 7 - crops.height[0] and 0 <= crops.left[0] <= 5 - crops.width[0]


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 256), st.integers(1, 256))
def test_centre_crops_are_the_largest_central_ones(height: int, width: int, out_h: int, out_w: int) -> None:
    crops = centre_crops(np.array([height]), np.array([width]), (out_h, out_w))
    top, left, h, w, flip = (column.item() for column in crops)
    assert h == height or w == width
    scale = min(height / out_h, width / out_w)
    assert abs(h - max(scale * out_h, 1)) <= 0.5 + 1e-9 and abs(w - max(scale * out_w, 1)) <= 0.5 + 1e-9
    assert 0 <= height - h - 2 * top <= 1 and 0 <= width - w - 2 * left <= 1
    assert not flip


# --- Resizing -------------------------------------------------------------------------------------------------------


def crops_of(*rows: tuple[int, int, int, int, bool]) -> Crops:
    top, left, height, width, flip = (np.array(column) for column in zip(*rows, strict=True))
    return Crops(top, left, height, width, flip)


def resized(pixels: Pixels, out_hw: tuple[int, int], **options: Any) -> Pixels:
    out = torch.empty(pixels.shape[2], *out_hw, dtype=torch.uint8)
    resize_image(pixels, out, **options)
    return out.permute(1, 2, 0).numpy()


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


sizes = st.integers(1, 90)


@given(st.integers(0, 2**32), sizes, sizes, sizes, sizes, st.sampled_from([1, 3]))
def test_resize_image_is_pillows(seed: int, height: int, width: int, out_h: int, out_w: int, channels: int) -> None:
    # Away from 0 and 255: between the two passes torch clips overshoots, Pillow does not.
    pixels = np.random.default_rng(seed).integers(64, 192, (height, width, channels), np.uint8)
    expected = np.asarray(
        Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).resize((out_w, out_h), Image.Resampling.BICUBIC)
    ).reshape(out_h, out_w, channels)
    pixels.flags.writeable = False  # as Pillow hands images out
    assert np.abs(resized(pixels, (out_h, out_w)).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_a_box_with_fractions_is_sampled_where_it_lies(channels: int) -> None:
    """A horizontal and a vertical ramp tell where an output pixel comes from."""
    ramp = np.add.outer(np.arange(40.0), 2 * np.arange(60.0)) + 40
    pixels = ramp.astype(np.uint8)[:, :, None].repeat(channels, 2)
    box = Box(3.25, 7.75, 24.5, 33.0)
    got = resized(pixels, (12, 11), box=box)
    y = box.top + (np.arange(12) + 0.5) * box.height / 12 - 0.5
    x = box.left + (np.arange(11) + 0.5) * box.width / 11 - 0.5
    expected = np.add.outer(y, 2 * x) + 40
    assert np.abs(got - expected[:, :, None]).max() <= 0.75  # rounding, twice


def test_orientations_turn_the_resized_picture() -> None:
    pixels = np.random.default_rng(3).integers(64, 192, (9, 12, 3), np.uint8)
    for transposed, upside_down, mirrored in np.ndindex(2, 2, 2):
        orientation = Orientation(bool(transposed), bool(upside_down), bool(mirrored))
        expected = pixels.transpose(1, 0, 2) if transposed else pixels
        expected = expected[::-1] if upside_down else expected
        expected = expected[:, ::-1] if mirrored else expected
        assert np.array_equal(resized(pixels, expected.shape[:2], orientation=orientation), expected)
        assert np.array_equal(
            resized(pixels, expected.shape[:2], orientation=orientation.mirrored()), expected[:, ::-1]
        )
        # Resizing first or turning first is the same, up to which axis is rounded first.
        turned = resized(np.ascontiguousarray(expected), (20, 7)).astype(int)
        assert np.abs(resized(pixels, (20, 7), orientation=orientation) - turned).max() <= 2


def resized_small(images_NCHW: NDArray[Any], crops: Crops, out_hw: tuple[int, int]) -> NDArray[np.float32]:
    n, channels, height, width = images_NCHW.shape
    side = small_side(height, width, out_hw)
    assert side is not None
    squares = np.full((n, channels, side, side), 1e6, np.float32)  # what lies outside does not count
    squares[:, :, :height, :width] = images_NCHW
    out = np.empty((n, channels, *out_hw), np.float32)
    SmallResize.of(crops, side, out_hw)(squares, out)
    return out


@given(st.integers(0, 2**32), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_small_images_are_resized_as_by_pillow(seed: int, height: int, width: int, out_h: int, out_w: int) -> None:
    random, n = np.random.default_rng(seed), 5
    pixels = random.integers(0, 256, (n, 2, height, width))
    u = uniform(seed, np.arange(n)[:, None], np.arange(CROP_UNIFORMS))
    crops = random_crops(np.full(n, height), np.full(n, width), from_table(u), (0.1, 1), (0.5, 2), True)
    got = resized_small(pixels, crops, (out_h, out_w))
    for image, source, top, left, h, w, flip in zip(got, pixels, *(c.tolist() for c in crops), strict=True):
        for channel, plane in zip(image, source, strict=True):
            cut = Image.fromarray(np.ascontiguousarray(plane[top : top + h, left : left + w], np.float32))
            expected = np.asarray(cut.resize((out_w, out_h), Image.Resampling.BICUBIC))
            assert np.allclose(channel, expected[:, ::-1] if flip else expected, atol=2e-3)


def test_larger_images_and_outputs_are_not_small() -> None:
    assert small_side(65, 10, (10, 10)) is None and small_side(10, 65, (10, 10)) is None
    assert small_side(32, 32, (32, 32)) == 32 and small_side(33, 1, (64, 64)) == 64
    assert small_side(32, 32, (224, 224)) is None


def test_what_has_the_right_size_is_copied_bit_by_bit() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 9, 12, 3), np.uint8)
    assert np.array_equal(resized(pixels[0, 2:7, 3:9], (5, 6)), pixels[0, 2:7, 3:9])
    crops = crops_of((2, 3, 5, 6, False), (2, 3, 5, 6, True))
    got = resized_small(pixels.transpose(0, 3, 1, 2), crops, (5, 6)).transpose(0, 2, 3, 1)
    assert np.array_equal(got[0], pixels[0, 2:7, 3:9]) and np.array_equal(got[1], pixels[1, 2:7, 3:9][:, ::-1])
    grid = random.normal(size=(2, 9, 12)).astype(np.float32)
    out = torch.empty(2, 5, 6)
    resize_grid(grid[:, 2:7, 3:9], out, flip=True)
    assert np.array_equal(out.numpy(), grid[:, 2:7, 3:9][:, :, ::-1])


def test_grids_are_resized_like_pillows_float_images() -> None:
    grid = np.random.default_rng(0).normal(size=(2, 40, 30)).astype(np.float32) * 1000 - 5  # no byte range
    out = torch.empty(2, 16, 20)
    resize_grid(grid, out)
    for channel, plane in zip(out.numpy(), grid, strict=True):
        expected = np.asarray(Image.fromarray(plane).resize((20, 16), Image.Resampling.BICUBIC))
        assert np.allclose(channel, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("shape", "out"), [((375, 500), (224, 224)), ((480, 333), (224, 224)), ((301, 299), (96, 128))]
)
def test_centre_crop_and_resize_agree_with_resize_and_crop(shape: tuple[int, int], out: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC)
    crops = centre_crops(np.array(shape[:1]), np.array(shape[1:]), out)
    top, left, h, w = (int(column[0]) for column in crops[:4])
    got = resized(np.array(image)[top : top + h, left : left + w], out)
    scale = max(out[0] / image.height, out[1] / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - out[1]) // 2, (image.height - out[0]) // 2
    assert psnr(got, np.asarray(image.crop((left, top, left + out[1], top + out[0])))) >= 38
