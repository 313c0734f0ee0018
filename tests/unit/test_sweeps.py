"""Sweeps before and after Ray Tune: settings validated, defaults that follow, results ordered and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from crate_ray.config import S3Config, SearchSpace, SweepConfig
from crate_ray.errors import UserError
from crate_ray.storage.interface import open_storage
from crate_ray.storage.lease import Lease
from crate_ray.sweeps.early_stopping import early_stopping
from crate_ray.sweeps.run import RECORD_FILE, _key, _run_trials, run_sweep
from crate_ray.sweeps.search import TrialSearch
from crate_ray.sweeps.space import shared_values, trial_config
from crate_ray.sweeps.trial import TrialRecord, read_records, write_record

BASE = {
    "model": {"image_size": 8, "patch_size": 2, "dim": 64, "depth": 2, "num_subspaces": 4},
    "data": {"train": "somewhere", "validation": "elsewhere"},
    "training": {"steps": 10},
}


def sweep(tmp_path: Path, search: dict[str, Any], **settings: Any) -> SweepConfig:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(BASE))
    return SweepConfig.model_validate({"base": str(base), "search": search, **settings})


def test_defaults_follow_the_sampled_values(tmp_path: Path) -> None:
    config = sweep(tmp_path, {"model.num_subspaces": {"choice": [2, 8]}}, settings={"training.steps": 7})
    shared = shared_values(config)
    trial = trial_config(config, shared, {"model.num_subspaces": 8, "model.depth": 3}, "trial-1")
    assert trial.model.subspace_dim == 8
    assert trial.model.decoder_depth == 3
    assert trial.training.steps == 7
    assert trial.storage.endswith("/sweep/trials")


@pytest.mark.slow
def test_a_second_driver_of_a_sweep_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    config = sweep(tmp_path, {"model.num_subspaces": {"choice": [2, 8]}}, storage=str(tmp_path / "runs"))
    folder = open_storage(config.storage, S3Config()).under(config.name)
    with Lease(folder, "sweep.lease", "sweep 'sweep'"), pytest.raises(UserError, match="sweep 'sweep' is in use by"):
        run_sweep(config, shared_values(config))
    assert not folder.exists(RECORD_FILE)


def test_a_sweeps_lease_lasts_as_long_as_that_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep(tmp_path, {"model.num_subspaces": {"choice": [2]}}, storage=str(tmp_path / "runs"))
    config = config.model_copy(update={"settings": {"scaling.lease_seconds": 7}})
    leases: list[bytes] = []

    def read_lease(sweep: SweepConfig, shared: dict[str, Any], folder: Any) -> tuple[list[TrialRecord], None]:
        leases.append(folder.read("sweep.lease"))
        return [], None

    monkeypatch.setattr("crate_ray.sweeps.run._run_sweep", read_lease)
    run_sweep(config, shared_values(config))
    assert json.loads(leases[0])["seconds"] == 7


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"model.num_subspace": {"choice": [2]}}, "did you mean 'model.num_subspaces'"),
        ({"lr": {"choice": [2]}}, "did you mean 'optim.lr'"),
        ({"model.num_subspaces": {"choice": ["many"]}}, "value 'many': setting 'model.num_subspaces'"),
        ({"model.num_subspaces": {"choice": [2, 7]}}, "value 7: model: dim 64 is not divisible by num_subspaces 7"),
        ({"optim.lr": {"uniform": [-1, 1]}}, "value -1.0: setting 'optim.lr'"),
        ({"model": {"choice": [1]}}, "a group of settings"),
        ({"storage": {"choice": ["x"]}}, "the sweep itself sets storage"),
    ],
)
def test_searching_over_what_cannot_be_is_refused(tmp_path: Path, search: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        shared_values(sweep(tmp_path, search))
    assert words in str(error.value)


@pytest.mark.parametrize("space", [{}, {"choice": [1], "uniform": [0, 1]}, {"uniform": [1, 0]}, {"loguniform": [0, 1]}])
def test_a_space_is_exactly_one_sensible_thing(space: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one|smaller and a larger"):
        SearchSpace.model_validate(space)


def test_objective_and_early_stopping_need_what_they_measure(tmp_path: Path) -> None:
    search = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
    with pytest.raises(UserError, match="training.validate_every"):
        shared_values(sweep(tmp_path, search, grace_steps=5))
    with pytest.raises(UserError, match="held-out data"):
        shared_values(sweep(tmp_path, search, settings={"data.validation": None}))
    with pytest.raises(ValueError, match="probe.train"):
        sweep(tmp_path, search, objective="probe_accuracy")


def records() -> list[TrialRecord]:
    def record(trial: str, lr: float, k: int, status: str, objective: float | None) -> TrialRecord:
        values = {"optim.lr": lr, "model.num_subspaces": k}
        return TrialRecord(trial=trial, values=values, status=status, objective=objective, step=10)

    return [
        record("a", 1e-3, 2, "finished", 0.8),
        record("b", 1e-2, 4, "failed", None),
        record("c", 3e-3, 4, "finished", 0.5),
        record("d", 5e-3, 2, "stopped early", 0.4),
    ]


SEARCH: dict[str, Any] = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "model.num_subspaces": {"choice": [2, 4]}}


def test_a_continued_search_resumes_interrupted_trials_and_does_not_repeat_the_others(tmp_path: Path) -> None:
    config = sweep(tmp_path, SEARCH, trials=6)
    first = TrialSearch(config, [])
    suggested = [first.suggest(f"a-{i}") for i in range(4)]
    assert [one["trial"] for one in suggested if one] == ["a-0", "a-1", "a-2", "a-3"]
    values = [one["values"] for one in suggested if one]
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    for i, (status, objective) in enumerate((("finished", 0.5), ("running", 0.7), ("failed", None), ("running", None))):
        record = TrialRecord(trial=f"a-{i}", number=i + 1, values=values[i], status=status, objective=objective)
        write_record(folder, record)
    stored = read_records(folder)

    again = TrialSearch(config, stored)
    assert again.suggest("b-0") == {"values": values[1], "trial": "a-1", "number": 2}
    assert again.suggest("b-0") == {"values": values[1], "trial": "a-1", "number": 2}
    assert again.suggest("b-1") == {"values": values[3], "trial": "a-3", "number": 4}
    new = again.suggest("b-2")
    assert isinstance(new, dict)
    assert new["trial"] == "b-2" and new["number"] == 5 and new["values"] not in values


def test_a_continued_search_learns_from_the_records(tmp_path: Path) -> None:
    """After many results that favour one choice, TPE suggests it most of the time."""
    config = sweep(tmp_path, {"model.num_subspaces": {"choice": [2, 4]}, "optim.lr": SEARCH["optim.lr"]}, trials=99)
    told = [
        TrialRecord(
            trial=f"t{i}",
            values={"model.num_subspaces": 2 + 2 * (i % 2), "optim.lr": 1e-4 * (1 + i)},
            status="finished",
            objective=0.1 if i % 2 else 0.9,
        )
        for i in range(40)
    ]
    search = TrialSearch(config, told)
    chosen = [one["values"]["model.num_subspaces"] for i in range(20) if (one := search.suggest(f"n{i}"))]
    assert chosen.count(4) >= 15


def test_continued_early_stopping_knows_the_losses_of_the_records(tmp_path: Path) -> None:
    config = sweep(tmp_path, SEARCH, grace_steps=2)
    told = [TrialRecord(trial=f"t{i}", values={}, losses={2: 0.1 * i, 4: 0.05 * i}) for i in range(1, 5)]
    new: Any = type("Trial", (), {"trial_id": "new", "config": {"trial": "new"}})
    for records_, loss, expected in ((told, 0.39, "STOP"), (told, 0.05, "CONTINUE"), ([], 0.39, "CONTINUE")):
        scheduler = early_stopping(config, 8, records_)
        assert scheduler is not None
        scheduler.on_trial_add(None, new)
        assert scheduler.on_trial_result(None, new, {"step": 2, "objective": loss}) == expected
    assert early_stopping(sweep(tmp_path, SEARCH), 8, told) is None


@pytest.mark.parametrize("trial", ["../../victim", "/etc/passwd", "", "a b", "x" * 65])
def test_ids_of_stored_trials_are_no_paths(tmp_path: Path, trial: str) -> None:
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    folder.write("results/a.json", json.dumps({"trial": trial, "values": {}}).encode())
    with pytest.raises(UserError, match=r"results/a.json cannot be read \(trial: "):
        read_records(folder)


def test_a_record_under_the_name_of_another_trial_is_refused(tmp_path: Path) -> None:
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    folder.write("results/a.json", TrialRecord(trial="b", values={}).model_dump_json().encode())
    with pytest.raises(UserError, match="it is the record of trial b"):
        read_records(folder)


def test_a_folder_of_ray_tune_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Tune restores its state by unpickling; a sweep's folder may be written by others."""
    monkeypatch.setattr("ray.tune.Tuner.fit", lambda self: pytest.fail("there is nothing to run"))
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    folder.write("tune/tuner.pkl", b"cos\nsystem\n(S'false'\ntR.")
    for record in records():
        write_record(folder, record)
    config = sweep(tmp_path, SEARCH, trials=len(records()))
    _run_trials(config, shared_values(config), folder, "")


def test_a_sweep_of_an_earlier_version_goes_on_although_settings_were_added_since(tmp_path: Path) -> None:
    config = sweep(tmp_path, SEARCH)
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    key = _key(folder, config, shared_values(config))
    stored = json.loads(folder.read(RECORD_FILE))
    del stored["sweep"]["against"]
    folder.write(RECORD_FILE, json.dumps(stored).encode())
    assert _key(folder, config, shared_values(config)) == key
    other = config.model_copy(update={"against": "parameters"})
    write_record(folder, records()[0])
    with pytest.raises(UserError, match="was started with other settings"):
        _key(folder, other, shared_values(other))


def test_settings_of_a_sweep_without_trials_may_be_changed(tmp_path: Path) -> None:
    """Its first start may have failed for these settings, such as too many workers for the cluster."""
    config = sweep(tmp_path, SEARCH)
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    key = _key(folder, config, shared_values(config))
    other = config.model_copy(update={"against": "parameters"})
    assert _key(folder, other, shared_values(other)) not in ("", key)
