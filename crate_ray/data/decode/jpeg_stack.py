"""Small JPEGs with the same header are decoded as one, because set-up and the interpreter cost more than their pixels.

A restart marker (ITU T.81, E.2.4) resets the entropy decoder. So the coded data of several images, joined by restart
markers, forms one image with all MCUs below each other. Its header declares RGB, with the luma blocks in a row. So the
decoder neither interpolates chroma, which would mix neighbouring images, nor converts colours. Both operations are
linear, so the resize does them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from crate_ray.data.decode.scratch import scratch
from crate_ray.data.decode.transforms import Crops, SmallResize

_START, _END = b"\xff\xd8", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\0]")
"""In coded data, 0 follows every 0xFF. With restart markers of its own, an image could hold coded data for the place of
its neighbours in a stack. So there may be no marker between an image's header and its end."""
_IS_RGB = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
_SAMPLINGS = {0x11: (1, 1), 0x21: (1, 2), 0x22: (2, 2)}
"""Rows and columns of luma blocks per MCU, by sampling factor in the frame header."""
_RESTARTS = tuple(bytes((0xFF, 0xD0 + i)) for i in range(8))
_YCC_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136286, -0.714136286], [1, 1.772, 0]], np.float32)
"""JFIF's conversion of luma and zero-centred chroma to RGB."""
_MAX_ROWS = 65_500
"""Limit of libjpeg."""


class Layout(NamedTuple):
    """The common properties of JPEGs that can be decoded together."""

    header: bytes
    """Everything before the coded data."""
    height: int
    width: int
    components: int
    sampling: tuple[int, int]
    """Luma blocks per MCU: rows, columns."""
    tables: bytes
    """Quantisation and Huffman tables."""
    frame: bytes
    """Frame header segment."""
    scan: bytes
    """Scan header segment."""

    @property
    def mcus(self) -> tuple[int, int]:
        """Rows and columns of MCUs."""
        return -(-self.height // (8 * self.sampling[0])), -(-self.width // (8 * self.sampling[1]))

    def fits(self, content: bytes) -> bool:
        """Whether a JPEG has this layout."""
        return (
            content.startswith(self.header)
            and content.endswith(_END)
            and not _MARKER.search(content, len(self.header), len(content) - len(_END))
        )


def layout_of(content: bytes) -> Layout | None:
    """The layout of a JPEG with a valid frame header; None if it cannot be stacked.

    This depends on the JPEG alone, so the pixels of an image do not depend on its neighbours in a batch.
    """
    tables, frame, scan, position, is_jfif = b"", b"", b"", 2, False
    while not scan:
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        segment, marker = content[position:end], content[position + 1 : position + 2]
        if segment[:1] != b"\xff" or len(segment) < 4 or end >= len(content):
            return None
        match marker:
            case b"\xc0":
                frame = segment
            case b"\xc4" | b"\xdb":
                tables += segment
            case b"\xda":
                scan = segment
            case b"\xe0":
                is_jfif = is_jfif or segment[4:9] == b"JFIF\0"
            case b"\xe2" | b"\xed" | b"\xfe":  # colour profile, Photoshop, comment
                pass
            case _:  # another coding process, restart intervals, orientation, Adobe's colours
                return None
        position = end
    if not is_jfif or not frame or frame[4] != 8 or not content.endswith(_END):
        return None
    if _MARKER.search(content, position, len(content) - len(_END)):
        return None
    height, width, components = int.from_bytes(frame[5:7], "big"), int.from_bytes(frame[7:9], "big"), frame[9]
    if components not in (1, 3) or len(frame) != 10 + 3 * components or scan[4] != components:
        return None
    if components == 1:
        sampling: tuple[int, int] | None = (1, 1)  # has no effect on one component
    else:
        sampling = _SAMPLINGS.get(frame[11])
        if frame[14] != 0x11 or frame[17] != 0x11 or width < 8:  # narrower chroma is not interpolated
            sampling = None
    if sampling is None:
        return None
    return Layout(content[:position], height, width, components, sampling, tables, frame, scan)


def resize_stacked(
    contents: Sequence[bytes],
    layouts: Sequence[Layout],
    crops: Crops,
    side: int,
    out: NDArray[np.float32],
) -> dict[int, str]:
    """Decode n small JPEGs with the same components and sampling, and resize them into out, (n, C, height, width).

    Luma and chroma are resized from their stored resolution. Returns the error messages of damaged images, by row.
    """
    n, channels, out_hw = len(contents), out.shape[1], (out.shape[2], out.shape[3])
    v, h = layouts[0].sampling
    has_chroma = channels == layouts[0].components == 3
    luma = scratch("luma", (n, 1, side, side), np.float32)
    # Interpolation of chroma needs a margin.
    chroma = scratch("chroma", (n, 2, side // v + 2 * (v - 1), side // h + 2 * (h - 1)), np.float32)
    errors: dict[int, str] = {}
    alike: dict[bytes, list[int]] = {}
    for i, layout in enumerate(layouts):
        alike.setdefault(layout.header, []).append(i)
    queue = list(alike.values())
    if len(queue) > 1 or layouts[0].height < side or layouts[0].width < side:
        luma[...] = chroma[...] = 0  # pixels outside of an image have weight 0, but must be finite
    while queue:
        numbers = queue.pop()
        layout = layouts[numbers[0]]
        rows = slice(None) if len(numbers) == n else np.array(numbers)
        try:
            luma_NHW, chroma_NCHW = _decode([contents[i] for i in numbers], layout)
        except ValueError as error:
            luma[rows] = chroma[rows] = 0
            if len(numbers) == 1:
                errors[numbers[0]] = str(error)
            else:
                queue += ([i] for i in numbers)
            continue
        luma[rows, 0, : layout.height, : layout.width] = luma_NHW
        if has_chroma:
            height, width = chroma_NCHW.shape[2:]
            chroma[rows, :, v - 1 : v - 1 + height, h - 1 : h - 1 + width] = chroma_NCHW
            if v == 2:
                chroma[rows, :, 0] = chroma[rows, :, 1]
                chroma[rows, :, height + 1] = chroma[rows, :, height]
            if h == 2:
                chroma[rows, :, :, 0] = chroma[rows, :, :, 1]
                chroma[rows, :, :, width + 1] = chroma[rows, :, :, width]
    resize = SmallResize.of(crops, side, out_hw)
    if has_chroma:
        planes = scratch("planes", out.shape, np.float32)
        resize(luma, planes[:, :1])
        if (v, h) != (1, 1):
            resize = SmallResize.of(crops, side, out_hw, (v, h))
        resize(chroma, planes[:, 1:])
        np.matmul(_YCC_TO_RGB, planes.reshape(n, 3, -1), out=out.reshape(n, 3, -1))
    else:
        resize(luma, out[:, :1])
        out[:, 1:] = out[:, :1]
    return errors


def _decode(contents: Sequence[bytes], layout: Layout) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Luma (n, height, width) and zero-centred chroma (n, 2, rows, columns) of JPEGs with one layout.

    Chroma is empty for grayscale. Raises ValueError if any of them is damaged.
    """
    v, h = layout.sampling
    rows, columns = layout.mcus
    mcus, n = rows * columns, len(contents)
    most = _MAX_ROWS // (8 * mcus)
    strips = scratch("strips", (n, rows, columns, 8, v, h, 8, layout.components), np.uint8)
    for first in range(0, n, most):
        part = strips[first : first + most]
        colours = "GRAY" if layout.components == 1 else "RGB"
        stack = _stacked(contents[first : first + most], layout, mcus)
        simplejpeg.decode_jpeg(stack, colours, fastupsample=True, buffer=part)  # repeats chroma, no interpolation
    luma = strips[..., 0].transpose(0, 1, 4, 3, 2, 5, 6).reshape(n, rows * v * 8, columns * h * 8)
    luma = luma[:, : layout.height, : layout.width]
    if layout.components == 1:
        return luma, np.empty((n, 2, 0, 0), np.int8)
    chroma = strips.reshape(n, rows, columns, 8, 8 * v * h, 3)[:, :, :, :, :: v * h, 1:]
    chroma = (chroma.transpose(0, 5, 1, 3, 2, 4) ^ 128).reshape(n, 2, rows * 8, columns * 8).view(np.int8)
    return luma, chroma[:, :, : -(-layout.height // v), : -(-layout.width // h)]


def _stacked(contents: Sequence[bytes], layout: Layout, mcus: int) -> bytes:
    """One JPEG with the coded data of all."""
    v, h = layout.sampling
    frame = bytearray(layout.frame)
    frame[5:7] = (8 * mcus * len(contents)).to_bytes(2, "big")
    frame[7:9] = (8 * v * h).to_bytes(2, "big")
    frame[11] = 0x10 * v * h + 1
    restarts = b"\xff\xdd\0\4" + mcus.to_bytes(2, "big")
    parts = [_START, _IS_RGB if layout.components == 3 else b"", layout.tables, bytes(frame), restarts, layout.scan]
    begin = len(layout.header)
    for i, content in enumerate(contents):
        parts += (content[begin:-2], _RESTARTS[i % 8])
    parts[-1] = _END
    return b"".join(parts)
