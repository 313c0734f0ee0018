"""What a sweep found, in words: the best settings, which settings mattered, and what to try next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crate_ray.addresses import redact
from crate_ray.config import SearchSpace, SweepConfig
from crate_ray.output import visible
from crate_ray.sweeps.axes import SettingAxis, value_text
from crate_ray.sweeps.importance import FEWEST_TRIALS, Importance
from crate_ray.sweeps.results import (
    FINISHED,
    PRUNED,
    STOPPED,
    Comparison,
    best_trial,
    comparable,
    front,
)
from crate_ray.sweeps.savings import full_curves, replay_asha
from crate_ray.sweeps.trial import TrialRecord

_PER_SETTING = 10
"""With fewer trials for each searched setting, the summary advises to run more. A rule of thumb."""
_EDGE = 0.1
"""Part of a range at each end that counts as its edge."""
_FRONT_ROWS = 20


@dataclass(frozen=True)
class Summary:
    """The parts of a summary, as sentences and rows of tables."""

    title: str
    counts: str
    """How many trials ended in which way."""
    best: str
    """The best trial; empty if none finished."""
    settings: list[tuple[str, str]]
    """Searched settings of the best trial."""
    mattered: list[str]
    """Which settings mattered, which did not."""
    importances: Sequence[Importance]
    early_stopping: str
    next: list[str]
    """What to try next."""
    front: list[tuple[str, ...]]
    """Rows of the best trade-offs, with a heading; empty without a second objective."""
    not_run: list[tuple[str, str, str, str]]
    """Failed and pruned trials: id, status, settings, cause."""

    def lines(self) -> list[str]:
        """The summary in a few lines, for a terminal."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings)
        best = [f"{self.best}, with {settings}"] if self.best else []
        return [*best, *self.mattered, *filter(None, [self.early_stopping]), *(f"next: {text}" for text in self.next)]

    def markdown(self) -> str:
        """The whole summary."""
        parts = [f"# {self.title}", self.counts]
        if self.best:
            parts += ["## Best settings", f"{self.best}.", _table(("setting", "value"), self.settings)]
        parts += ["## Which settings mattered", *self.mattered]
        if self.importances:
            words = {"matters": "matters", "unclear": "unclear", "noise": "within the noise"}
            rows = [
                (
                    one.name,
                    f"{100 * one.share:.0f} %",
                    f"{100 * one.low:.0f} to {100 * one.high:.0f} %",
                    f"{100 * one.chance:.0f} %",
                    words[one.verdict],
                )
                for one in self.importances
            ]
            heading = ("setting", "share of the variance", "95 % interval", "if shuffled", "verdict")
            parts += [
                _table(heading, rows),
                "The share is that of the variance between trials which the setting explains alone (fANOVA). The "
                "intervals are from bootstrap samples of the trials. A setting matters if its interval is above what "
                "the same setting gets when its values are shuffled among the trials.",
            ]
        if self.early_stopping:
            parts += ["## Early stopping", self.early_stopping]
        if self.front:
            parts += ["## Best trade-offs", _table(self.front[0], self.front[1:])]
        if self.next:
            parts += ["## What to try next", "\n".join(f"- {text}" for text in self.next)]
        if self.not_run:
            parts += ["## Trials without a result", _table(("trial", "status", "settings", "cause"), self.not_run)]
        return "\n\n".join(parts) + "\n"


def summarise(
    records: Sequence[TrialRecord],
    sweep: SweepConfig,
    axes: Sequence[SettingAxis],
    found: Sequence[Importance],
    total_steps: Callable[[TrialRecord], int],
    is_valid: Callable[[dict[str, Any]], bool],
) -> Summary:
    """Sum up a sweep.

    Args:
        records: of all trials.
        sweep: the sweep.
        axes: the searched settings.
        found: their importances; empty if there were too few trials.
        total_steps: steps of a trial in full.
        is_valid: whether values are settings that a trial could have.
    """
    compared = comparable(records, sweep)
    best = best_trial(records, sweep)
    counts = Counter(record.status for record in records)
    kinds = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    wanted = "small" if sweep.minimizes else "large"
    return Summary(
        title=f"Sweep {sweep.name}",
        counts=f"{len(records)} trials: {kinds}. Objective: {sweep.objective} ({wanted} is better).",
        best="" if best is None else f"Trial {best.trial} is the best: {sweep.objective} {value_text(best.objective)}",
        settings=[] if best is None else [(name, _cell(value_text(value))) for name, value in best.values.items()],
        mattered=_mattered(found, compared),
        importances=found,
        early_stopping=_early_stopping(records, sweep, total_steps),
        next=_next(records, sweep, axes, found, compared, is_valid),
        front=_front(records, sweep),
        not_run=[
            (record.trial, record.status, _cell(_settings(record.values)), _cell(record.cause))
            for record in records
            if record.status in ("failed", PRUNED)
        ],
    )


def _mattered(found: Sequence[Importance], compared: Comparison) -> list[str]:
    count = len(compared.trials)
    if not found:
        if count < FEWEST_TRIALS:
            return [f"{count} trials are too few to tell which settings mattered; {FEWEST_TRIALS} are the least."]
        return ["All trials have the same objective."]
    when = "" if compared.step is None else f" at step {compared.step:,}, which all of them reached"
    texts = [f"{count} trials were compared{when}."]
    for verdict, words in (
        ("matters", "Mattered"),
        ("unclear", "Unclear, because the interval reaches into the noise"),
        ("noise", "Not distinguishable from noise"),
    ):
        names = [f"{one.name} ({100 * one.share:.0f} %)" for one in found if one.verdict == verdict]
        if names:
            texts.append(f"{words}: {', '.join(names)}.")
    return texts


def _early_stopping(
    records: Sequence[TrialRecord], sweep: SweepConfig, total_steps: Callable[[TrialRecord], int]
) -> str:
    """How much early stopping saved, or what it would have saved; empty if that is unknown."""
    if sweep.early_stopping != "none" or any(record.status == STOPPED for record in records):
        trained = [record for record in records if record.status in (FINISHED, STOPPED)]
        steps, full = sum(record.step for record in trained), sum(map(total_steps, trained))
        if not full:
            return ""
        return f"Early stopping ran {steps:,} of the {full:,} steps of all trials in full ({100 * steps / full:.0f} %)."
    known = full_curves(records)
    if known is None or sweep.against:
        return ""
    curves, total = known
    replay = replay_asha(curves, sweep, total)
    best = best_trial(records, sweep)
    assert best is not None
    result = "found the same best trial" if replay.best == best.trial else f"found trial {replay.best} as the best"
    return (
        f"With early_stopping: asha, these trials would have run {replay.steps:,} of their {replay.full_steps:,} steps "
        f"({100 * replay.steps / replay.full_steps:.0f} %) and {result}."
    )


def _next(
    records: Sequence[TrialRecord],
    sweep: SweepConfig,
    axes: Sequence[SettingAxis],
    found: Sequence[Importance],
    compared: Comparison,
    is_valid: Callable[[dict[str, Any]], bool],
) -> list[str]:
    best, advice = best_trial(records, sweep), []
    verdicts = {one.name: one.verdict for one in found}
    count, wanted = len(compared.trials), _PER_SETTING * len(axes)
    if best is not None:
        for axis in axes:
            # Of a few choices, one at the end is often the best by chance; of a range, a value near the end seldom is.
            has_effect = verdicts.get(axis.name, "noise") != "noise"
            if has_effect or (axis.choices is None and count < wanted):
                advice += _wider(axis, sweep.search[axis.name], best, is_valid)
    fixed = [name for name, verdict in verdicts.items() if verdict == "noise"]
    unclear = [name for name, verdict in verdicts.items() if verdict == "unclear"]
    if count < wanted and (fixed or unclear or not verdicts):
        advice.append(
            f"run more trials, such as --trials {wanted}: {count} for {len(axes)} searched settings leave the "
            "intervals wide"
        )
    elif unclear:
        advice.append(
            f"repeat the trials with other seeds, by seed: {{choice: [0, 1, 2]}} in `search`: the effect of "
            f"{' and '.join(unclear)} is not much larger than the noise"
        )
    if fixed and len(fixed) < len(verdicts) and count >= wanted:
        advice.append(f"fix {' and '.join(fixed)}, and spend the trials on the other settings")
    return advice


def _wider(
    axis: SettingAxis, space: SearchSpace, best: TrialRecord, is_valid: Callable[[dict[str, Any]], bool]
) -> list[str]:
    """Advice to widen a range, if the best value is at its edge and the wider one is valid."""
    value = best.values[axis.name]
    if not axis.is_ordered or axis.high == axis.low:
        return []
    share = (axis.place(value) - axis.low) / (axis.high - axis.low)
    if share < 1 - _EDGE and share > _EDGE:
        return []
    is_upper = share >= 1 - _EDGE
    beyond = _beyond(axis, space, is_upper)
    if beyond is None or not is_valid({**best.values, axis.name: beyond}):
        return []
    end, direction = ("upper", "up to") if is_upper else ("lower", "down to")
    return [
        f"search {axis.name} {direction} {value_text(beyond)}: the best value, {value_text(value)}, is at the {end} "
        "end of what was searched"
    ]


def _beyond(axis: SettingAxis, space: SearchSpace, is_upper: bool) -> Any:
    """A value beyond the end of an axis: as far as the last step between choices, or a third of the range."""
    if axis.choices is not None:
        if len(axis.choices) < 2:
            return None
        last, before = (axis.choices[-1], axis.choices[-2]) if is_upper else (axis.choices[0], axis.choices[1])
        grows = min(last, before) > 0 and max(last, before) / min(last, before) >= 1.5
        value = last * last / before if grows else last + (last - before)
        return int(value) if isinstance(last, int) and value == int(value) else value
    reach = (axis.high - axis.low) / 3
    place = axis.high + reach if is_upper else axis.low - reach
    value = float(f"{10**place if axis.is_log else place:.2g}")
    return round(place) if space.integers else value


def _front(records: Sequence[TrialRecord], sweep: SweepConfig) -> list[tuple[str, ...]]:
    chosen, names = front(records, sweep), list(sweep.directions)
    if not chosen:
        return []
    rows = [
        (record.trial, *(value_text(record.objectives[name]) for name in names), _cell(_settings(record.values)))
        for record in chosen[:_FRONT_ROWS]
    ]
    return [("trial", *names, "settings"), *rows]


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value_text(value)}" for name, value in values.items())


def _cell(text: str) -> str:
    """A text from outside as the cell of a table: in one line, without secrets, markup and control characters."""
    plain = visible(redact(" ".join(text.split())))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in plain)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
