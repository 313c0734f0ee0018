"""Draws a query and its neighbours as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crate_ray.data.decode.samples import decode_batch
from crate_ray.data.decode.transforms import Crops, Int64, centre_crops
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.manifest import Manifest
from crate_ray.data.read.content import sample_contents
from crate_ray.data.read.shard_reader import ShardReader
from crate_ray.output import visible

_COLUMNS = 6
_SIDE = 224
_TITLE = 22
_INCHES = 1.6


def encoded_images(shards: ShardSet, numbers: Sequence[int]) -> list[bytes]:
    """Encoded images or grids of samples; empty bytes for those that cannot be read."""
    reader = ShardReader(shards)
    samples = [reader.read(number, 1)[0] for number in numbers]
    contents = sample_contents(samples, shards.manifest.image_suffixes, "ignored")
    return [bytes(content) for content in contents.encoded]


def query_title(query: str, label: str | None) -> str:
    """Title of the query."""
    return f"query {query.rstrip('/').rpartition('/')[2]}\n{label or ''}"


def draw(encoded: Sequence[bytes], titles: Sequence[str], manifest: Manifest) -> bytes:
    """A PNG with a tile for each image, the first of which is framed.

    Args:
        encoded: encoded images, or .npy grids.
        titles: two lines for each.
        manifest: of their dataset.
    """
    columns = min(_COLUMNS, len(encoded))
    rows = -(-len(encoded) // columns)
    figure = Figure(figsize=(columns * _INCHES, rows * (_INCHES + 0.45)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (content, title) in enumerate(zip(encoded, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(number == 0)
            spine.set_linewidth(2.5)
            spine.set_color("tab:red")
        lines = "\n".join(_short(visible(line)) for line in title.split("\n"))
        axes.set_title(lines, fontsize=8, parse_math=False, fontweight="bold" if number == 0 else "normal")
        picture = _pixels(content, manifest)
        if picture is None:
            axes.text(0.5, 0.5, "cannot be read", ha="center", va="center", fontsize=7, transform=axes.transAxes)
        else:
            small = max(picture.shape[:2]) < _SIDE
            axes.imshow(picture, interpolation="nearest" if small else "antialiased")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _short(line: str) -> str:
    return line if len(line) <= _TITLE else f"{line[: _TITLE // 2 - 1]}…{line[-_TITLE // 2 :]}"


def _pixels(content: bytes, manifest: Manifest) -> NDArray[np.uint8] | None:
    """The largest centre crop of an image or grid as (H, W, 3); None if it cannot be decoded."""
    is_grid = manifest.kind == "grid"
    hw = (manifest.height or _SIDE, manifest.width or _SIDE)
    hw = hw if is_grid else (min(_SIDE, *hw),) * 2
    out = torch.empty(1, manifest.channels if is_grid else 3, *hw, dtype=torch.float32 if is_grid else torch.uint8)

    def centre(heights: Int64, widths: Int64) -> Crops:
        return centre_crops(heights, widths, hw)

    if decode_batch([content], manifest.kind, centre, out)[0] is not None:
        return None
    if is_grid:
        shown = out if out.shape[1] == 3 else out[:, :1]
        low, high = shown.amin((2, 3), keepdim=True), shown.amax((2, 3), keepdim=True)
        out = ((shown - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8).expand(1, 3, *hw)
    return out[0].permute(1, 2, 0).numpy()
