"""Decode batches of images and grids, crop and resize them.

JPEGs are decoded by libjpeg-turbo, or by Pillow if it refuses them; PNG and WebP by Pillow; `.npy` grids by NumPy
without pickle. Headers are checked before memory is allocated for pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import Kind
from crate_ray.data.decode.arrays import open_array, open_grid
from crate_ray.data.decode.errors import MAX_PIXELS, DecodeError, Refused, no_memory
from crate_ray.data.decode.jpeg import Jpeg, open_jpeg
from crate_ray.data.decode.jpeg_stack import Layout, resize_stacked
from crate_ray.data.decode.member import UPRIGHT, Crop, Member
from crate_ray.data.decode.pillow import PNG_START, ImageFormat, PillowImage, open_png_or_webp
from crate_ray.data.decode.refused import count_refused
from crate_ray.data.decode.room import room_for
from crate_ray.data.decode.scratch import scratch
from crate_ray.data.decode.transforms import CropRule, Crops, Int64, SmallResize, small_side

_SMALL_BYTES = 2**16
"""JPEGs below this size are compared with the one before: if the headers are equal, the header is not parsed again."""


def decode_batch(
    encoded: Sequence[bytes | memoryview | NDArray[Any]],
    kind: Kind,
    crop: CropRule,
    out: Tensor,
    *,
    max_pixels: int = MAX_PIXELS,
) -> list[DecodeError | None]:
    """Decode n images or grids, crop them, and resize them (antialiased bicubic) into out, (n, C, height, width).

    Thread-safe. Most of the work is done without the GIL.

    Args:
        encoded: JPEG, PNG or WebP files for images, `.npy` files for grids; or decoded arrays: (height, width, C)
            uint8 for images, (C, height, width) numbers for grids.
        kind: whether they are images or grids.
        crop: called once with the heights and widths of all n upright images (1 × 1 for those that cannot be opened).
        out: uint8 with 1 (luma) or 3 (RGB) channels for images, float32 for grids.
        max_pixels: larger images and grids are refused by their headers.

    Returns:
        n entries: None, or the error of an image or grid that cannot be decoded, whose slot in out is undefined.
    """
    channels, out_hw = int(out.shape[1]), (int(out.shape[2]), int(out.shape[3]))
    if kind == "image" and (alike := _open_alike(encoded, channels, max_pixels)) is not None:
        side = small_side(alike[1].height, alike[1].width, out_hw)
        if side is not None:
            return _decode_alike(*alike, crop, side, out)
    members, errors = _open_all(encoded, kind, channels, max_pixels)
    sizes = np.array([(1, 1) if member is None else member.hw for member in members], np.int64).reshape(-1, 2)
    crops = crop(sizes[:, 0], sizes[:, 1])
    small: dict[tuple[int, object], list[int]] = {}
    for i, member in enumerate(members):
        if member is None:
            continue
        side = small_side(*member.hw, out_hw)
        if side is not None:
            layout = member.layout if isinstance(member, Jpeg) else None
            small.setdefault((side, layout and (layout.components, layout.sampling)), []).append(i)
            continue
        try:
            member.crop_into(Crop.of(crops, i), out[i])
        except DecodeError as error:
            errors[i] = error
        except MemoryError:
            errors[i] = no_memory(member.hw)
    for (side, _), rows in small.items():
        _decode_small(members, np.array(rows), crops, side, out, errors)
    return errors


class ImageHeader(NamedTuple):
    """Header of an encoded image."""

    height: int
    """Height of the upright image."""
    width: int
    """Width of the upright image."""
    is_plain_jpeg: bool
    """Whether any JPEG decoder gives the same pixels: a complete, upright, 8-bit JPEG in grayscale or YCbCr."""


def read_image_header(content: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read an image's header. Raises DecodeError if decode_batch would refuse the image by its header."""
    member = _open(content, "image", 3, max_pixels)
    is_plain = (
        isinstance(member, Jpeg)
        and member.components < 4
        and member.orientation == UPRIGHT
        and content[-2:] == b"\xff\xd9"
        # An Adobe segment or a component named R can mean RGB.
        and b"Adobe" not in bytes(content[: member.frame])
        and content[member.frame + 10] != ord("R")
    )
    return ImageHeader(*member.hw, is_plain)


class WholeImage(NamedTuple):
    """A decoded image."""

    pixels: NDArray[np.uint8]
    """(height, width, channels), upright, with 1 channel for grayscale and 3 for colours."""
    size: tuple[int, int]
    """Height and width before it was reduced."""
    format: ImageFormat
    refused: str | None = None
    """Why libjpeg-turbo refuses it, if Pillow decoded it instead."""


@contextmanager
def decode_whole(
    content: bytes | memoryview, *, max_pixels: int = MAX_PIXELS, reduced_side: int | None = None
) -> Iterator[WholeImage]:
    """A whole image, decoded as `decode_batch` does. So both refuse the same images.

    Other threads may have to wait for memory until the context ends.

    Args:
        content: a JPEG, PNG or WebP file.
        max_pixels: larger images are refused by their headers.
        reduced_side: decode a JPEG at ½, ¼ or ⅛ scale if its sides stay at least this long.

    Raises:
        DecodeError: it cannot be decoded.
    """
    member = _open(content, "image", 3, max_pixels)
    assert isinstance(member, Jpeg | PillowImage)
    factor = 1
    if isinstance(member, Jpeg) and reduced_side is not None:
        factor = next((f for f in (8, 4, 2) if min(member.hw) >= f * reduced_side), 1)
    with ExitStack() as room:
        refused: str | None = None
        try:
            pixels = _whole_in(room, member, factor)
        except Refused as error:
            assert isinstance(member, Jpeg)
            room.close()
            refused, member = str(error), member.for_pillow()
            pixels = _whole_in(room, member, 1)
        yield WholeImage(pixels.transpose(1, 2, 0), member.hw, member.format, refused)


def _whole_in(room: ExitStack, member: Jpeg | PillowImage, factor: int) -> NDArray[np.uint8]:
    """Decode a member at 1/factor scale, after waiting for memory until the stack is closed."""
    copies = 8 * member.height * member.width // factor**2  # by the user of the pixels
    room.enter_context(room_for(member.num_bytes(factor) + copies))
    try:
        return member.whole(member.channels, factor)
    except MemoryError:
        raise no_memory(member.hw) from None


def read_format(content: bytes | memoryview) -> ImageFormat | None:
    """Format of an encoded image by its first bytes; None if it is of no format that is decoded."""
    start = bytes(content[:12])
    if start[:3] == b"\xff\xd8\xff":
        return "JPEG"
    return "PNG" if start[:8] == PNG_START else "WEBP" if start[:4] == b"RIFF" and start[8:] == b"WEBP" else None


def skim_jpeg(content: bytes | memoryview, rows: int) -> None:
    """Entropy-decode the first rows of a JPEG and drop the result.

    Every decoder has to do at least this for a crop that ends there, because Huffman codes can only be read from the
    beginning. Raises DecodeError if it is not an 8-bit JPEG.
    """
    member = _open(content, "image", 3, MAX_PIXELS)
    if not isinstance(member, Jpeg):
        raise DecodeError("not an 8-bit JPEG", "not_an_image")
    member.skim(rows)


def _open_all(
    encoded: Sequence[bytes | memoryview | NDArray[Any]], kind: Kind, channels: int, max_pixels: int
) -> tuple[list[Member | None], list[DecodeError | None]]:
    """Open all members; None and an error for those that cannot be opened."""
    members: list[Member | None] = []
    errors: list[DecodeError | None] = []
    member: Member | None = None
    for content in encoded:
        try:
            member = _open(content, kind, channels, max_pixels, member)
            members.append(member)
            errors.append(None)
        except DecodeError as error:
            members.append(None)
            errors.append(error)
    return members, errors


def _open(
    content: bytes | memoryview | NDArray[Any],
    kind: Kind,
    channels: int,
    max_pixels: int,
    previous: Member | None = None,
) -> Member:
    """Read and check the header; it is not parsed if the previous JPEG had the same. Raises DecodeError."""
    if isinstance(content, np.ndarray):
        return open_array(content, kind, channels)
    if not len(content):
        raise DecodeError("it is empty", "empty")
    if kind == "grid":
        return open_grid(content, channels, max_pixels)
    if channels not in (1, 3):
        raise DecodeError(
            f"images have 1 or 3 channels, the model has {channels}; store other data as .npy grids", "wrong_shape"
        )
    if content[:3] != b"\xff\xd8\xff":
        return open_png_or_webp(content, max_pixels)
    if isinstance(previous, Jpeg) and previous.layout is not None and len(content) < _SMALL_BYTES:
        content = bytes(content)
        if previous.layout.fits(content):
            return Jpeg(content, *previous[1:])
    return open_jpeg(content, max_pixels)


def _open_alike(
    encoded: Sequence[bytes | memoryview | NDArray[Any]], channels: int, max_pixels: int
) -> tuple[list[bytes], Layout] | None:
    """The contents and their layout if all are small JPEGs with the same header (common in datasets), else None."""
    if not len(encoded) or any(isinstance(content, np.ndarray) or len(content) >= _SMALL_BYTES for content in encoded):
        return None
    try:
        first = _open(encoded[0], "image", channels, max_pixels)
    except DecodeError:
        return None
    layout = first.layout if isinstance(first, Jpeg) else None
    if layout is None:
        return None
    contents = [bytes(content) for content in encoded]
    return (contents, layout) if all(map(layout.fits, contents)) else None


def _decode_alike(
    contents: Sequence[bytes], layout: Layout, crop: CropRule, side: int, out: Tensor
) -> list[DecodeError | None]:
    """decode_batch for small JPEGs with the same layout."""
    n = len(contents)
    crops = crop(np.full(n, layout.height), np.full(n, layout.width))
    resized = scratch("resized", tuple(out.shape), np.float32)

    def reopen(row: int) -> Member:
        return open_jpeg(contents[row], MAX_PIXELS)

    errors = _resize_stacked(contents, [layout] * n, crops, side, resized, reopen)
    _round_into(out, slice(None), resized)
    return [errors.get(i) for i in range(n)]


def _decode_small(
    members: Sequence[Member | None],
    rows: Int64,
    crops: Crops,
    side: int,
    out: Tensor,
    errors: list[DecodeError | None],
) -> None:
    """Decode small members as a whole and resize them together."""
    numbers = rows.tolist()
    crops = crops.take(rows)
    resized = scratch("resized", (len(numbers), *out.shape[1:]), np.float32)
    chosen = [member for i in numbers if (member := members[i]) is not None]
    jpegs = [member for member in chosen if isinstance(member, Jpeg)]
    layouts = [member.layout for member in jpegs if member.layout is not None]
    if layouts:
        contents = [bytes(member.content) for member in jpegs]
        found = _resize_stacked(contents, layouts, crops, side, resized, chosen.__getitem__)
    else:
        found = _resize_singly(chosen, crops, side, resized)
    for i, error in found.items():
        errors[numbers[i]] = error
    _round_into(out, slice(None) if len(numbers) == len(out) else rows, resized)


def _resize_stacked(
    contents: Sequence[bytes],
    layouts: Sequence[Layout],
    crops: Crops,
    side: int,
    resized: NDArray[np.float32],
    member_of: Callable[[int], Member],
) -> dict[int, DecodeError]:
    """Decode small JPEGs together and resize them. Those that this refuses are decoded one by one, by `member_of` row.

    Returns the errors by row.
    """
    refused = sorted(resize_stacked(contents, layouts, crops, side, resized))
    if not refused:
        return {}
    again = np.empty((len(refused), *resized.shape[1:]), np.float32)
    found = _resize_singly([member_of(i) for i in refused], crops.take(np.array(refused)), side, again)
    resized[refused] = again
    return {refused[i]: error for i, error in found.items()}


def _resize_singly(
    members: Sequence[Member], crops: Crops, side: int, resized: NDArray[np.float32]
) -> dict[int, DecodeError]:
    """Decode small members one by one and resize them together. Returns the errors by row."""
    channels, out_hw = resized.shape[1], (resized.shape[2], resized.shape[3])
    squares = scratch("squares", (len(members), channels, side, side), np.float32)
    squares[...] = 0  # pixels outside of an image have weight 0, but must be finite
    errors: dict[int, DecodeError] = {}
    for i, (square, member) in enumerate(zip(squares, members, strict=True)):
        try:
            square[:, : member.hw[0], : member.hw[1]] = _whole(member, channels)
        except DecodeError as error:
            errors[i] = error
    SmallResize.of(crops, side, out_hw)(squares, resized)
    return errors


def _whole(member: Member, channels: int) -> NDArray[Any]:
    """Decode a whole member, with Pillow if libjpeg-turbo refuses it."""
    try:
        return member.whole(channels)
    except Refused as refused:
        assert isinstance(member, Jpeg)
        pixels = member.for_pillow().whole(channels)
        count_refused(refused)
        return pixels


def _round_into(out: Tensor, rows: slice | Int64, resized: NDArray[np.float32]) -> None:
    """Store resized images or grids in rows of a batch. Overwrites `resized`."""
    if out.dtype == torch.uint8:
        resized += 0.5
        np.clip(resized, 0, 255, out=resized)
    out.numpy()[rows] = resized
