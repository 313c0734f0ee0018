"""What a sweep tries: combinations, samplers, objectives, ends, early stopping, warm starts, shares of the cluster."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from crate_ray.config import CrateMAEConfig, PretrainConfig, S3Config, ScalingConfig, SweepConfig, ViTMAEConfig
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.training_memory import least_training_bytes
from crate_ray.ray_cluster import Node, worker_resources, workers_that_fit
from crate_ray.runs.metrics import GPU_MEMORY_BYTES, IMAGES_PER_SECOND, MEMORY_BYTES, VALIDATION_LOSS
from crate_ray.storage.interface import open_storage
from crate_ray.sweeps.combinations import ShuffledGrid, grid_size, key
from crate_ray.sweeps.early_stopping import early_stopping
from crate_ray.sweeps.ends import RecordEnds
from crate_ray.sweeps.objectives import Followed, num_parameters
from crate_ray.sweeps.placement import Cluster, trial_scaling, why_too_large
from crate_ray.sweeps.run import open_sweep
from crate_ray.sweeps.search import TrialSearch
from crate_ray.sweeps.space import reference_config, shared_values, trial_config, why_invalid
from crate_ray.sweeps.trial import TrialRecord, _Record, _Reporter, read_record, read_records, write_record
from crate_ray.sweeps.warm_start import RECORD_FILE, warm_start

BASE: dict[str, Any] = {
    "model": {"image_size": 8, "patch_size": 2, "dim": 64, "depth": 2, "num_subspaces": 4},
    "data": {"train": "somewhere", "validation": "elsewhere"},
    "training": {"steps": 10, "validate_every": 2},
}
LR: dict[str, Any] = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
PAIRS: dict[str, Any] = {"model.dim": {"choice": [64, 72]}, "model.num_subspaces": {"choice": [4, 9]}}
PROBE = {"train": "labelled", "test": "labelled"}


def sweep(tmp_path: Path, search: dict[str, Any], **settings: Any) -> SweepConfig:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(settings.pop("base", BASE)))
    return SweepConfig.model_validate({"base": str(base), "search": search, **settings})


class Told:
    """A sweep that is run without training: asks the search for trials, and tells it their objectives."""

    def __init__(self, config: SweepConfig, earlier: list[TrialRecord] | None = None, **options: Any) -> None:
        self.records, self.pruned = list(earlier or []), []  # type: ignore[var-annotated]
        self.config, self.search = config, TrialSearch(config, self.records, pruned=self.pruned.append, **options)

    def run(self, trials: int, objective: Any) -> Told:
        for _ in range(trials):
            trial = f"t{len(self.records) + len(self.pruned)}"
            found = self.search.suggest(trial)
            if found == Searcher.FINISHED:
                break
            assert isinstance(found, dict)
            names = list(self.config.directions)
            values = objective(found["values"])
            values = dict(zip(names, values if isinstance(values, tuple) else (values,), strict=True))
            self.search.on_trial_complete(
                trial, {"objective": values[names[0]], "step": 9, **{f"objectives/{n}": v for n, v in values.items()}}
            )
            self.records.append(
                TrialRecord(**found, status="finished", objective=values[names[0]], objectives=values, seconds=60)
            )
        return self

    @property
    def values(self) -> list[dict[str, Any]]:
        return [record.values for record in self.records]


# --- Combinations that cannot work ------------------------------------------------------------------------------------


def test_values_that_work_only_together_are_searched(tmp_path: Path) -> None:
    """K 9 does not divide the base's dim 64. It divides 72."""
    config = sweep(tmp_path, PAIRS)
    shared = shared_values(config)
    assert why_invalid(config, shared, {"model.num_subspaces": 9})
    told = Told(config, why_impossible=lambda values: why_invalid(config, shared, values)).run(
        8, lambda v: v["model.dim"]
    )
    worked = {(v["model.dim"], v["model.num_subspaces"]) for v in told.values}
    assert worked == {(64, 4), (72, 4), (72, 9)}
    assert [record.values for record in told.pruned] == [{"model.dim": 64, "model.num_subspaces": 9}]
    assert "dim 64 is not divisible by num_subspaces 9" in told.pruned[0].cause
    assert told.search.ended == "all 4 combinations have been tried"


def test_a_base_that_is_not_valid_alone_is_completed_by_the_search(tmp_path: Path) -> None:
    base = {**BASE, "model": {**BASE["model"], "num_subspaces": 7}}
    config = sweep(tmp_path, {"model.num_subspaces": {"choice": [3, 8]}}, base=base)
    with pytest.raises(UserError, match="value 3: model: dim 64 is not divisible by num_subspaces 3"):
        shared_values(config)
    config = sweep(tmp_path, {"model.num_subspaces": {"choice": [8, 16]}}, base=base)
    assert reference_config(config, shared_values(config)).model.num_subspaces == 8  # type: ignore[union-attr]


def test_a_sweep_without_any_combination_that_works_is_refused(tmp_path: Path) -> None:
    search = {"model.dim": {"choice": [60, 68]}, "model.num_subspaces": {"choice": [7, 9]}}
    with pytest.raises(UserError, match="is not divisible by num_subspaces"):
        shared_values(sweep(tmp_path, search))


def test_combinations_that_cannot_work_use_up_no_trial_and_are_not_tried_again(tmp_path: Path) -> None:
    search = {**LR, "model.num_subspaces": {"choice": [2, 4, 8]}}
    config = sweep(tmp_path, search, trials=20)

    def why_impossible(values: dict[str, Any]) -> str:
        return "too large" if values["model.num_subspaces"] == 8 else ""

    told = Told(config, why_impossible=why_impossible).run(20, lambda v: v["optim.lr"])
    assert len(told.records) == 20
    assert {v["model.num_subspaces"] for v in told.values} == {2, 4}
    numbers = sorted(record.number for record in [*told.records, *told.pruned])
    assert numbers == list(range(1, len(numbers) + 1))
    again = Told(config, [*told.records, *told.pruned], why_impossible=why_impossible).run(5, lambda v: v["optim.lr"])
    tried = [key(values) for values in [*again.values, *(record.values for record in again.pruned)]]
    assert len(set(tried)) == len(tried)


def test_a_sweep_that_finds_nothing_that_works_ends_with_the_cause(tmp_path: Path) -> None:
    config = sweep(tmp_path, LR)
    with pytest.raises(UserError, match="combinations in a row cannot work; narrow `search`: too large"):
        Told(config, why_impossible=lambda values: "too large").run(1, lambda v: 0.0)


# --- Samplers ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 9))
def test_a_grid_holds_every_combination_once(sizes: list[int], seed: int) -> None:
    search: Any = {f"s{i}": {"choice": list(range(size))} for i, size in enumerate(sizes)}
    search["n"] = {"integers": [3, 5]}
    config = SweepConfig.model_validate({"base": "x", "search": search, "seed": seed})
    grid, points = ShuffledGrid(config), []
    while (point := grid.next()) is not None:
        points.append(tuple(point[name] for name in search))
    assert sorted(points) == sorted(itertools.product(*map(range, sizes), range(3, 6)))
    assert grid_size(config) == len(points)


def test_a_grid_is_tried_completely_also_when_it_is_interrupted(tmp_path: Path) -> None:
    search = {"model.num_subspaces": {"choice": [2, 4, 8]}, "model.depth": {"integers": [1, 3]}}
    config = sweep(tmp_path, search, sampler="grid")
    first = Told(config).run(4, lambda v: 1.0)
    second = Told(config, first.records).run(99, lambda v: 1.0)
    assert len({key(values) for values in second.values}) == len(second.values) == 9
    assert second.search.ended == "all 9 combinations have been tried"


def test_a_grid_of_a_range_of_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sampler 'grid' needs a choice or integers for each setting, not optim.lr"):
        sweep(tmp_path, LR, sampler="grid")


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_combination_is_tried_twice(tmp_path: Path, sampler: str) -> None:
    """Trials of a seed are equal bit by bit, so a second one would tell nothing."""
    search = {"model.num_subspaces": {"choice": [2, 4]}, "model.depth": {"integers": [1, 4]}}
    told = Told(sweep(tmp_path, search, sampler=sampler)).run(99, lambda v: v["model.depth"])
    assert len({key(values) for values in told.values}) == len(told.values) == 8


def test_tpe_finds_better_settings_than_random_sampling(tmp_path: Path) -> None:
    """An objective whose optimum is known, in five settings, with 30 trials; the median over seeds."""
    search: dict[str, Any] = {f"optim.x{i}": {"uniform": [-1, 1]} for i in range(4)}
    search["model.num_subspaces"] = {"choice": [2, 4, 8]}

    def objective(values: dict[str, Any]) -> float:
        distance = sum((values[f"optim.x{i}"] - 0.3) ** 2 for i in range(4))
        return distance + 0.3 * (values["model.num_subspaces"] != 4)

    best: dict[str, list[float]] = {
        sampler: sorted(
            min(record.objective or 0.0 for record in told.records)
            for seed in range(6)
            for told in [Told(sweep(tmp_path, search, sampler=sampler, seed=seed)).run(30, objective)]
        )
        for sampler in ("tpe", "random")
    }
    assert best["tpe"][3] < 0.6 * best["random"][3]


def test_two_objectives_lead_to_trade_offs(tmp_path: Path) -> None:
    """With a loss of 1 / depth against depth, every depth is a trade-off. With one objective, the deepest is best."""
    search = {"model.depth": {"integers": [1, 64]}, **LR}
    config = sweep(tmp_path, search, against="parameters")
    told = Told(config).run(40, lambda v: (1 / v["model.depth"] + abs(math.log10(v["optim.lr"]) + 3), v["model.depth"]))
    again = Told(config, told.records).run(30, lambda v: (1.0, 1.0))
    assert {record.trial for record in again.records} >= {record.trial for record in told.records}
    near = [abs(math.log10(values["optim.lr"]) + 3) for values in again.values[40:]]
    assert sorted(near)[15] < 0.35  # uniformly distributed: 0.5
    depths = [values["model.depth"] for values in again.values[40:]]
    assert min(depths) < 16 and max(depths) > 24


def test_directions_of_objectives(tmp_path: Path) -> None:
    config = sweep(tmp_path, LR, objective="knn_accuracy", probe=PROBE, against="memory")
    assert config.directions == {"knn_accuracy": "maximize", "memory": "minimize"}
    assert sweep(tmp_path, LR, against="images_per_second").directions == {
        "validation_loss": "minimize",
        "images_per_second": "maximize",
    }
    with pytest.raises(ValueError, match="look at the first objective alone"):
        sweep(tmp_path, LR, against="memory", early_stopping="asha")
    with pytest.raises(ValueError, match="'knn_accuracy' needs probe.train and probe.test"):
        sweep(tmp_path, LR, objective="knn_accuracy")


def test_side_objectives_come_from_the_run(tmp_path: Path) -> None:
    model = CrateMAEConfig(**BASE["model"])
    followed = Followed()
    followed.add({VALIDATION_LOSS: 0.5})
    assert followed.against(sweep(tmp_path, LR, against="memory"), model) == {}
    for speed, memory in ((1.0, 5.0), (10.0, 7.0), (12.0, 6.0), (11.0, 6.0)):
        followed.add({IMAGES_PER_SECOND: speed, MEMORY_BYTES: memory})
    assert followed.against(sweep(tmp_path, LR, against="memory"), model) == {"memory": 7}
    assert followed.against(sweep(tmp_path, LR, against="images_per_second"), model) == {"images_per_second": 11}
    followed.add({MEMORY_BYTES: 6.0, GPU_MEMORY_BYTES: 9.0})
    assert followed.against(sweep(tmp_path, LR, against="memory"), model) == {"memory": 9}
    parameters = sum(p.numel() for p in build_model(model).parameters() if p.requires_grad)
    assert followed.against(sweep(tmp_path, LR, against="parameters"), model) == {"parameters": parameters}
    assert num_parameters(model) == parameters


# --- What cannot be compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "search",
    [
        {"model.mask_ratio": {"uniform": [0.3, 0.7]}},
        {"model.norm_pix_loss": {"choice": [True, False]}},
        {"model.patch_size": {"choice": [2, 4]}},
        {"model.image_size": {"choice": [8, 16]}},
        {"data.validation": {"choice": ["a", "b"]}},
        {"data.train": {"choice": ["a", "b"]}},
        {"data.mean": {"choice": [[0.4], [0.5]]}},
    ],
)
def test_losses_that_cannot_be_compared_are_refused(tmp_path: Path, search: dict[str, Any]) -> None:
    (name,) = search
    with pytest.raises(UserError, match=rf"different {name}.* not comparable; search with objective probe_accuracy"):
        shared_values(sweep(tmp_path, search))
    shared_values(sweep(tmp_path, search, objective="probe_accuracy", probe=PROBE))


def test_losses_that_can_be_compared_are_not_refused(tmp_path: Path) -> None:
    shared_values(sweep(tmp_path, {"model.mask_ratio": {"choice": [0.5]}, "seed": {"integers": [0, 3]}}))
    fixed = {"data.mean": [0.4], "data.std": [0.2]}
    shared_values(sweep(tmp_path, {"data.train": {"choice": ["a", "b"]}}, settings=fixed))


# --- Ends -------------------------------------------------------------------------------------------------------------


def test_patience_ends_a_sweep_that_does_not_improve(tmp_path: Path) -> None:
    config = sweep(tmp_path, LR, patience=3)
    objectives = [0.9, 0.8, 0.85, 0.7, 0.7, 0.71, 0.72, 0.1]
    told = Told(config).run(99, lambda v: objectives.pop(0))
    assert [record.objective for record in told.records] == [0.9, 0.8, 0.85, 0.7, 0.7, 0.71, 0.72]
    assert told.search.ended == "the last 3 trials have not improved the best validation_loss"
    again = Told(config, list(reversed(told.records))).run(1, lambda v: 0.1)  # the order of the records' files
    assert len(again.records) == 7
    assert len(Told(sweep(tmp_path, LR, patience=9), told.records).run(1, lambda v: 0.1).records) == 8


def test_a_small_improvement_is_none_with_min_delta(tmp_path: Path) -> None:
    objectives = [0.5, 0.49, 0.48, 0.47]
    told = Told(sweep(tmp_path, LR, patience=2, min_delta=0.05)).run(99, lambda v: objectives.pop(0))
    assert len(told.records) == 3
    assert told.search.ended == "the last 2 trials have not improved the best validation_loss by more than 0.05"


def test_hours_count_over_all_starts(tmp_path: Path) -> None:
    records = [
        TrialRecord(trial=f"t{i}", values={"optim.lr": i * 1e-4}, status="failed", seconds=600) for i in range(1, 4)
    ]
    for hours, concurrent, over in ((0.49, 1, True), (0.51, 1, False), (0.26, 2, False), (0.24, 2, True)):
        told = Told(sweep(tmp_path, LR, hours=hours, max_concurrent=concurrent), records).run(1, lambda v: 1.0)
        assert (told.search.ended == f"{hours:g} hours have passed") is over
        assert (len(told.records) == 3) is over


def test_the_number_of_trials_follows_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crate_ray.sweeps.run.open_run", lambda config: SimpleNamespace(config=config))
    search = {"model.num_subspaces": {"choice": [2, 4]}, "model.depth": {"integers": [1, 5]}}

    def trials(search: dict[str, Any] = LR, **settings: Any) -> int:
        return open_sweep(sweep(tmp_path, search, storage=str(tmp_path), **settings))[0].trials

    assert [trials(), trials(hours=2.0), trials(hours=2.0, trials=3)] == [8, 1000, 3]
    grid = [trials(search), trials(search, sampler="grid"), trials(search, sampler="grid", trials=3)]
    assert [*grid, trials(search, hours=2.0)] == [8, 10, 3, 10]


# --- Early stopping ---------------------------------------------------------------------------------------------------


def test_grace_steps_alone_mean_asha(tmp_path: Path) -> None:
    assert sweep(tmp_path, LR, grace_steps=5).early_stopping == "asha"
    assert sweep(tmp_path, LR).early_stopping == "none"
    assert sweep(tmp_path, LR, grace_steps=5, early_stopping="median").early_stopping == "median"
    assert sweep(tmp_path, LR, grace_steps=5, early_stopping="none").early_stopping == "none"


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_continued_rule_decides_as_one_that_was_not_interrupted(tmp_path: Path, rule: str) -> None:
    """Six trials with random losses. The last is interrupted after its first report, and has a new id in Ray Tune."""
    config = sweep(tmp_path, LR, early_stopping=rule, grace_steps=2)
    draw, stopped = random.Random(1), 0
    for _ in range(200):
        losses = [{step: draw.random() + 4 / step for step in (2, 4, 8)} for _ in range(6)]
        whole, known = early_stopping(config, 16, []), []
        for i, one in enumerate(losses):
            decisions = decide(whole, f"id{i}", f"t{i}", one)
            reported = dict(list(one.items())[: len(decisions)])
            known.append(TrialRecord(trial=f"t{i}", number=i + 1, values={}, losses=reported))
        if len(decisions) == 1:
            continue  # the last one was stopped at its first report
        interrupted = known[5].model_copy(update={"losses": {2: losses[5][2]}})
        continued = early_stopping(config, 16, [*known[:5], interrupted])
        assert decide(continued, "another id", "t5", {4: losses[5][4], 8: losses[5][8]}) == decisions[1:]
        stopped += "STOP" in decisions
    assert stopped > 3


def decide(scheduler: Any, tune_id: str, trial: str, losses: dict[int, float]) -> list[str]:
    """Report a trial's losses until it is stopped; the decisions."""
    one: Any = SimpleNamespace(trial_id=tune_id, config={"trial": trial})
    scheduler.on_trial_add(None, one)
    decisions: list[str] = []
    for step, loss in losses.items():
        decisions.append(scheduler.on_trial_result(None, one, {"step": step, "objective": loss}))
        if decisions[-1] == "STOP":
            break
    return decisions


def test_early_stopping_knows_which_accuracy_is_better(tmp_path: Path) -> None:
    for rule in ("asha", "median"):
        config = sweep(tmp_path, LR, early_stopping=rule, grace_steps=2, objective="knn_accuracy", probe=PROBE)
        records = [TrialRecord(trial=f"t{i}", number=i, values={}, losses={2: 0.1 * i}) for i in range(1, 6)]
        for accuracy, expected in ((0.05, "STOP"), (0.9, "CONTINUE")):
            assert decide(early_stopping(config, 8, records), "x", "x", {2: accuracy}) == [expected]


def test_trials_end_where_their_record_says(tmp_path: Path) -> None:
    folder = open_storage(str(tmp_path), S3Config())
    ends = RecordEnds(folder)
    config = {"trial": "a", "values": {"optim.lr": 0.1}, "number": 3}

    def trial(error: str | None = None) -> Any:
        return SimpleNamespace(config=config, get_error=lambda: error)

    ends.on_trial_error(1, [], trial("Traceback\n  …\nray.exceptions.ActorDiedError: http://me:secret@host died"))
    record = read_record(folder, "a")
    assert record is not None and (record.status, record.number) == ("failed", 3)
    assert record.cause.startswith("ray.exceptions.ActorDiedError") and "secret" not in record.cause
    write_record(folder, TrialRecord(trial="a", values={}, status="running"))
    ends.on_trial_complete(1, [], trial())
    assert [r.status for r in read_records(folder)] == ["stopped early"]
    write_record(folder, TrialRecord(trial="a", values={}, status="finished"))
    ends.on_trial_complete(1, [], trial())
    assert [r.status for r in read_records(folder)] == ["finished"]


def test_a_loss_that_is_not_finite_is_an_error_and_the_record_stays_readable(tmp_path: Path) -> None:
    folder, config = open_storage(str(tmp_path), S3Config()), sweep(tmp_path, LR)
    reporter = _Reporter(config, _Record(folder, TrialRecord(trial="a", values={})), CrateMAEConfig(**BASE["model"]))
    reporter.total_steps = 9
    with pytest.raises(UserError, match="validation_loss is nan at step 3"):
        reporter.metrics(3, {VALIDATION_LOSS: math.nan}, 0)
    assert [record.losses for record in read_records(folder)] == [{}]


def test_the_time_of_a_trial_adds_up_over_its_starts(tmp_path: Path) -> None:
    folder = open_storage(str(tmp_path), S3Config())
    write_record(folder, TrialRecord(trial="a", number=2, values={}, seconds=100))
    record = _Record(folder, TrialRecord(trial="a", number=7, values={}))
    record.update(step=5)
    stored = read_record(folder, "a")
    assert stored is not None and stored.number == 2
    assert 100 < stored.seconds < 130


# --- Warm starts ------------------------------------------------------------------------------------------------------


def test_the_best_trials_of_an_earlier_sweep_are_tried_first(tmp_path: Path) -> None:
    folder = open_storage(str(tmp_path / "old"), S3Config())
    folder.write(RECORD_FILE, json.dumps({"sweep": {"objective": "probe_accuracy"}}).encode())
    for i, (status, lr, accuracy) in enumerate(
        (("finished", 1e-3, 0.5), ("finished", 2e-3, 0.9), ("failed", 3e-3, None), ("finished", 5.0, 0.8))
    ):
        values = {"optim.lr": lr, "model.depth": 3, "seed": 1}
        write_record(folder, TrialRecord(trial=f"t{i}", values=values, status=status, objective=accuracy))
    search = {**LR, "model.depth": {"integers": [1, 4]}}
    config = sweep(tmp_path, search, trials=12, warm_start=str(tmp_path / "old"))
    points = warm_start(config)
    assert points == [{"optim.lr": 2e-3, "model.depth": 3}, {"model.depth": 3}, {"optim.lr": 1e-3, "model.depth": 3}]
    told = Told(config, warm_start=points).run(2, lambda v: 1.0)
    assert told.values[0] == points[0]
    assert told.values[1]["model.depth"] == 3
    again = Told(config, told.records, warm_start=points).run(1, lambda v: 1.0)
    assert again.values[2] == points[2]


def test_settings_of_a_file_are_tried_first(tmp_path: Path) -> None:
    config = sweep(tmp_path, {**LR, "model.num_subspaces": {"choice": [2, 8]}})
    trial = trial_config(config, shared_values(config), {"optim.lr": 4e-3, "model.num_subspaces": 8}, "best")
    file = tmp_path / "best.yaml"
    file.write_text(yaml.safe_dump(trial.model_dump(mode="json")))
    config = config.model_copy(update={"warm_start": str(file)})
    assert warm_start(config) == [{"optim.lr": 4e-3, "model.num_subspaces": 8}]
    file.write_text("optim.lr: 7\n")
    with pytest.raises(UserError, match="has no value of optim.lr, model.num_subspaces within its range"):
        warm_start(config)
    with pytest.raises(UserError, match="is neither the folder of a sweep nor a .yaml file"):
        warm_start(config.model_copy(update={"warm_start": str(tmp_path)}))


# --- Shares of the cluster --------------------------------------------------------------------------------------------

NODES = st.lists(st.builds(Node, st.integers(0, 16), st.integers(0, 4)), min_size=1, max_size=4)


@given(NODES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.sampled_from([None, 1, 2]), st.booleans())
def test_trials_at_the_same_time_fit_together(
    nodes: list[Node], trials: int, fewest: int, more: int, cpus: int | None, elastic: bool
) -> None:
    """However Ray places the workers, those of all trials fit, also if each trial has its largest number."""
    workers: Any = (fewest, fewest + more) if elastic else fewest
    scaling = ScalingConfig(workers=workers, cpus_per_worker=cpus, gpu=False)
    if trials == 1:
        assert trial_scaling(scaling, trials, nodes) == scaling
        return
    if workers_that_fit(nodes, cpus or 1, gpu=False) < trials * fewest:
        with pytest.raises(UserError, match=r"at the same time.*lower max_concurrent"):
            trial_scaling(scaling, trials, nodes)
        return
    share = trial_scaling(scaling, trials, nodes)
    assert cpus is None or share.cpus_per_worker == cpus
    assert scaling.min_workers == share.min_workers <= share.max_workers <= scaling.max_workers
    resources, _ = worker_resources(share, nodes)
    assert workers_that_fit(nodes, int(resources["CPU"]), gpu=False) >= trials * share.max_workers


def test_two_trials_on_two_cpus_take_one_each_and_three_are_refused() -> None:
    assert trial_scaling(ScalingConfig(), 2, [Node(2, 0)]).cpus_per_worker == 1
    with pytest.raises(
        UserError, match="3 trials at the same time: 3 workers need a CPU each.* or lower max_concurrent"
    ):
        trial_scaling(ScalingConfig(), 3, [Node(2, 0)])
    with pytest.raises(UserError, match="2 trials at the same time: 2 workers need a GPU each, the cluster has 1"):
        trial_scaling(ScalingConfig(), 2, [Node(8, 1)])
    share = trial_scaling(ScalingConfig(workers=(1, 8)), 2, [Node(8, 4), Node(8, 2)])
    assert (share.workers, share.gpu) == ((1, 3), True)


def test_a_model_that_cannot_fit_is_refused_and_one_that_fits_is_not(tmp_path: Path) -> None:
    config = sweep(tmp_path, LR)
    shared = shared_values(config)

    def why(values: dict[str, Any], gib: float, trials: int = 1) -> str:
        cluster = Cluster([Node(8, 0)], node_bytes=int(gib * 2**30))
        return why_too_large(trial_config(config, shared, values, "check"), trials, cluster)

    large = {"model.subspace_dim": 100_000, "training.batch_size": 64}
    assert not why({}, 0.5)
    assert "needs at least" in why(large, 1) and "with 64 images at a time" in why(large, 1)
    assert not why(large, 64)
    assert not why({**large, "training.micro_batch_size": 1, "model.depth": 1}, 8)
    assert "its share of a node" in why({"model.subspace_dim": 2000, "training.batch_size": 64}, 0.2, trials=4)
    assert why_too_large(trial_config(config, shared, large, "check"), 1, Cluster([Node(8, 0)])) == ""


_MEASURE = """
import sys, torch
from crate_ray.config import CrateMAEConfig, ViTMAEConfig
from crate_ray.memory import peak_memory, resident_memory
from crate_ray.models import build_model
kind = {"crate_mae": CrateMAEConfig, "vit_mae": ViTMAEConfig}[sys.argv[1]]
config = kind.model_validate_json(sys.argv[2])
torch.set_num_threads(1)
model = build_model(config)
images, noise = torch.randn(16, 3, 128, 128), torch.rand(16, config.num_patches)
def step(count):
    with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[3] == "bf16"):
        model(images[:count], noise[:count]).sample_loss.mean().backward()
step(1)
before = resident_memory()
step(16)
print(peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (CrateMAEConfig(preset="tiny", image_size=128, depth=3, subspace_dim=512), "fp32"),
        (CrateMAEConfig(preset="tiny", image_size=128, depth=3, subspace_dim=512), "bf16"),
        (ViTMAEConfig(preset="tiny", image_size=128, depth=3, decoder_depth=3), "fp32"),
    ],
)
def test_the_estimate_is_at_most_what_a_step_takes(config: Any, precision: str) -> None:
    command = [sys.executable, "-c", _MEASURE, config.architecture, config.model_dump_json(), precision]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    activations = least_training_bytes(config, 16) - least_training_bytes(config, 1)
    assert activations < measured < 5 * activations


def test_best_settings_of_a_trial_hold_no_share_of_the_cluster(tmp_path: Path) -> None:
    config = sweep(tmp_path, LR, max_concurrent=2)
    trial = trial_config(config, shared_values(config), {"optim.lr": 1e-3}, "x")
    assert isinstance(trial, PretrainConfig) and trial.scaling == ScalingConfig()
