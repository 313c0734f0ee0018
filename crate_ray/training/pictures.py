"""Pictures of a model on a few images: reconstructions, attention maps, and measures by layer."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import Normalizer

_GAP = 4
_LEAST_TILE = 96
_MOST_HEADS = 6


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images_BCHW: Tensor, noise_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Masked images, with masked patches in grey (0), and reconstructed images, with predictions in their place.

    Both are (B, channels, H, W) on the scale of the normalised input. Visible patches are those of the original.
    """
    output = model(images_BCHW, noise_BN)
    removed = model.unpatchify(output.mask[:, :, None].expand_as(output.prediction).to(images_BCHW.dtype))
    predicted = model.reconstruct(output.prediction.float(), images_BCHW)
    return images_BCHW * (1 - removed), images_BCHW * (1 - removed) + predicted * removed


def reconstruction_rows(
    model: MaskedAutoencoder, normalizer: Normalizer, images_BCHW: Tensor, noise_BN: Tensor
) -> list[Tensor]:
    """Original, masked and reconstructed images, (B, channels, H, W) each, on the CPU. Takes loaded (not normalised)
    images."""
    normalised = normalizer(images_BCHW)
    return [normalizer.undo(row).float().cpu() for row in (normalised, *reconstruct(model, normalised, noise_BN))]


def value_range(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Values of black and white of each channel, (channels, 1, 1), of loaded images: 0 and 1, or the range of grids."""
    channels = images_BCHW.shape[1]
    if images_BCHW.dtype == torch.uint8:
        return torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    low_C11, high_C11 = (extreme(images_BCHW, (0, 2, 3))[:, None, None] for extreme in (torch.amin, torch.amax))
    return low_C11, torch.where(high_C11 > low_C11, high_C11, low_C11 + low_C11.abs().clamp_min(1))


def reconstruction_picture(rows: Sequence[Tensor], limits: tuple[Tensor, Tensor]) -> bytes:
    """PNG with a column per sample, of `reconstruction_rows`.

    `limits` is the `value_range` of the images. Of grids with neither 1 nor 3 channels, the first is shown.
    """
    return _tiled([_colours(row, limits) for row in rows])


def attention_picture(images_BCHW: Tensor, maps_BKhw: Tensor, limits: tuple[Tensor, Tensor]) -> bytes:
    """PNG with a column per sample: the image, then the attention of one layer's CLS token: the mean over the heads,
    then up to six heads. Brighter is more, each map on its own scale. Takes loaded (not normalised) images.
    """
    from matplotlib import colormaps  # imported here, because it takes a third of a second and few workers need it

    shown = [maps_BKhw.mean(1), *maps_BKhw[:, :_MOST_HEADS].unbind(1)]
    rows = [_colours(images_BCHW.float() / (255 if images_BCHW.dtype == torch.uint8 else 1), limits)]
    height, width = images_BCHW.shape[2:]
    for map_Bhw in shown:
        low, high = map_Bhw.amin((1, 2), keepdim=True), map_Bhw.amax((1, 2), keepdim=True)
        scaled = ((map_Bhw - low) / (high - low).clamp_min(1e-12)).numpy()
        coloured = colormaps["cividis"](scaled)[..., :3].astype(np.float32)
        zoom = height // coloured.shape[1], width // coloured.shape[2]
        rows.append(coloured.repeat(zoom[0], 1).repeat(zoom[1], 2))
    return _tiled(rows)


def layers_picture(
    measures_by_step: Mapping[int, Mapping[str, Sequence[float | None]]],
    titles: Mapping[str, str],
    encoder_depth: int | None = None,
    log_scale: Collection[str] = (),
) -> bytes:
    """PNG with a chart per measure: its value by layer, one line for each step; later steps are darker.

    Args:
        measures_by_step: values by layer, by measure, by step. Steps that lack a measure are left out; None is a gap.
        titles: titles by measure, of the measures to show.
        encoder_depth: number of encoder layers if the decoder's follow, behind a vertical line; None if there are none.
        log_scale: measures on a logarithmic scale.
    """
    from matplotlib import colormaps, rc_context  # as above
    from matplotlib.figure import Figure

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with rc_context(style):
        figure = Figure(figsize=(3.2 * len(titles), 3), layout="constrained")
        axes = figure.subplots(1, len(titles), squeeze=False)[0]
        steps = sorted(step for step, measures in measures_by_step.items() if measures.keys() >= titles.keys())
        for axis, (measure, title) in zip(axes, titles.items(), strict=True):
            for place, step in enumerate(steps, 1):
                values = np.array(measures_by_step[step][measure], dtype=float)
                colour = colormaps["viridis_r"](0.15 + 0.85 * place / len(steps))
                axis.plot(range(1, len(values) + 1), values, marker="o", ms=3, color=colour, label=f"step {step:,}")
            axis.set_title(title, fontsize=10)
            if measure in log_scale:
                axis.set_yscale("log")
            if encoder_depth is not None:
                axis.axvline(encoder_depth + 0.5, color="0.7", linewidth=0.8)
            axis.set_xlabel("encoder layer" if encoder_depth is None else "encoder | decoder layer")
            axis.set_xlim(0.5, len(values) + 0.5)
            axis.xaxis.get_major_locator().set_params(integer=True)
        named = sorted({0, len(steps) // 2, len(steps) - 1})
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].legend([handles[i] for i in named], [labels[i] for i in named], frameon=False, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _colours(images_BCHW: Tensor, limits: tuple[Tensor, Tensor]) -> NDArray[np.float32]:
    """(B, H, W, 3) on the scale 0 to 1."""
    low_C11, high_C11 = limits
    scaled = ((images_BCHW - low_C11) / (high_C11 - low_C11)).clamp(0, 1)
    if scaled.shape[1] != 3:
        scaled = scaled[:, :1].expand(-1, 3, -1, -1)
    return scaled.permute(0, 2, 3, 1).float().cpu().numpy()


def _tiled(rows_RBHWC: Sequence[NDArray[np.float32]]) -> bytes:
    """PNG of rows of pictures of equal size; small ones are enlarged."""
    count, height, width, _ = rows_RBHWC[0].shape
    zoom = max(1, round(_LEAST_TILE / height))
    size = len(rows_RBHWC) * (height * zoom + _GAP) + _GAP, count * (width * zoom + _GAP) + _GAP
    canvas = np.full((*size, 3), 255, np.uint8)
    for r, row_BHWC in enumerate(rows_RBHWC):
        for c, picture_HWC in enumerate(row_BHWC):
            tile = (picture_HWC * 255).round().astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
            top, left = _GAP + r * (height * zoom + _GAP), _GAP + c * (width * zoom + _GAP)
            canvas[top : top + height * zoom, left : left + width * zoom] = tile
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, "PNG")
    return out.getvalue()
