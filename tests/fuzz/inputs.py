"""Seeds and mutations that fuzz tests share."""

from __future__ import annotations

import io
import tarfile
from functools import cache

import numpy as np
from hypothesis import strategies as st
from PIL import Image

BYTES = st.sampled_from([0, 1, 7, 8, 0x20, 0x2D, 0x30, 0x39, 0x7F, 0x80, 0xC2, 0xD0, 0xD9, 0xDA, 0xE1, 0xFE, 0xFF])
"""Bytes with a meaning in some format, more likely to matter than others."""


@st.composite
def mutated(draw: st.DrawFn, seeds: st.SearchStrategy[bytes]) -> bytes:
    """A seed with some bytes changed, and parts of it, or of another seed, removed, repeated or put in."""
    content = bytearray(draw(seeds))
    for _ in range(draw(st.integers(0, 5))):
        # Headers and ends matter most.
        near = draw(st.sampled_from([16, 64, 512, len(content)]))
        at = draw(st.integers(0, max(0, min(near, len(content)) - 1)))
        at = len(content) - 1 - at if draw(st.booleans()) else at
        match draw(st.sampled_from(["change", "change", "any", "remove", "repeat", "insert", "cut"])):
            case "change" if content:
                content[at] = draw(BYTES)
            case "any" if content:
                content[at] = draw(st.integers(0, 255))
            case "remove":
                del content[at : at + draw(st.integers(1, 600))]
            case "repeat":
                size, times = draw(st.integers(1, 600)), draw(st.sampled_from([1, 2, 20]))
                content[at:at] = content[at : at + size] * times
            case "insert":
                other = draw(seeds)
                begin = draw(st.integers(0, max(0, len(other) - 1)))
                content[at:at] = other[begin : begin + draw(st.integers(1, 600))]
            case "cut":
                del content[max(0, at) :]
    return bytes(content)


def encoded(kind: str, mode: str = "RGB", side: int = 20, **options: object) -> bytes:
    """A small picture."""
    pixels = np.random.default_rng(side).integers(0, 255, (side, side + 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


@cache
def images() -> list[bytes]:
    """Pictures of all formats and kinds."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded("JPEG"), encoded("JPEG", "L"), encoded("JPEG", "CMYK"), encoded("JPEG", progressive=True),
        encoded("JPEG", restart_marker_rows=1), encoded("JPEG", exif=exif), encoded("JPEG", side=100),
        encoded("PNG"), encoded("PNG", "P"), encoded("PNG", "LA"), encoded("PNG", "I;16"), encoded("PNG", exif=exif),
        encoded("WEBP"), encoded("WEBP", lossless=True), encoded("WEBP", "RGBA", exif=exif, icc_profile=b"any"),
    ]  # fmt: skip


@cache
def arrays() -> list[bytes]:
    """Arrays of all kinds."""
    found = []
    for shape in ((1, 4, 4), (3, 5), (2, 3, 4), ()):
        for dtype in ("f4", ">f8", "u1", "?", "U3", "c8"):
            file = io.BytesIO()
            np.save(file, np.ones(shape, dtype))
            found.append(file.getvalue())
    return found


@cache
def tars() -> list[bytes]:
    """Shards of all formats, with long names, links and folders."""
    found = []
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
            for name, kind in (("a/b.jpg", tarfile.REGTYPE), ("a", tarfile.DIRTYPE), ("c.jpg", tarfile.LNKTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "a/b.jpg" if kind == tarfile.LNKTYPE else ""
                info.size = 5 if kind == tarfile.REGTYPE else 0
                tar.addfile(info, io.BytesIO(b"12345"))
            info = tarfile.TarInfo(f"{'d/' * 45}é{'f' * (60 if tar_format == tarfile.USTAR_FORMAT else 150)}.cls")
            info.size = 1
            if tar_format != tarfile.USTAR_FORMAT:
                tar.addfile(info, io.BytesIO(b"7"))
        found.append(file.getvalue()[: 512 * 16])
    return found
