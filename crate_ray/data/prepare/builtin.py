"""Datasets that need no download: scikit-learn's digits, and procedural shapes with foreground masks.

All have a fixed 80/20 split: every fifth digit of a class, and every fifth image of shapes, is a test sample.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crate_ray.data.prepare.sources import Item, Source, size_in_tar

Split = Literal["all", "train", "test"]
Float = NDArray[np.float64]

_DIGIT_BYTES = 123  # approximate size of a PNG
_SHAPES_BYTES_PER_PIXEL = 1.1  # approximate, of a JPEG
_PLAIN_BYTES_PER_PIXEL = 0.7  # approximate, of a PNG

SHAPE_CLASSES = ("disc", "ring", "square", "triangle", "star", "cross")


def _in_split(number: int, split: Split) -> bool:
    return split == "all" or (number % 5 == 4) == (split == "test")


def _encode(pixels: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


# --- Digits ---------------------------------------------------------------------------------------------------------


def digits_source(split: Split = "all") -> Source:
    """scikit-learn's 1,797 handwritten digits: 8×8 grayscale PNG, values 0..16 scaled to 0..255, `cls` 0..9.

    The split is stratified: every fifth sample of a class, in the dataset's order, is a test sample.
    """
    from sklearn.datasets import load_digits  # slow to import

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    seen = [0] * 10
    items = []
    for number, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        if _in_split(seen[label], split):
            items.append(Item(f"digit {number}", partial(_digit, picture, label), size_in_tar(_DIGIT_BYTES, 1)))
        seen[label] += 1
    return Source(items, tuple(str(digit) for digit in range(10)))


def _digit(picture: NDArray[np.uint8], label: int) -> dict[str, bytes]:
    return {"png": _encode(picture, "PNG"), "cls": str(label).encode()}


# --- Shapes ---------------------------------------------------------------------------------------------------------


def shapes_source(split: Split, num_samples: int, image_size: int, seed: int) -> Source:
    """Procedural images of one to three textured shapes on a textured background: JPEGs with masks.

    `cls` is the shape of the largest object, which lies on top; `mask.png` is 255 on any object, else 0. A sample
    depends only on the seed and its number; every fifth number is a test sample.

    Args:
        split: part of the set.
        num_samples: size of the whole set, both splits together.
        image_size: side of the images in pixels.
        seed: seed of the set.
    """
    return _drawn("shapes", _shapes_members, _SHAPES_BYTES_PER_PIXEL, split, num_samples, image_size, seed)


def draw_shapes(seed: int, number: int, image_size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
    """One image of the 'shapes' set.

    Returns:
        Pixels (S, S, 3); mask (S, S), 0 or 255; number of the class in SHAPE_CLASSES.
    """
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, number]))
    x, y = _grid(image_size)
    picture = _texture(random, x, y)
    mask = np.zeros((image_size, image_size))

    count = int(random.integers(1, 4))
    largest = random.uniform(0.38, 0.62)  # radius; 1 is half the image
    radii = [largest * random.uniform(0.4, 0.7) for _ in range(count - 1)] + [largest]
    label = 0
    for radius in radii:  # draw the largest last, so that no other shape hides it
        label = int(random.integers(len(SHAPE_CLASSES)))
        reach = max(0.0, 0.95 - radius)
        centre_x, centre_y = random.uniform(-reach, reach, 2)
        turn = random.uniform(0, 2 * np.pi)
        u, v, coverage = _shape(label, x, y, centre_x, centre_y, turn, radius)
        inside = _contrasting(random, x, y, picture, coverage)
        inside = inside * (1.12 - 0.35 * np.clip((u + v) / 2 + 0.3, 0, 1))[..., None]  # light from one side
        picture = picture + coverage[..., None] * (inside - picture)
        mask = np.maximum(mask, coverage)
    picture = picture * (1 + 0.15 * random.uniform(-1, 1) * x + 0.15 * random.uniform(-1, 1) * y)[..., None]
    picture = picture + random.normal(0, 0.02, picture.shape)
    pixels = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return pixels, np.where(mask > 0.5, 255, 0).astype(np.uint8), label


def _shapes_members(seed: int, number: int, image_size: int) -> dict[str, bytes]:
    pixels, mask, label = draw_shapes(seed, number, image_size)
    return {
        "jpg": _encode(pixels, "JPEG", quality=95, subsampling=0),
        "mask.png": _encode(mask, "PNG"),
        "cls": str(label).encode(),
    }


def plain_shapes_source(split: Split, num_samples: int, image_size: int, seed: int) -> Source:
    """Procedural images of one shape on a background, both in smooth colours: PNGs with masks.

    The shape is nearly upright; its place, size and colours are random. `cls` is the shape; `mask.png` is 255 on it,
    else 0. The arguments and the split are those of `shapes_source`.
    """
    name = "plain-shapes"
    return _drawn(name, _plain_shape_members, _PLAIN_BYTES_PER_PIXEL, split, num_samples, image_size, seed)


def draw_plain_shape(seed: int, number: int, image_size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
    """One image of the 'plain-shapes' set, as `draw_shapes` returns it."""
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, number]))
    x, y = _grid(image_size)
    background, inside = _slope(random, x, y), _slope(random, x, y)
    while np.abs((inside - background).mean((0, 1))).sum() < 0.45:
        inside = _slope(random, x, y)
    label = int(random.integers(len(SHAPE_CLASSES)))
    radius = random.uniform(0.45, 0.8)  # 1 is half the image
    reach = 0.95 - radius
    centre_x, centre_y = random.uniform(-reach, reach, 2)
    _, _, coverage = _shape(label, x, y, centre_x, centre_y, random.uniform(-np.pi / 12, np.pi / 12), radius)
    picture = background + coverage[..., None] * (inside - background)
    pixels = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return pixels, np.where(coverage > 0.5, 255, 0).astype(np.uint8), label


def _plain_shape_members(seed: int, number: int, image_size: int) -> dict[str, bytes]:
    pixels, mask, label = draw_plain_shape(seed, number, image_size)
    return {"png": _encode(pixels, "PNG"), "mask.png": _encode(mask, "PNG"), "cls": str(label).encode()}


def _drawn(
    name: str,
    members: Callable[[int, int, int], dict[str, bytes]],
    bytes_per_pixel: float,
    split: Split,
    num_samples: int,
    image_size: int,
    seed: int,
) -> Source:
    """A procedural set: `members` draws a sample from the seed, its number and the image size."""
    size = size_in_tar(round(bytes_per_pixel * image_size**2), image_size**2 // 20, 1)
    version = f"seed {seed}, {image_size} pixels"
    items = [
        Item(f"{name} {number}", partial(members, seed, number, image_size), size, version)
        for number in range(num_samples)
        if _in_split(number, split)
    ]
    return Source(items, SHAPE_CLASSES)


def _grid(image_size: int) -> tuple[Float, Float]:
    """Coordinates x and y of the pixels' centres, (S, S) each, from -1 to 1."""
    axis = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    return x, y


def _shape(
    label: int, x: Float, y: Float, centre_x: float, centre_y: float, turn: float, radius: float
) -> tuple[Float, Float, Float]:
    """The shape's own coordinates u and v, and the share of each pixel that it covers, (S, S) each."""
    u = (np.cos(turn) * (x - centre_x) + np.sin(turn) * (y - centre_y)) / radius
    v = (-np.sin(turn) * (x - centre_x) + np.cos(turn) * (y - centre_y)) / radius
    distance = _SHAPE_DISTANCE[SHAPE_CLASSES[label]](u, v) * radius
    return u, v, np.clip(0.5 - distance * len(x) / 2, 0, 1)  # antialiased over one pixel


def _slope(random: np.random.Generator, x: Float, y: Float) -> Float:
    """(S, S, 3) smooth transition in 0..1 between two similar colours."""
    first = random.uniform(0.05, 0.95, 3)
    second = np.clip(first + random.uniform(-0.25, 0.25, 3), 0, 1)
    turn = random.uniform(0, np.pi)
    along = np.cos(turn) * x + np.sin(turn) * y + random.uniform(-0.5, 0.5)
    return first + (0.5 + 0.5 * np.clip(along, -1, 1))[..., None] * (second - first)


def _contrasting(random: np.random.Generator, x: Float, y: Float, behind: Float, coverage: Float) -> Float:
    """A texture whose mean differs visibly from the pixels it will cover."""
    weight = coverage[..., None] / max(coverage.sum(), 1e-9)
    hidden = (behind * weight).sum((0, 1))
    texture = _texture(random, x, y)
    for _ in range(8):
        if np.abs((texture * weight).sum((0, 1)) - hidden).sum() > 0.45:
            break
        texture = _texture(random, x, y)
    return texture


def _texture(random: np.random.Generator, x: Float, y: Float) -> Float:
    """(S, S, 3) texture in 0..1: two colours mixed by stripes, checks, dots, clouds or a gradient."""
    first = random.uniform(0.05, 0.95, 3)
    second = np.clip(first + random.uniform(-0.4, 0.4, 3), 0, 1)
    kind = int(random.integers(5))
    turn = random.uniform(0, np.pi)
    u, v = np.cos(turn) * x + np.sin(turn) * y, -np.sin(turn) * x + np.cos(turn) * y
    frequency = random.uniform(8, 22)
    phase = random.uniform(0, 2 * np.pi, 2)
    if kind == 0:
        mix = 0.5 + 0.5 * np.clip(3 * np.sin(frequency * u + phase[0]), -1, 1)
    elif kind == 1:
        mix = 0.5 + 0.5 * np.clip(6 * np.sin(frequency * u + phase[0]) * np.sin(frequency * v + phase[1]), -1, 1)
    elif kind == 2:
        mix = np.clip(4 * (np.sin(frequency * u + phase[0]) * np.sin(frequency * v + phase[1]) - 0.35), 0, 1)
    elif kind == 3:
        mix = _clouds(random, x.shape[0])
    else:
        mix = 0.5 + 0.5 * np.clip(u + random.uniform(-0.5, 0.5), -1, 1)
    mix = 0.75 * mix + 0.25 * _clouds(random, x.shape[0])
    return first + mix[..., None] * (second - first)


def _clouds(random: np.random.Generator, size: int) -> Float:
    """(S, S) smooth noise of two octaves, in 0..1."""
    total = np.zeros((size, size))
    for cells, strength in ((4, 0.65), (9, 0.35)):
        grid = Image.fromarray(random.random((cells, cells)).astype(np.float32))
        total += strength * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    return np.clip(total, 0, 1)


def _polygon(*points: tuple[float, float]) -> Callable[[Float, Float], Float]:
    """Signed distance to a polygon, negative inside (Quilez, "2D distance functions", sdPolygon)."""

    def distance(u: Float, v: Float) -> Float:
        squared = np.full(u.shape, np.inf)
        sign = np.ones(u.shape)
        for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1], strict=True):
            ex, ey, wx, wy = bx - ax, by - ay, u - ax, v - ay
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
            above, below, left = v >= ay, v < by, ex * wy > ey * wx
            sign = np.where((above & below & left) | ~(above | below | left), -sign, sign)
        return sign * np.sqrt(squared)

    return distance


def _regular(corners: int, inner: float | None = None) -> Callable[[Float, Float], Float]:
    """A regular polygon in the unit circle, or a star if an inner radius is given."""
    step = 2 if inner else 1
    angles = [2 * np.pi * i / (step * corners) for i in range(step * corners)]
    radii = [inner if inner and i % 2 else 1.0 for i in range(len(angles))]
    return _polygon(*((r * float(np.sin(a)), -r * float(np.cos(a))) for a, r in zip(angles, radii, strict=True)))


def _cross() -> Callable[[Float, Float], Float]:
    arm, width = 0.95, 0.3
    corner = [(width, arm), (width, width), (arm, width)]
    quarters = [(corner, 1, 1), (corner[::-1], 1, -1), (corner, -1, -1), (corner[::-1], -1, 1)]
    return _polygon(*((sx * px, sy * py) for points, sx, sy in quarters for px, py in points))


_SHAPE_DISTANCE: dict[str, Callable[[Float, Float], Float]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    "square": _regular(4),
    "triangle": _regular(3),
    "star": _regular(5, 0.42),
    "cross": _cross(),
}
