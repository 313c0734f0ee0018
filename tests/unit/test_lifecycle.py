"""The lifecycle of a run: complete runs are left alone, others are published, whole or not at all, under the lease."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from crate_ray.config import PrepareConfig, PretrainConfig
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.models.exported import load_exported
from crate_ray.runs.mlflow_lookup import find_run
from crate_ray.runs.planning import Run, driver_lease
from crate_ray.runs.pretraining import open_pretraining, open_run
from crate_ray.runs.record import write_record
from crate_ray.storage.local import LocalStorage
from crate_ray.tracking.pretraining import is_published, publish
from crate_ray.training.lifecycle import run_training
from crate_ray.training.pretraining import PretrainTask
from tests.checkpoints import save
from tests.unit.test_checkpoint import MODEL, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store. Creating one takes seconds, so the tests share it."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def base(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = LocalStorage(tmp_path / "data")
    pack(shapes_source("all", 20, 8, 0), data, PrepareConfig(source="shapes", output=data.uri))
    return {
        "name": "mine",
        "storage": str(tmp_path / "runs"),
        "model": MODEL,
        "data": {"train": data.uri},
        "tracking": {"uri": uri},
    }


def trained(base: dict[str, Any], steps: int, scratch: Path) -> PretrainConfig:
    """Settings of a run whose checkpoint of the last step is there: killed before its model was published."""
    config = PretrainConfig.model_validate(base | {"training": {"steps": steps, "batch_size": 4}})
    run = open_run(config)
    write_record(run.storage, run.record)
    trainer = Trainer()
    trainer.train(steps)
    save(run.storage, trainer.tensors(), run.record, steps, scratch)
    assert open_run(config).is_finished
    return config


def published_step(folder: str) -> int:
    return load_exported(Path(folder))[1].step


def test_a_run_is_published_once_for_each_end_that_it_reaches(base: dict[str, Any], tmp_path: Path) -> None:
    config = trained(base, 2, tmp_path / "scratch")
    first = run_training(config, PretrainTask, open_pretraining, publish, tags={"crate_ray.comparison": "c"})
    assert first.result == f"{tmp_path}/runs/mine/model" and published_step(first.result) == 2
    again = run_training(config, PretrainTask, open_pretraining, publish)
    assert again.result is None and again.run.first_step == 2
    # It goes on to another end: the model of the first one does not count for it.
    longer = trained(base, 4, tmp_path / "scratch")
    assert not is_published(open_run(longer))
    second = run_training(longer, PretrainTask, open_pretraining, publish)
    assert second.result is not None and published_step(second.result) == 4
    client = MlflowClient(config.tracking.uri)
    run_id = find_run(client, second.run.record.run_key)
    assert run_id is not None and second.mlflow_run.startswith(run_id)
    tags = client.get_run(run_id).data.tags
    assert (tags["crate_ray.comparison"], tags["crate_ray.job"]) == ("c", "pretrain")


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_a_model_is_published_whole_or_not_at_all(
    file: str, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(trained(base, 2, tmp_path / "scratch"), PretrainTask, open_pretraining, publish)
    config, write = trained(base, 4, tmp_path / "scratch"), LocalStorage.write

    def killed(self: LocalStorage, key: str, *args: Any, **values: Any) -> None:
        if key.endswith(file) and self.root.name == "mine":
            raise KeyboardInterrupt
        write(self, key, *args, **values)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, PretrainTask, open_pretraining, publish)
    assert not is_published(open_run(config))
    assert not (tmp_path / "runs/mine/model/model.json").exists()  # it would not describe the weights beside it
    finished = run_training(config, PretrainTask, open_pretraining, publish)
    assert finished.result is not None and published_step(finished.result) == 4


def test_a_run_is_opened_with_its_lease_held(base: dict[str, Any], tmp_path: Path) -> None:
    config = trained(base, 2, tmp_path / "scratch")

    def open_it(config: PretrainConfig) -> Run:
        with pytest.raises(UserError, match="run 'mine'"), driver_lease(config):
            pass
        raise ValueError("the settings are wrong")

    with pytest.raises(ValueError, match="the settings are wrong"):
        run_training(config, PretrainTask, open_it, publish)
    with driver_lease(config):  # it is free again
        pass
