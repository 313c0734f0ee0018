"""Results of a sweep: a table with a row per trial, and a picture with a panel per swept setting."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from crate_ray.config import SearchSpace, SweepConfig
from crate_ray.sweeps.trial import TrialRecord

matplotlib.use("Agg")


def best_trial(results: list[TrialRecord], sweep: SweepConfig) -> TrialRecord | None:
    """The finished trial with the best objective; None when none finished."""
    finished = [r for r in results if r.status == "finished" and r.objective is not None]
    sign = 1 if sweep.minimizes else -1
    return min(finished, key=lambda r: sign * (r.objective or 0.0), default=None)


def results_table(results: list[TrialRecord], sweep: SweepConfig) -> pd.DataFrame:
    """One row per trial, the best first, failed ones last."""
    rows = [
        {
            "trial": r.trial,
            "status": r.status,
            sweep.objective: r.objective,
            "step": r.step,
            **r.values,
            "cause": r.cause,
        }
        for r in results
    ]
    return pd.DataFrame(rows).sort_values(
        sweep.objective, ascending=sweep.minimizes, na_position="last", ignore_index=True
    )


def picture(results: list[TrialRecord], sweep: SweepConfig) -> bytes:
    """PNG with a panel per swept setting, which plots the objective of every trial over the setting's value."""
    names = list(sweep.search)
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    best = best_trial(results, sweep)
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, name, sweep.search[name], [r for r in results if r.objective is not None], best)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel(sweep.objective.replace("_", " "))
    axes[0].legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _panel(axis: Any, name: str, space: SearchSpace, results: list[TrialRecord], best: TrialRecord | None) -> None:
    categories = None
    if space.choice is not None:
        categories = [str(value) for value in space.choice]
        axis.set_xticks(range(len(categories)), categories)

    def place(result: TrialRecord) -> float:
        value = result.values[name]
        return float(categories.index(str(value)) if categories else value)

    for status, marker, filled in (("finished", "o", True), ("stopped early", "o", False)):
        chosen = [r for r in results if r.status == status and r is not best]
        if chosen:
            face = "tab:blue" if filled else "none"
            x, y = [place(r) for r in chosen], [r.objective for r in chosen]
            axis.scatter(x, y, marker=marker, facecolors=face, edgecolors="tab:blue", label=status)
    if best is not None:
        axis.scatter([place(best)], [best.objective], marker="*", s=160, color="tab:red", label="best", zorder=3)
    if space.loguniform is not None:
        axis.set_xscale("log")
        axis.tick_params(axis="x", which="both", labelsize=7, labelrotation=30)
    axis.set_xlabel(name)
    axis.grid(alpha=0.3)
