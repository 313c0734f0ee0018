"""A run that goes on with other settings says what changed, records it, and refuses what would have no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from crate_ray.config import PretrainConfig
from crate_ray.errors import UserError
from crate_ray.runs.listener import Listener
from crate_ray.runs.mlflow_lookup import find_run
from crate_ray.runs.planning import driver_lease
from crate_ray.runs.pretraining import open_run
from crate_ray.runs.starts import changed_settings, record_start
from crate_ray.storage.local import LocalStorage
from crate_ray.tracking.pretraining import track
from crate_ray.training.lifecycle import _record_start
from tests.unit.test_lifecycle import base, trained, uri

__all__ = ["base", "uri"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


class Notes(Listener):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, step: int, text: str) -> None:
        self.texts.append(f"{step}: {text}")


def again(base: dict[str, Any], **groups: dict[str, Any]) -> PretrainConfig:
    """The settings of a longer run of the same name, with changes."""
    values = base | {"training": {"steps": 8, "batch_size": 4}}
    for name, values_of_group in groups.items():
        values[name] = {**values.get(name, {}), **values_of_group}
    return PretrainConfig.model_validate(values)


def test_changes_are_shown_and_recorded_in_mlflow_and_in_the_folder(base: dict[str, Any], tmp_path: Path) -> None:
    trained(base, 2, tmp_path / "scratch")  # by an earlier version, which recorded no starts
    config = again(base, optim={"lr": 0.01}, data={"crop_scale": (0.5, 1.0), "memory_bytes": 1})
    notes = Notes()
    with driver_lease(config) as lease, track(run := open_run(config), lease) as tracker:
        _record_start(run, tracker, [notes])
        _record_start(run, tracker, [notes])  # it is killed and starts again: nothing has changed since
    (note,) = notes.texts
    assert note.startswith("2: other settings than at the start before: ")
    for change in (
        "training.steps 8 (was 2)",
        "optim.lr 0.01 (was null)",
        "data.crop_scale [0.5, 1.0] (was [0.2, 1.0])",
    ):
        assert change in note
    assert "data.memory_bytes changes how samples are read, but not their order" in note
    folder = LocalStorage(tmp_path / "runs" / "mine")
    second, third = (json.loads(folder.read(f"starts/start-00{number}.json")) for number in (2, 3))
    assert second["changed"]["optim.lr"] == [None, 0.01] and second["step"] == 2
    assert third["changed"] == {} and third["config"]["optim"]["lr"] == 0.01
    client = MlflowClient(config.tracking.uri)
    run_id = find_run(client, run.record.run_key)
    assert run_id is not None
    tags = client.get_run(run_id).data.tags
    assert tags["crate_ray.changed.002"].startswith("from step 2: ") and "crate_ray.changed.003" not in tags
    assert {f.path for f in client.list_artifacts(run_id, "starts")} == {
        "starts/start-002.json",
        "starts/start-003.json",
    }


def test_a_new_run_has_a_first_start_without_changes(base: dict[str, Any], tmp_path: Path) -> None:
    start = record_start(open_run(again(base)))
    assert (start.number, start.step, start.changes) == (1, 0, "")
    # A record that is damaged stops nothing.
    (tmp_path / "runs" / "mine" / "starts" / "start-007.json").write_text("{")
    assert record_start(open_run(again(base))).number == 8


def test_leaving_out_validation_is_a_change(base: dict[str, Any]) -> None:
    with_it = again(base, data={"validation": base["data"]["train"]})
    assert changed_settings(with_it, again(base)) == {"data.validation": (base["data"]["train"], None)}
    assert changed_settings(again(base), again(base)) == {}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"mean": (0.1, 0.2, 0.3)}, "data.mean"),
        ({"std": (0.5, 0.5, 0.5)}, "data.std"),
        ({"mean": (0.1,), "std": (0.5,)}, "data.mean and data.std"),
        ({"shuffle": False}, "data.shuffle"),
        ({"block_samples": 3}, "data.block_samples"),
        ({"window_blocks": 3}, "data.window_blocks"),
        ({"lanes": 2}, "data.lanes"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    changes: dict[str, Any], names: str, base: dict[str, Any], tmp_path: Path
) -> None:
    trained(base, 2, tmp_path / "scratch")
    with pytest.raises(
        UserError, match=f"^{names} would have no effect: run 'mine' at .* keeps the order and the norm"
    ):
        open_run(again(base, data=changes))


@pytest.mark.parametrize("changes", [{"memory_bytes": 1}, {"buffer_bytes": 2**20}, {"flip": False}, {"lanes": 1}])
def test_what_has_an_effect_or_changes_nothing_is_not_refused(
    changes: dict[str, Any], base: dict[str, Any], tmp_path: Path
) -> None:
    config = trained(base, 2, tmp_path / "scratch")
    run = open_run(again(base, data=changes))
    assert run.record.order == open_run(config).record.order


def test_explicit_values_of_the_first_start_are_not_refused(base: dict[str, Any], tmp_path: Path) -> None:
    first = open_run(trained(base, 2, tmp_path / "scratch")).record
    same = {"mean": first.mean, "std": first.std, "block_samples": first.order.datasets[0].block_samples}
    assert open_run(again(base, data=same)).record == first


def test_storage_in_the_package_of_a_submitted_job_is_refused(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ray" / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(UserError, match=r"^storage \S+/runs/mine is in the copy .* which Ray deletes after the job"):
        open_run(again(base | {"storage": "runs"}))
    assert not list(package.iterdir())
