"""Reports of a sweep, on records whose truth is known: importances, summary, figures, display, files."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from crate_ray.cli import parse_config
from crate_ray.config import PrepareConfig, PretrainConfig, S3Config, SweepConfig, TrackingConfig
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.storage.interface import open_storage
from crate_ray.sweeps import figures
from crate_ray.sweeps.axes import setting_axes
from crate_ray.sweeps.best import best_yaml
from crate_ray.sweeps.display import SweepDisplay
from crate_ray.sweeps.importance import Importance, importances
from crate_ray.sweeps.report import SweepReport, results_table
from crate_ray.sweeps.results import best_trial, comparable, front, latest, without_outliers
from crate_ray.sweeps.run import open_sweep
from crate_ray.sweeps.savings import full_curves, replay_asha
from crate_ray.sweeps.space import shared_values, why_invalid
from crate_ray.sweeps.summary import Summary, summarise
from crate_ray.sweeps.trial import RecordReader, TrialRecord, read_records, write_record
from crate_ray.tracking.run_tracker import RunTracker

STEPS = 120
SEARCH: dict[str, Any] = {
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "model.num_subspaces": {"choice": [2, 4, 8]},
    "model.sparsity_lambda": {"uniform": [0.0, 0.6]},
    "model.subspace_dim": {"choice": [16, 32, 64]},
}


def sweep(base: str = "base.yaml", **changes: Any) -> SweepConfig:
    return SweepConfig.model_validate({"base": base, "search": SEARCH, "trials": 60, **changes})


def records(count: int, effect: Callable[[dict[str, Any]], float], noise: float = 0.01) -> list[TrialRecord]:
    """Finished trials with random settings, and an effect of these plus noise as the objective."""
    random = np.random.default_rng(3)
    out = []
    for number in range(1, count + 1):
        values = {
            "optim.lr": float(10 ** random.uniform(-4, -2)),
            "model.num_subspaces": int(random.choice([2, 4, 8])),
            "model.sparsity_lambda": float(random.uniform(0, 0.6)),
            "model.subspace_dim": int(random.choice([16, 32, 64])),
        }
        value = 0.5 + effect(values) + float(random.normal(0, noise))
        losses = {step: value + 0.5 * (STEPS - step) / step for step in (15, 30, 60, 90)}
        parameters = 1000 * values["model.num_subspaces"] * values["model.subspace_dim"]
        objectives = {"validation_loss": value, "parameters": parameters}
        record = TrialRecord(trial=f"t-{number:03}", number=number, values=values, status="finished", objective=value)
        out.append(
            record.model_copy(update={"step": STEPS, "losses": losses, "objectives": objectives, "seconds": 9.0})
        )
    return out


def two_settings(values: dict[str, Any]) -> float:
    """Depends on the learning rate, best at its upper end, and on the number of subspaces, best in the middle."""
    return 0.05 * (np.log10(values["optim.lr"]) + 2) ** 2 + (0.0 if values["model.num_subspaces"] == 4 else 0.1)


_computed: dict[str, dict[str, Importance]] = {}


def importances_of(config: SweepConfig, of: list[TrialRecord]) -> dict[str, Importance]:
    """By name; computed once for the same records."""
    key = repr((config, of))
    if key not in _computed:
        compared = comparable(of, config)
        values = without_outliers(compared.values, config)
        found = importances(setting_axes(config, of), [t.values for t in compared.trials], values)
        _computed[key] = {one.name: one for one in found}
    return _computed[key]


def stop(record: TrialRecord, step: int) -> TrialRecord:
    losses = {at: loss for at, loss in record.losses.items() if at <= step}
    return record.model_copy(update={"status": "stopped early", "step": step, "losses": losses,
                                     "objective": losses[step], "objectives": {}})  # fmt: skip


def summary_of(
    config: SweepConfig, of: list[TrialRecord], found: Collection[Importance] = (), valid: bool = True
) -> Summary:
    return summarise(of, config, setting_axes(config, of), list(found), lambda record: STEPS, lambda values: valid)


def test_importances_find_the_two_settings_that_matter_and_no_other() -> None:
    found = importances_of(sweep(), records(60, two_settings))
    verdicts = {name: one.verdict for name, one in found.items()}
    assert verdicts == {
        "optim.lr": "matters", "model.num_subspaces": "matters",
        "model.sparsity_lambda": "noise", "model.subspace_dim": "noise",
    }  # fmt: skip
    for name in ("model.sparsity_lambda", "model.subspace_dim"):
        assert found[name].low <= found[name].chance <= found[name].high
    for one in found.values():
        assert 0 <= one.low <= one.share <= one.high <= 1


def test_importances_of_pure_noise_find_nothing() -> None:
    found = importances_of(sweep(), records(24, lambda values: 0.0))
    assert {one.verdict for one in found.values()} <= {"noise", "unclear"}


def test_a_logarithmic_range_is_weighed_by_its_logarithm() -> None:
    """Both settings split their trials in halves. Of the learning rate's range itself, the lower half is a tenth."""

    def effect(values: dict[str, Any]) -> float:
        return 0.2 * (values["optim.lr"] < 1e-3) + 0.2 * (values["model.sparsity_lambda"] < 0.3)

    found = importances_of(sweep(), records(40, effect))
    assert 0.6 < found["optim.lr"].share / found["model.sparsity_lambda"].share < 1.6


def test_few_trials_have_no_importances() -> None:
    assert importances_of(sweep(), records(5, two_settings)) == {}
    assert "5 trials are too few" in " ".join(summary_of(sweep(), records(5, two_settings)).mattered)


def test_a_diverged_trial_does_not_hide_the_others() -> None:
    of = records(60, two_settings)
    of[3] = of[3].model_copy(update={"objective": 1e6})
    values = without_outliers(comparable(of, sweep()).values, sweep())
    assert np.var(np.delete(values, 3)) > 0.5 * np.var(values)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1), st.booleans())
def test_bounding_outliers_keeps_the_better_half(values: list[float], minimize: bool) -> None:
    config = sweep() if minimize else sweep().model_copy(update={"objective": "probe_accuracy"})
    bounded, sign, middle = without_outliers(values, config), 1 if minimize else -1, float(np.median(values))
    for value, kept in zip(values, bounded, strict=True):
        assert sign * kept <= sign * value
        if sign * value <= sign * middle:
            assert kept == value


def test_trials_that_were_stopped_are_compared_where_all_of_them_were_measured() -> None:
    of = records(6, two_settings)
    of[1], of[4] = stop(of[1], 60), stop(of[4], 30)
    compared = comparable(of, sweep())
    assert compared.step == 30
    assert sorted(compared.values) == sorted(record.losses[30] for record in of)
    of[2] = of[2].model_copy(update={"status": "failed"})
    assert len(comparable(of, sweep()).trials) == 5
    assert comparable(records(6, two_settings), sweep()).step is None


points = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(points, min_size=1, max_size=12), st.sampled_from(["parameters", "images_per_second"]))
@settings(max_examples=40, deadline=None)
def test_the_front_is_what_no_other_trial_beats(pairs: list[tuple[int, int]], against: str) -> None:
    config, sign = sweep(against=against), -1 if against == "images_per_second" else 1
    of = [
        TrialRecord(trial=f"t{i}", values={}, status="finished", objective=loss, step=1,
                    objectives={"validation_loss": loss, against: other})
        for i, (loss, other) in enumerate(pairs)
    ]  # fmt: skip

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and sign * a[1] <= sign * b[1]

    expected = {f"t{i}" for i, pair in enumerate(pairs) if not any(beats(other, pair) for other in pairs)}
    assert {record.trial for record in front(of, config)} == expected


def test_only_finished_trials_can_be_best() -> None:
    of = records(4, two_settings)
    of[0] = of[0].model_copy(update={"objective": 0.0, "status": "stopped early"})
    of[1] = of[1].model_copy(update={"objective": None, "status": "failed", "cause": "out of memory"})
    best = best_trial(of, sweep())
    assert best is not None
    assert best.objective == min(record.objective or 0 for record in of[2:])
    largest = best_trial(of, sweep().model_copy(update={"objective": "probe_accuracy"}))
    assert largest is not None
    assert largest.trial in ("t-003", "t-004") and largest.trial != best.trial
    assert best_trial(of[:2], sweep()) is None
    table = results_table(of, sweep())
    assert table["trial"].tolist()[0] == "t-001" and table["trial"].tolist()[-1] == "t-002"
    assert table["cause"].tolist()[-1] == "out of memory"


def asha_by_hand(curves: dict[str, dict[int, float]], total: int, grace: int, factor: int) -> tuple[int, set[str]]:
    """ASHA as in its paper, one trial after the other: at each rung a trial goes on if it is in the best 1/factor."""
    rungs = list(itertools.takewhile(lambda rung: rung < total, (grace * factor**i for i in range(20))))
    seen: dict[int, list[float]] = {rung: [] for rung in rungs}
    steps, complete = 0, set()
    for name, points in curves.items():
        for step, loss in sorted(points.items()):
            stopped = False
            for rung in (rung for rung in rungs if rung == step):
                # Ray Tune compares with the quantile of the trials before this one.
                stopped = bool(seen[rung]) and loss > np.nanpercentile(seen[rung], 100 / factor)
                seen[rung].append(loss)
            if stopped or step == total:
                steps += step
                complete |= {name} if step == total and not stopped else set()
                break
    return steps, complete


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4]), st.integers(2, 16))
@settings(max_examples=30, deadline=None)
def test_the_replay_of_asha_equals_one_by_hand(seed: int, factor: int, count: int) -> None:
    random = np.random.default_rng(seed)
    curves = {f"t{i}": {step: float(random.normal()) for step in range(1, 17)} for i in range(count)}
    steps, complete = asha_by_hand(curves, 16, 1, factor)
    replay = replay_asha(curves, sweep(), 16, grace_steps=1, reduction_factor=factor)
    assert (replay.steps, replay.full_steps) == (steps, 16 * count)
    assert replay.best == min(complete, key=lambda name: curves[name][16])


def test_asha_saves_half_of_a_grid_and_finds_its_best() -> None:
    """Curves that do not cross, so that the best trial is in front at each rung."""
    of = records(24, two_settings)
    known = full_curves(of)
    assert known is not None
    best = best_trial(of, sweep())
    assert best is not None
    for concurrent in (1, 4):
        config = sweep(max_concurrent=concurrent)
        replay = replay_asha(known[0], config, known[1], grace_steps=15, reduction_factor=4)
        assert replay.best == best.trial
        assert replay.steps <= replay.full_steps / 2


def test_the_summary_says_what_was_found() -> None:
    good = records(60, two_settings)
    of = [*good,
          TrialRecord(trial="bad", values={"optim.lr": 1e-2}, status="failed", cause="loss | is\n`nan`"),
          TrialRecord(trial="never", values={"optim.lr": 1e-3}, status="pruned", cause="too large")]  # fmt: skip
    found = importances_of(sweep(), good).values()
    summary = summary_of(sweep(), of, found)
    text = summary.markdown()
    assert "62 trials: 60 finished, 1 failed, 1 pruned" in text
    mattered = next(line for line in summary.mattered if line.startswith("Mattered"))
    assert "optim.lr" in mattered and "num_subspaces" in mattered and "lambda" not in mattered
    assert "| bad | failed | optim.lr 0.01 | loss \\| is \\`nan\\` |" in text
    assert "| never | pruned | optim.lr 0.001 | too large |" in text
    advice = " ".join(summary.next)
    assert "search optim.lr up to 0.046: the best value" in advice
    assert "num_subspaces" not in advice.partition("fix ")[0]
    assert "fix model.sparsity_lambda and model.subspace_dim" in advice or (
        "fix model.subspace_dim and model.sparsity_lambda" in advice
    )
    assert "more trials" not in advice
    assert "up to" not in " ".join(summary_of(sweep(), of, found, valid=False).next)
    assert "With early_stopping: asha, these trials would have run" in summary.early_stopping
    assert len(summary.lines()) < 12


def test_the_summary_of_few_trials_asks_for_more() -> None:
    assert "--trials 40" in " ".join(summary_of(sweep(trials=10), records(10, two_settings)).next)


def test_the_summary_counts_the_steps_that_early_stopping_saved() -> None:
    of = records(8, two_settings)
    of[2:6] = [stop(record, 30) for record in of[2:6]]
    summary = summary_of(sweep(), of)
    assert summary.early_stopping == "Early stopping ran 600 of the 960 steps of all trials in full (62 %)."
    assert comparable(of, sweep()).step == 30


def test_the_summary_lists_the_best_trade_offs() -> None:
    config = sweep(against="parameters")
    rows = summary_of(config, records(20, two_settings)).front
    assert rows[0] == ("trial", "validation_loss", "parameters", "settings")
    assert [row[0] for row in rows[1:]] == [record.trial for record in front(records(20, two_settings), config)]


def pixels(png: bytes | None) -> np.ndarray[Any, Any]:
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"))


def test_figures_can_be_read_on_light_and_dark_pages() -> None:
    config = sweep(against="parameters")
    of = records(20, two_settings)
    of[4] = stop(of[4], 60)
    shown, axes = latest(of), setting_axes(config, of)
    found = [
        Importance("optim.lr", 0.6, 0.4, 0.8, 0.02, 0.1),
        Importance("model.num_subspaces", 0.2, 0.01, 0.5, 0.03, 0.1),
        Importance("model.subspace_dim", 0.02, 0.0, 0.1, 0.03, 0.1),
    ]
    made = [figures.slices(shown, axes, config), figures.parallel_coordinates(shown, axes, config),
            figures.importance(found), figures.curves(of, config), figures.trade_offs(of, config)]  # fmt: skip
    for png in made:
        image = pixels(png)
        assert (image[..., 3] == 0).mean() > 0.4, "the background is not transparent"
        ink = image[image[..., 3] == 255][:, :3].astype(float).mean(1)
        assert len(ink) > 1000
        assert np.quantile(ink, 0.02) > 60, "ink that a dark page hides"
        assert (ink > 240).mean() < 0.1, "ink that a light page hides"
    assert figures.trade_offs(of, sweep()) is None
    assert figures.curves([record.model_copy(update={"losses": {}}) for record in of], config) is None


@pytest.mark.parametrize(
    "space",
    [{"choice": ["cosine", "linear"]}, {"choice": [True, False]}, {"choice": [[0.9, 0.95], [0.9, 0.999]]},
     {"choice": [1, 2.5, 16]}, {"integers": [1, 9]}, {"choice": [None, 3]}, {"choice": [5]}],
)  # fmt: skip
def test_all_kinds_of_settings_are_drawn_and_compared(space: dict[str, Any]) -> None:
    config = SweepConfig.model_validate({"base": "b.yaml", "search": {"some.setting": space}, "trials": 8})
    values = space.get("choice") or [2, 5, 7]
    of = [
        TrialRecord(trial=f"t{i}", number=i, values={"some.setting": values[i % len(values)]}, status="finished",
                    objective=0.1 * (i % len(values)) + 0.001 * i, step=5)
        for i in range(12)
    ]  # fmt: skip
    stored = [TrialRecord.model_validate_json(record.model_dump_json()) for record in of]
    shown, axes = latest(stored), setting_axes(config, stored)
    assert [axes[0].place(r.values["some.setting"]) for r in stored] == [
        setting_axes(config, of)[0].place(r.values["some.setting"]) for r in of
    ]
    pixels(figures.slices(shown, axes, config))
    pixels(figures.parallel_coordinates(shown, axes, config))
    summary_of(config, stored).markdown()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def log_lines(clock: Clock, states: list[tuple[float, list[TrialRecord]]], **changes: Any) -> list[str]:
    output = io.StringIO()
    config = sweep(trials=4, **changes)
    with SweepDisplay(config, lambda record: STEPS, clock, Console(file=output, width=200)) as display:
        for at, now in states:
            clock.now = at
            display.update(now)
    return output.getvalue().splitlines()


def test_a_log_has_a_line_for_each_event() -> None:
    full = records(4, two_settings)
    running = [r.model_copy(update={"status": "running", "step": 60, "objective": r.losses[60]}) for r in full]
    started = [r.model_copy(update={"status": "running", "step": 0, "objective": None}) for r in full]
    failed = full[1].model_copy(update={"status": "failed", "cause": "out of memory", "objective": None, "step": 30})
    lines = log_lines(
        Clock(),
        [(0, started[:1]), (60, running[:1]), (61, running[:1]), (120, full[:1]), (130, [full[0], started[1]]),
         (150, [full[0], failed]), (150, [full[0], failed])],
    )  # fmt: skip
    value = f"{full[0].objective:.4g}"
    assert [line.partition(";")[0].partition(":")[0] for line in lines] == [
        "trial t-001 runs", "running", f"trial t-001 finished at step 120/120, validation_loss {value}",
        "trial t-002 runs", "trial t-002 failed at step 30/120",
    ]  # fmt: skip
    assert "optim.lr" in lines[0]
    assert "t-001 60/120" in lines[1] and "0 of 4 trials, about 7 min 00 s left" in lines[1]
    assert lines[2].endswith(f"1 of 4 trials, about 6 min 00 s left; best so far {value} (trial t-001)")
    assert "out of memory; 2 of 4 trials, 1 failed" in lines[4]


def test_a_continued_sweep_counts_only_its_own_time() -> None:
    full = records(4, two_settings)
    lines = log_lines(Clock(), [(0, full[:2]), (60, full[:3])])
    assert len(lines) == 1
    assert "3 of 4 trials, about 1 min 00 s left" in lines[0]


def test_a_terminal_has_a_table_that_fits_into_it() -> None:
    output, many = io.StringIO(), records(60, two_settings)
    many[-1] = many[-1].model_copy(update={"status": "running", "step": 30})
    terminal = Console(file=output, width=140, height=20, force_terminal=True)
    with SweepDisplay(sweep(), lambda record: STEPS, Clock(), terminal) as display:
        display.update(many)
    best = best_trial(many, sweep())
    text = output.getvalue()
    assert best is not None
    assert best.trial in text and "t-060" in text and "30/120" in text and "48 more" in text
    assert f"best so far {best.objective:.4g} (trial {best.trial})" in text
    assert text.count("t-0") <= 2 * 13, "the table is drawn twice, at the update and at the end"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SweepConfig, dict[str, Any]]:
    """A sweep over settings of a small model, whose data is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digits = tmp_path / "digits"
    pack(digits_source("test"), open_storage(str(digits), S3Config()), PrepareConfig(output=str(digits)))
    base = tmp_path / "base.yaml"
    model = {"image_size": 8, "patch_size": 2, "dim": 64, "depth": 2, "num_subspaces": 4, "channels": 1}
    data = {"train": str(digits), "validation": str(digits)}
    base.write_text(yaml.safe_dump({"model": model, "data": data, "training": {"steps": STEPS, "batch_size": 4}}))
    tracking = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "experiment": "reports"}
    config = sweep(str(base), storage=str(tmp_path / "runs"), trials=8, tracking=tracking)
    return config, shared_values(config)


@pytest.mark.slow
def test_reports_are_files_and_artifacts(world: tuple[SweepConfig, dict[str, Any]], tmp_path: Path) -> None:
    config, shared = world
    folder = open_storage(config.storage, S3Config()).under(config.name)
    tracker = RunTracker(config.tracking, "b" * 32, config.name, {}, {})
    report = SweepReport(config, shared, folder, tracker)
    of = records(8, two_settings)
    report.update(of[:3])
    assert len(pd.read_csv(io.BytesIO(folder.read("results.csv")))) == 3
    report.update(of[:4])
    assert len(pd.read_csv(io.BytesIO(folder.read("results.csv")))) == 4
    report.finish(of)
    assert tracker.finish("FINISHED", timeout=60)

    best = best_trial(of, config)
    assert best is not None
    read = parse_config(PretrainConfig, ["--config", f"{folder.uri}/best.yaml"])
    assert (read.optim.lr, read.name) == (best.values["optim.lr"], "sweep-best")
    assert read.model.num_subspaces == best.values["model.num_subspaces"]

    mlflow.set_tracking_uri(config.tracking.uri)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("reports").experiment_id])
    found = {a.path for a in client.list_artifacts(run.info.run_id)}
    found |= {a.path for a in client.list_artifacts(run.info.run_id, "figures")}
    assert found >= {"results.csv", "summary.md", "best.yaml", "figures/slices.png", "figures/importance.png",
                     "figures/parallel-coordinates.png", "figures/learning-curves.png"}  # fmt: skip
    for path in found - {"figures"}:
        local = Path(client.download_artifacts(run.info.run_id, path, str(tmp_path)))
        assert local.read_bytes() == folder.read(path)
    assert run.data.tags["mlflow.note.content"].startswith("# Sweep sweep")
    assert run.data.metrics["best_validation_loss"] == best.objective


def test_best_settings_that_cannot_start_a_run_are_refused(world: tuple[SweepConfig, dict[str, Any]]) -> None:
    """The data was deleted while the sweep ran."""
    config, shared = world
    best = records(1, two_settings)[0]
    best_yaml(config, shared, best)
    (Path(shared["data"]["train"]) / "manifest.json").unlink()
    with pytest.raises(UserError, match="the settings of trial t-001, the best of sweep 'sweep', cannot start a run"):
        best_yaml(config, shared, best)


def test_a_problem_of_the_report_does_not_end_the_sweep(
    world: tuple[SweepConfig, dict[str, Any]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crate_ray.sweeps.report._POLL_SECONDS", 0.01)
    config, shared = world
    folder = open_storage(config.storage, S3Config()).under(config.name)
    tracker = RunTracker(config.tracking, "c" * 32, config.name, {}, {})
    report = SweepReport(config, shared, folder, tracker)
    with report.following():
        folder.write("results/a.json", b"{}")
        for _ in range(500):
            if caplog.records:
                break
            time.sleep(0.01)
    assert "is not up to date" in caplog.text and "results/a.json cannot be read" in caplog.text
    tracker.finish("FINISHED", timeout=60)


def test_what_is_shown_last_is_how_the_sweep_ended(
    world: tuple[SweepConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, shared = world
    folder = open_storage(config.storage, S3Config()).under(config.name)
    tracker = RunTracker(config.tracking, "d" * 32, config.name, {}, {})
    with SweepReport(config, shared, folder, tracker).following():
        write_record(folder, records(1, two_settings)[0].model_copy(update={"status": "stopped early"}))
    assert "t-001 stopped early at step 120/120" in capsys.readouterr().err
    tracker.finish("FINISHED", timeout=60)


def test_trials_track_in_the_sweeps_sqlite_file_wherever_they_run(
    world: tuple[SweepConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune gives each trial a working folder of its own, which is deleted."""
    monkeypatch.chdir(tmp_path)
    given = world[0].model_copy(update={"tracking": TrackingConfig(uri="sqlite:///demo/mlflow.db")})
    assert open_sweep(given)[0].tracking.uri == f"sqlite:///{tmp_path}/demo/mlflow.db"
    server = world[0].model_copy(update={"tracking": TrackingConfig(uri="http://127.0.0.1:5000")})
    assert open_sweep(server)[0].tracking.uri == "http://127.0.0.1:5000"


def test_records_are_read_again_only_when_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    of = records(3, two_settings)
    for record in of:
        write_record(folder, record)
    reader, read = RecordReader(folder), []
    original = type(folder).read_small
    monkeypatch.setattr(type(folder), "read_small", lambda self, key, *a: read.append(key) or original(self, key, *a))
    assert reader.read() == of
    write_record(folder, of[1].model_copy(update={"seconds": 123.0}))
    read.clear()
    assert reader.read()[1].seconds == 123.0
    assert read == ["results/t-002.json"]
    assert reader.read() == read_records(folder)


def test_wider_ranges_are_advised_only_if_they_are_valid(world: tuple[SweepConfig, dict[str, Any]]) -> None:
    """A sparsity below 0 is not; a lower learning rate is."""
    config, shared = world
    for name, advised in (("model.sparsity_lambda", False), ("optim.lr", True)):
        of = sorted(records(60, two_settings), key=lambda record: record.values[name])
        of = [record.model_copy(update={"objective": 0.1 * i}) for i, record in enumerate(of)]
        found, axes = [Importance(name, 0.9, 0.8, 1.0, 0.0, 0.1)], setting_axes(config, of)
        summary = summarise(
            of, config, axes, found, lambda _: STEPS, lambda given: not why_invalid(config, shared, given)
        )
        assert any(f"search {name} down to" in text for text in summary.next) is advised
