"""The figure of a comparison: each measure of each model, with its seeds, their interval, and the controls."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from crate_ray.comparison.table import Comparison, Variant
from crate_ray.evaluation.figures import STYLE, saved

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#7F7F7F"
_PANELS = (("loss", None), ("probe", "probe_untrained"), ("knn", "knn_untrained"), ("finetuned", "scratch"))
"""Measures that are shown, each with the control of the same model."""
_TITLES = {
    "loss": "masked loss (lower is better)",
    "probe": "linear probe / %",
    "knn": "k-NN / %",
    "finetuned": "fine-tuned / %",
}


def figure_of(found: Comparison) -> bytes:
    """The figure of a comparison as PNG."""
    with rc_context(STYLE):
        return saved(draw(found), "png", dpi=130)


def draw(found: Comparison) -> Figure:
    """Draw a comparison: a panel for each measure that all models have, a row for each model."""
    names = list(found.variants)
    panels = [panel for panel in _PANELS if all(panel[0] in v.intervals for v in found.variants.values())]
    figure = Figure(figsize=(1.4 + 2.5 * len(panels), 1.3 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (measure, control) in zip(axes, panels, strict=True):
        for row, variant in enumerate(found.variants.values()):
            _row(axis, row, variant, measure, _BLUE if row == 0 else _ORANGE)
            if control is not None:
                axis.plot(100 * variant.intervals[control].mean, row, "s", color=_GREY, mfc="none", ms=4)
        if (pixels := getattr(found.pixels, measure, None)) is not None:
            axis.axvline(100 * pixels, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(_TITLES[measure])
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    several = len(found.variants[names[0]].runs) > 1
    _legend(figure, axes[0], several=several, tuned=("finetuned", "scratch") in panels)
    return figure


def _row(axis: Any, row: int, variant: Variant, measure: str, colour: str) -> None:
    scale, mean = _scale(measure), variant.intervals[measure]
    if mean.low is None or mean.high is None:
        axis.plot(scale * mean.mean, row, "o", color=colour, markersize=6)
        return
    axis.errorbar(scale * mean.mean, row, xerr=scale * (mean.high - mean.mean), fmt="o", color=colour, ms=6, capsize=3)
    seeds = [scale * getattr(run, measure) for run in variant.runs]
    axis.plot(seeds, [row + 0.22] * len(seeds), "|", color=colour, markersize=6)


def _scale(measure: str) -> float:
    return 1 if measure == "loss" else 100


def _legend(figure: Figure, axis: Any, several: bool, tuned: bool) -> None:
    dot: dict[str, Any] = {"marker": "o", "color": "black"}
    each: dict[str, Any] = {"marker": "|", "color": "black"}
    entries = [("mean and 95 % interval of the seeds", dot), ("each seed", each)] if several else [("trained", dot)]
    square: dict[str, Any] = {"marker": "s", "color": _GREY, "mfc": "none", "ms": 4}
    entries.append(("untrained, or fine-tuned from random weights" if tuned else "untrained", square))
    handles = [axis.plot([], [], linestyle="", label=label, **style)[0] for label, style in entries]
    handles += axis.plot([], [], color="black", linewidth=0.8, linestyle=":", label="raw pixels")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
