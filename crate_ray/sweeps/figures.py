"""Figures of a sweep as PNG. Background and ink suit light and dark pages; colours are Okabe and Ito's."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from crate_ray.config import SweepConfig
from crate_ray.sweeps.axes import SettingAxis, value_text
from crate_ray.sweeps.importance import Importance, Verdict
from crate_ray.sweeps.results import FINISHED, STOPPED, Comparison, best_trial, curve, front, without_outliers
from crate_ray.sweeps.trial import TrialRecord

_INK, _BLUE, _BEST, _STOPPED, _GREEN = "#7A7A7A", "#3A8FC8", "#D55E00", "#9A9A9A", "#009E73"
_VERDICTS: dict[Verdict, tuple[str, str]] = {
    "matters": (_BEST, "matters"),
    "unclear": (_BLUE, "unclear"),
    "noise": (_STOPPED, "within the noise"),
}
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.color": _INK,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_MOST_TICKS = 6
_LATE = 0.2
"""Part of a run that may be above the axis of the learning curves, because losses fall steeply at first."""


def slices(shown: Comparison, axes: Sequence[SettingAxis], sweep: SweepConfig) -> bytes:
    """The last objective of every trial over the value of each searched setting."""
    columns = min(len(axes), 3)
    rows = -(-len(axes) // columns)
    with rc_context(_STYLE):
        figure = _figure(3.4 * columns + 0.6, 2.6 * rows + 0.5)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
        heights = without_outliers(shown.values, sweep)
        best = _best_index(shown, sweep)
        for panel, axis in zip(panels.ravel(), axes, strict=False):
            places = [axis.place(trial.values[axis.name]) for trial in shown.trials]
            for status, face in ((FINISHED, _BLUE), (STOPPED, "none")):
                chosen = [i for i, trial in enumerate(shown.trials) if trial.status == status and i != best]
                panel.scatter(
                    [places[i] for i in chosen], [heights[i] for i in chosen], s=26, facecolors=face, edgecolors=_BLUE
                )
            panel.scatter(places[best], heights[best], marker="*", s=150, color=_BEST, zorder=3)
            _ticks(panel.xaxis, axis)
            margin = 0.06 * (axis.high - axis.low) or 0.5
            panel.set_xlim(axis.low - margin, axis.high + margin)
            panel.set_xlabel(axis.name)
        for panel in panels.ravel()[len(axes) :]:
            panel.set_visible(False)
        for panel in panels[:, 0]:
            panel.set_ylabel(_words(sweep.objective))
        entries = [("o", _BLUE, _BLUE, "finished"), ("*", _BEST, _BEST, "best")]
        if any(trial.status == STOPPED for trial in shown.trials):
            entries.insert(1, ("o", "none", _BLUE, "stopped early"))
        handles = [
            panels[0, 0].plot([], [], mark, color=edge, markerfacecolor=face, label=label)[0]
            for mark, face, edge, label in entries
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        return _png(figure)


def parallel_coordinates(shown: Comparison, axes: Sequence[SettingAxis], sweep: SweepConfig) -> bytes:
    """Every trial as a line through its values, the objective last. Better trials are bluer and drawn on top; those
    that were stopped early are dashed.
    """
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = _figure(1.7 * len(axes) + 3.0, 4.0)
        panel = figure.subplots()
        sign = 1 if sweep.minimizes else -1
        heights = without_outliers(shown.values, sweep)
        low, high = min(heights), max(heights)
        best = _best_index(shown, sweep)
        order = sorted(range(len(heights)), key=lambda i: (i == best, -sign * heights[i]))  # the best one is drawn last
        ranks = LinearSegmentedColormap.from_list("ranks", [_STOPPED, _BLUE])(np.linspace(0, 1, len(order)))
        for rank, i in enumerate(order):
            trial, is_best = shown.trials[i], i == best
            places = [_share(axis.place(trial.values[axis.name]), axis.low, axis.high) for axis in axes]
            panel.plot(
                range(len(axes) + 1),
                [*places, _share(heights[i], low, high)],
                color=_BEST if is_best else ranks[rank],
                alpha=1.0 if is_best else 0.3 + 0.6 * rank / len(order),
                linewidth=2.6 if is_best else 1.2,
                linestyle="--" if trial.status == STOPPED else "-",
                marker="o",
                markersize=4 if is_best else 2.5,
                clip_on=False,
                label="best" if is_best else None,
            )
        panel.set_xlim(0, len(axes))
        panel.set_ylim(0, 1)
        panel.set_xticks(range(len(axes) + 1), [*(axis.name.replace(".", ".\n") for axis in axes), ""])
        panel.text(len(axes), -0.06, _words(sweep.objective), ha="center", va="top")
        panel.set_yticks([])
        panel.tick_params(length=0, pad=9)
        panel.spines["left"].set_visible(False)
        panel.spines["bottom"].set_visible(False)
        scales: list[list[tuple[float, str]]] = [
            [(_share(place, axis.low, axis.high), text) for place, text in _labels(axis)] for axis in axes
        ]
        scales.append([(share, value_text(low + share * (high - low))) for share in (0.0, 0.25, 0.5, 0.75, 1.0)])
        for at, scale in enumerate(scales):
            panel.axvline(at, color=_INK, linewidth=0.9)
            for share, text in scale:
                panel.annotate(
                    text,
                    (at, share),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color="white",
                    bbox={"boxstyle": "round,pad=0.15", "color": "#606060", "alpha": 0.85, "linewidth": 0},
                    annotation_clip=False,
                    zorder=4,
                )
        figure.legend(loc="outside upper right")
        return _png(figure)


def importance(found: Sequence[Importance]) -> bytes:
    """Importance of each setting with its interval, and the band of what a shuffled setting gets."""
    with rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = _figure(7.4, 0.42 * len(found) + 1.5)
        panel = figure.subplots()
        for row, one in enumerate(found):
            colour = _VERDICTS[one.verdict][0]
            panel.barh(row, 100 * one.chance_high, height=0.5, color=_INK, alpha=0.22, linewidth=0)
            panel.plot([100 * one.chance] * 2, [row - 0.25, row + 0.25], color=_INK, linewidth=1.2)
            panel.plot([100 * one.low, 100 * one.high], [row, row], color=colour, linewidth=2)
            panel.plot(100 * one.share, row, "o", color=colour, markersize=7)
        panel.set_yticks(range(len(found)), [one.name for one in found])
        panel.set_ylim(len(found) - 0.5, -0.5)
        panel.set_xlim(left=0)
        panel.set_xlabel(
            "share of the variance between trials / %, with 95 % intervals\ngrey: what a shuffled setting gets"
        )
        shown = [_VERDICTS[verdict] for verdict in _VERDICTS if any(one.verdict == verdict for one in found)]
        handles = [panel.plot([], [], "o-", color=colour, label=label)[0] for colour, label in shown]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        return _png(figure)


def curves(records: Sequence[TrialRecord], sweep: SweepConfig) -> bytes | None:
    """The objective of every trial over its steps; None if it was not measured during training."""
    found = [(record, points) for record in records if (points := curve(record))]
    if all(len(points) < 2 for _, points in found):
        return None
    best = best_trial(records, sweep)
    with rc_context(_STYLE):
        figure = _figure(7.0, 3.8)
        panel = figure.subplots()
        for record, points in found:
            if record is best:
                style: dict[str, Any] = {"color": _BEST, "linewidth": 2.4, "zorder": 3}
            elif record.status == STOPPED:
                style = {"color": _STOPPED, "linewidth": 1.1, "linestyle": "--"}
            else:
                style = {"color": _BLUE, "linewidth": 1.1, "alpha": 0.75}
            steps, values = list(points), list(points.values())
            panel.plot(steps, values, **style)
            panel.plot(steps[-1], values[-1], "x" if record.status == STOPPED else "o", color=style["color"], ms=4)
        panel.set_ylim(*_limits([points for _, points in found], sweep))
        panel.set_xlabel("step")
        panel.set_ylabel(_words(sweep.objective))
        entries = [(_BEST, "o-", "best"), (_BLUE, "o-", "finished or running"), (_STOPPED, "x--", "stopped early")]
        present = [best is not None, True, any(record.status == STOPPED for record, _ in found)]
        handles = [
            panel.plot([], [], style, color=colour, label=label)[0]
            for (colour, style, label), shown in zip(entries, present, strict=True)
            if shown
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        return _png(figure)


def trade_offs(records: Sequence[TrialRecord], sweep: SweepConfig) -> bytes | None:
    """The two objectives of every finished trial, with the Pareto front; None without a second objective."""
    chosen = front(records, sweep)
    if not chosen:
        return None
    names = list(sweep.directions)
    points = {
        r.trial: (r.objectives[names[1]], r.objectives[names[0]])
        for r in records
        if r.status == FINISHED and all(math.isfinite(r.objectives.get(name, math.nan)) for name in names)
    }
    with rc_context(_STYLE):
        figure = _figure(6.2, 4.0)
        panel = figure.subplots()
        on_front = {record.trial for record in chosen}
        others = [point for trial, point in points.items() if trial not in on_front]
        if others:
            panel.plot(*zip(*others, strict=True), "o", color=_BLUE, label="finished", ms=5)
        line = sorted(points[trial] for trial in on_front)
        panel.plot(*zip(*line, strict=True), "o-", color=_BEST, label="Pareto front", zorder=3, ms=5)
        for record in chosen[:8]:
            point = points[record.trial]
            panel.annotate(record.trial, point, (5, 5), textcoords="offset points", fontsize=7, annotation_clip=False)
        wanted = {"minimize": "small is better", "maximize": "large is better"}
        panel.set_xlabel(f"{_words(names[1])} ({wanted[sweep.directions[names[1]]]})")
        panel.set_ylabel(f"{_words(names[0])} ({wanted[sweep.directions[names[0]]]})")
        x = [point[0] for point in points.values()]
        if min(x) > 0 and max(x) > 20 * min(x):
            panel.set_xscale("log")
        else:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.margins(0.08)
        figure.legend(loc="outside upper right", ncols=2)
        return _png(figure)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_facecolor(to_rgba("white", 0.0))
    return figure


def _png(figure: Figure) -> bytes:
    for panel in figure.axes:
        panel.patch.set_alpha(0.0)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, transparent=True)
    return out.getvalue()


def _best_index(shown: Comparison, sweep: SweepConfig) -> int:
    best = best_trial(shown.trials, sweep)
    if best is not None:
        return next(i for i, trial in enumerate(shown.trials) if trial.trial == best.trial)
    sign = 1 if sweep.minimizes else -1
    return min(range(len(shown.values)), key=lambda i: sign * shown.values[i])


def _limits(curves: Sequence[dict[int, float]], sweep: SweepConfig) -> tuple[float, float]:
    """Ends of the axis of learning curves. Bad beginnings and diverged trials go beyond it."""
    sign, longest = 1 if sweep.minimizes else -1, max(max(points) for points in curves)
    losses = [{step: sign * value for step, value in points.items()} for points in curves]
    early = [next((v for step, v in points.items() if step >= _LATE * longest), None) for points in losses]
    starts = [value for value in early if value is not None]
    best = min(min(points.values()) for points in losses)
    worst = min(max(starts), best + 2 * (float(np.median(starts)) - best))
    margin = 0.05 * (worst - best) or 1.0
    low, high = sorted((sign * (best - margin), sign * (worst + margin)))
    return low, high


def _words(name: str) -> str:
    return name.replace("_", " ")


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _labels(axis: SettingAxis) -> list[tuple[float, str]]:
    """A few places on an axis with their texts."""
    if axis.choices is not None:
        step = -(-len(axis.choices) // _MOST_TICKS)
        return [(float(i), _short(axis.choices[i])) for i in range(0, len(axis.choices), step)]
    if axis.is_log:
        decades = range(math.floor(axis.low), math.ceil(axis.high) + 1)
        within = [
            math.log10(digit) + decade
            for decade in decades
            for digit in ((1,) if axis.high - axis.low > 3 else (1, 3))
            if axis.low - 1e-9 <= math.log10(digit) + decade <= axis.high + 1e-9
        ]
        places = within if len(within) > 1 else [axis.low, axis.high]
        return [(place, value_text(10**place)) for place in places]
    return [(float(place), value_text(float(place))) for place in np.linspace(axis.low, axis.high, 4)]


def _ticks(ticks: Any, axis: SettingAxis) -> None:
    if axis.choices is not None or axis.is_log:
        places, texts = zip(*_labels(axis), strict=True)
        ticks.set_ticks(places, texts)


def _short(value: Any) -> str:
    text = value_text(value)
    return text if len(text) <= 14 else text[:13] + "…"
