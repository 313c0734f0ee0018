"""A search space that cannot work is refused before a sweep starts, with what to write instead. Optuna is silent."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from crate_ray.cli import parse_config
from crate_ray.config import PretrainConfig, S3Config, SearchSpace, SweepConfig
from crate_ray.config.values import dotted_names
from crate_ray.errors import UserError
from crate_ray.storage.interface import open_storage
from crate_ray.sweeps.candidates import candidates
from crate_ray.sweeps.run import _key
from crate_ray.sweeps.search import TrialSearch
from crate_ray.sweeps.space import shared_values, trial_config
from crate_ray.sweeps.trial import TrialRecord, write_record

BASE = {
    "model": {"image_size": 8, "patch_size": 2, "dim": 64, "depth": 2, "num_subspaces": 4},
    "data": {"train": "somewhere", "validation": "elsewhere"},
    "training": {"steps": 10, "batch_size": 8},
}


def sweep(folder: Path, search: str) -> SweepConfig:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "sweep.yaml").write_text(f"base: base.yaml\nsearch: {search}\n")
    return parse_config(SweepConfig, ["--config", str(folder / "sweep.yaml")])


REFUSED = {
    "{model.num_subspaces: {uniform: [2, 8]}}": "valid integer.*; for whole numbers, give integers: \\[2, 8\\]$",
    "{training.batch_size: {loguniform: [2, 64]}}": "valid integer.*; for whole numbers, give integers: \\[2, 64\\]$",
    "{model.dim: {uniform: [64, 128]}}": "value 103.5.*valid integer",
    "{model.num_subspaces: {integers: [2, 8]}}": "value 3: .*not divisible.*such as choice: \\[2, 4, 8\\]$",
    "{model.patch_size: {integers: [1, 4]}}": "value 3: .*such as choice: \\[1, 2, 4\\]$",
    "{model.depth: {integers: [0, 3]}}": "value 0: .*, such as choice: \\[1, 2, 3\\]$",
    "{data.flip: {uniform: [0, 1]}}": "sweep over 'data.flip', value 0.6",
    "{model.attention: {uniform: [0, 1]}}": "sweep over 'model.attention', value 0.6.*: .*softmax",
    "{optim.lr: {uniform: [0, 1]}}": "value 0.0: setting 'optim.lr' is 0.0: input should be greater than 0$",
    "{optim.lr: {loguniform: [0, 1]}}": "search.optim.lr: loguniform needs .*positive",
    "{optim.lr: {loguniform: [-1, 1]}}": "search.optim.lr: loguniform needs .*positive",
    "{optim.lr: {loguniform: [1e-2, 1e-4]}}": "search.optim.lr: loguniform needs a smaller and a larger number",
    "{optim.lr: {uniform: [1, 1]}}": "search.optim.lr: uniform needs a smaller and a larger number",
    "{model.depth: {integers: [3, 2]}}": "search.model.depth: integers needs a smaller and a larger number",
    "{model.depth: {integers: [1.5, 2]}}": "setting 'search.model.depth.integers' is 1.5: .*valid integer",
    "{optim.lr: {uniform: [0.1, .inf]}}": "'search.optim.lr.uniform' is inf: input should be a finite number$",
    "{optim.lr: {loguniform: [.nan, 1]}}": "'search.optim.lr.loguniform' is nan: input should be a finite number$",
    "{optim.lr: {choice: [0.1, .nan]}}": "value nan: setting 'optim.lr' is nan: input should be a finite number$",
    "{optim.lr: {uniform: [1]}}": "'search.optim.lr.uniform' has too few values; give 2$",
    "{optim.lr: {choice: []}}": "search.optim.lr: choice needs at least one value$",
    "{optim.lr: {choice: [1e-3, 0.001]}}": "search.optim.lr: choice has 0.001 twice; give it once$",
    "{model.num_subspaces: {choice: [2, 2.0]}}": "search.model.num_subspaces: choice has 2 twice",
    "{model.image_size: {choice: [[8, 16], 8, [8, 16]]}}": "choice has \\[8, 16\\] twice",
    "{optim.lr: [1e-4, 1e-2]}": "search.optim.lr: give a mapping, such as {choice: \\[1, 2\\]}",
    "{optim.lr: 1e-3}": "search.optim.lr: give a mapping, such as",
    "{optim.lr: {}}": "search.optim.lr: set exactly one of choice, integers, uniform and loguniform, not none$",
    "{optim.lr: {logunifrom: [1, 2]}}": "no setting 'search.optim.lr.logunifrom', did you mean 'loguniform'\\?",
    "{optim.lr: {values: [1, 2]}}": "there is no setting 'search.optim.lr.values'; there are choice, integers",
    "{optim.weight_decya: {choice: [1]}}": "did you mean 'optim.weight_decay'\\?$",
    "{weight-decay: {choice: [1]}}": "did you mean 'optim.weight_decay'\\?$",
    "{optim.lr: {choice: [1]}, optim.lr: {choice: [2]}}": "'optim.lr' is given twice",
}


@pytest.mark.parametrize("search", REFUSED)
def test_what_cannot_work_is_refused_with_what_to_write(tmp_path: Path, search: str) -> None:
    with pytest.raises(UserError, match=REFUSED[search]) as error:
        shared_values(sweep(tmp_path, search))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("letter", range(3))
def test_a_typo_in_any_name_suggests_that_name(tmp_path: Path, letter: int) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    for name in dotted_names(PretrainConfig):
        group, _, last = name.rpartition(".")
        if not group or len(last) < 6:
            continue
        wrong = f"{group}.{last[: letter + 1]}{last[letter + 2 :]}"
        search = {wrong: SearchSpace(choice=(1,))}
        with pytest.raises(UserError, match=f"did you mean '{name}'"):
            shared_values(SweepConfig(base=str(tmp_path / "base.yaml"), search=search))


GOOD = """{data.flip: {choice: [true, off]}, optim.lr: {loguniform: [1e-5, 1e-2]}, optim.warmup: {integers: [0, 5000]},
  optim.weight_decay: {uniform: [0, 1]}, optim.clip_norm: {choice: [null, 1, true]},
  model.num_subspaces: {choice: [2, 4]}, data.crop_scale: {choice: [[0.2, 1], [0.5, 1]]}}"""


@pytest.mark.parametrize("multivariate", [True, False])
def test_every_suggestion_is_valid_and_optuna_prints_nothing(
    tmp_path: Path, multivariate: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    config = sweep(tmp_path, GOOD.replace(", true]", "]") if multivariate else GOOD)
    shared = shared_values(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = TrialSearch(config, [])
        for trial in range(12):
            suggested: Any = search.suggest(f"t{trial}")
            found = trial_config(config, shared, suggested["values"], "t")
            assert found.data.flip in (True, False) and 1e-5 <= (found.optim.lr or 0) <= 1e-2
            search.on_trial_complete(f"t{trial}", {"objective": float(trial)})
    assert capfd.readouterr() == ("", "")


def test_values_between_the_ends_are_checked() -> None:
    assert candidates(SearchSpace(integers=(3, 6))) == [3, 4, 5, 6]
    many = candidates(SearchSpace(integers=(0, 10**9)))
    assert (many[0], many[-1], len(set(many))) == (0, 10**9, 64)
    for space in (SearchSpace(uniform=(2, 800)), SearchSpace(loguniform=(1, 1024))):
        between, low, high = candidates(space)
        assert low < between < high and not float(between).is_integer()


def test_a_sweep_whose_base_was_read_by_yaml_1_1_is_continued(tmp_path: Path) -> None:
    config = sweep(tmp_path, "{optim.lr: {uniform: [1, 2]}}")
    shared = shared_values(config) | {"optim": {"eps": 1e-6}}
    folder = open_storage(str(tmp_path / "sweep"), S3Config())
    key = _key(folder, config, shared | {"optim": {"eps": "1e-6"}})
    assert _key(folder, config, shared) == key
    write_record(folder, TrialRecord(trial="a", values={}, status="failed"))
    with pytest.raises(UserError, match="was started with other settings"):
        _key(folder, config, shared | {"optim": {"eps": 2e-6}})
