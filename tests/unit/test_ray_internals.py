"""The private names of Ray that training uses exist and still work. If a new version of Ray fails here,
crate_ray/training/ray/internals.py explains the use of each name."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import BackendSetupCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

import crate_ray
from crate_ray.config import ScalingConfig
from crate_ray.training.ray import internals
from crate_ray.training.ray.fit import ray_failures, ray_scaling


def test_private_names_of_ray_are_in_one_file() -> None:
    package = Path(crate_ray.__file__).parent
    private = ("ray._", "ray.train.v2", "ray.train._internal", "ray.tune._", "from ray import _")
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import ray", "from ray")) and any(name in line for name in private)
    }
    assert users == {"training/ray/internals.py"}
    knows_ray = {
        path.relative_to(package / "training").as_posix()
        for path in (package / "training").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import ray", "from ray"))
    }
    assert knows_ray and all(name.startswith("ray/") for name in knows_ray)


def test_the_controller_sends_its_handle_and_can_be_aborted() -> None:
    """Else the driver could not end a run: neither on Ctrl-C nor when its lease is lost or a rank hangs."""
    hook = inspect.signature(ControllerCallback.after_controller_start)
    assert list(hook.parameters) == ["self", "train_run_context"]
    assert inspect.iscoroutinefunction(TrainController.abort)
    # Ray adds a parameter of its own to the methods of a class that it has made an actor of.
    parameters = inspect.signature(TrainController.abort).parameters
    assert [name for name in parameters if not name.startswith("_")] == ["self"]


def test_a_worker_group_whose_start_failed_can_be_released() -> None:
    """Else a worker that dies in the set-up leaves a placement group that blocks all later starts."""
    for hook in ("on_worker_group_start", "after_worker_group_start"):
        assert hook in vars(WorkerGroupCallback), hook
    assert callable(WorkerGroup.has_started) and callable(WorkerGroup.get_worker_group_state)
    assert callable(WorkerGroupState.shutdown)
    released = []
    state = SimpleNamespace(shutdown=lambda: released.append(True))
    group = SimpleNamespace(has_started=lambda: True, get_worker_group_state=lambda: state)
    callback = internals.ReleaseFailedStart()

    def fail() -> None:
        with callback.on_worker_group_start():
            callback.after_worker_group_start(group)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert released == [True]
    with callback.on_worker_group_start():
        callback.after_worker_group_start(group)
    assert released == [True]


def test_our_release_comes_before_the_set_up_that_may_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else it does not hear of a worker group whose set-up fails."""
    monkeypatch.setenv("RAY_TRAIN_CALLBACKS", "")
    internals.install_release_failed_start()
    internals.install_release_failed_start()
    assert os.environ["RAY_TRAIN_CALLBACKS"].count("ReleaseFailedStart") == 1
    sender = internals.SendController(None)
    trainer = TorchTrainer(
        print, run_config=ray.train.RunConfig(name="x", storage_path=str(tmp_path), callbacks=[sender])
    )
    callbacks = trainer._create_default_callbacks()
    kinds = [type(callback) for callback in callbacks]
    assert sender in callbacks
    assert kinds.index(internals.ReleaseFailedStart) < kinds.index(BackendSetupCallback)


def test_the_id_of_a_placement_group_ends_with_its_jobs() -> None:
    """Else the groups of a run that was stopped are not removed."""
    job = ray.JobID.from_int(7)
    assert ray.PlacementGroupID.of(job).hex().endswith(job.hex())


def test_settings_reach_ray_train() -> None:
    scaling = ScalingConfig.model_validate(
        {
            "workers": [2, 4],
            "resize_seconds": 7,
            "max_failures": 5,
            "max_preemption_failures": 6,
            "accelerator_type": "H100",
            "label_selector": {"zone": "a"},
        }
    )
    ours = ray_scaling(scaling, {"CPU": 3, "GPU": 1}, use_gpu=True)
    assert (ours.num_workers, ours.elastic_resize_monitor_interval_s) == ((2, 4), 7)
    assert (ours.accelerator_type, ours.label_selector) == ("H100", {"zone": "a"})
    assert (ours.use_gpu, ours.resources_per_worker["CPU"]) == (True, 3)
    failures = ray_failures(scaling)
    assert (failures.max_failures, failures.max_preemption_failures) == (5, 6)
    assert ray_scaling(ScalingConfig(), {"CPU": 1}, use_gpu=False).label_selector is None


def test_ray_tune_does_not_copy_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution import class_cache

    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", set(class_cache.ENV_VARS_TO_PROPAGATE))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "planted")

    class Trainable:
        pass

    def sent() -> str:
        return str(class_cache._ActorClassCache().get(Trainable)._default_options["runtime_env"])

    copied = "planted" in sent()
    internals.keep_credentials_here()
    assert copied and "planted" not in sent() and "PL_DISABLE_FORK" in sent()
