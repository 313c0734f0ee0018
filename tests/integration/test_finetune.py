"""Fine-tuning on Ray Train: a run that loses a worker recovers and learns. Its classifier is registered, and gives the
same predictions everywhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import psutil
import pytest
import torch
from mlflow import MlflowClient

from crate_ray import load_model
from crate_ray.config import DataConfig, FinetuneConfig, PrepareConfig, PretrainConfig, S3Config, TrackingConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.loader import evaluation_loader
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.models import build_model
from crate_ray.models.classifier import Classifier
from crate_ray.runs import metrics
from crate_ray.runs.checkpoint_files import checkpoint_tensors
from crate_ray.runs.commits import committed
from crate_ray.runs.listener import Listener
from crate_ray.runs.mlflow_lookup import find_run
from crate_ray.runs.planning import Run, driver_lease
from crate_ray.runs.pretraining import open_run
from crate_ray.runs.record import write_record
from crate_ray.runs.references import load_encoder
from crate_ray.served_model import ServedModel
from crate_ray.storage.interface import open_storage
from crate_ray.tracking.pretraining import is_published, publish, track
from crate_ray.tracking.registry import register
from crate_ray.training.bare_loop import train
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.ray.driver import train_on_ray
from tests.checkpoints import save
from tests.jobs import RayCluster

pytestmark = pytest.mark.ray

STEPS, EVERY = 60, 15


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    made = []
    for split in ("train", "test"):
        config = PrepareConfig(source="digits", split=split, output=str(tmp_path_factory.mktemp(split)))
        pack(digits_source(split), open_storage(config.output, config.s3), config)
        made.append(config.output)
    return made[0], made[1]


class Follower(Listener):
    """Keeps every metric by step, and kills a worker once."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.values: dict[str, dict[int, float]] = {}
        self.kill_at, self.killed = kill_at, False

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value
        if self.kill_at is not None and step >= self.kill_at and not self.killed:
            workers = [
                p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
            ]
            os.kill(workers[-1].pid, signal.SIGKILL)
            self.killed = True


def settings(digits: tuple[str, str], folder: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "storage": str(folder / "runs"),
        "data": {"train": digits[0], "validation": digits[1], "flip": False, "crop_scale": (0.6, 1.0)},
        "scaling": {"workers": 2, "cpus_per_worker": 1},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}", "picture_every": None, "log_every": 5},
    }
    return {**values, **changes}


def pretrain(run: Run, scratch: Path) -> None:
    """Train to the last step, without Ray, and leave a checkpoint of that."""
    threads, model = torch.get_num_threads(), build_model(run.record.model)
    try:
        model.load_state_dict(train(PretrainTask, run.config, run.record, run.total_steps).weights)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    write_record(run.storage, run.record)
    tensors = checkpoint_tensors(model, build_optimizer(model, run.config.optim))
    save(run.storage, tensors, run.record, run.total_steps, scratch)


@pytest.mark.timeout(900)
def test_a_pretrained_encoder_becomes_a_registered_classifier(
    driver_here: RayCluster, digits: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder = {"image_size": 8, "patch_size": 4, "channels": 1, "dim": 64, "depth": 2, "num_subspaces": 4}
    encoder |= {"mask_ratio": 0.5, "sparsity_lambda": 0.1}
    earlier = PretrainConfig.model_validate(
        settings(digits, tmp_path, name="pretrained", model=encoder, training={"steps": 40, "batch_size": 64})
        | {"optim": {"lr": 2e-3}}
    )
    with driver_lease(earlier) as lease, track(source := open_run(earlier), lease):
        pretrain(source, tmp_path / "scratch")

    config = FinetuneConfig.model_validate(
        settings(digits, tmp_path, name="tuned", recipe="mae", model=source.storage.uri)
        | {
            "training": {"steps": STEPS, "batch_size": 64, "micro_batch_size": 20, "validate_every": 30},
            "optim": {"lr": 3e-3, "clip_norm": 1.0},
            "layer_decay": 0.8,
            "checkpoint": {"every_steps": EVERY},
            "augment": {"randaugment": 1, "magnitude": 4, "mixup": 0.2, "cutmix": 0.0},
        }
    )

    def open_it() -> Any:
        return open_finetuning(config)

    follower = Follower(kill_at=EVERY + 5)
    with driver_lease(config) as lease, track(run := open_it(), lease) as tracker:
        train_on_ray(run, lease, FinetuneTask, [follower, tracker])
        publish(run, tracker)
    assert follower.killed and committed(run.storage)[0].step == STEPS
    assert len({path.parent.name for path in (tmp_path / "runs/tuned").glob("attempt-001/step-*/state.json")}) == 2
    assert follower.values[metrics.LOSS].keys() == set(range(5, STEPS + 1, 5))
    losses = follower.values[metrics.LOSS]
    assert losses[STEPS] < 0.95 * losses[5]
    top1, top5 = follower.values[metrics.TOP1], follower.values[metrics.TOP5]
    assert top1.keys() == top5.keys() == {30, STEPS}
    assert 0.3 < top1[STEPS] <= top5[STEPS] <= 1  # chance is 0.1
    finished = open_it()
    assert finished.is_finished and is_published(finished)

    # In MLflow: settings, measurements, where it comes from.
    client, tracking = MlflowClient(config.tracking.uri), TrackingConfig(uri=config.tracking.uri)
    run_id = find_run(client, run.record.run_key)
    assert run_id is not None
    logged = client.get_run(run_id)
    assert logged.data.metrics[metrics.TOP1] == pytest.approx(top1[STEPS])
    assert metrics.IMAGES_PER_SECOND in logged.data.metrics
    assert {point.step for point in client.get_metric_history(run_id, metrics.VALIDATION_LOSS)} == {30, STEPS}
    assert (logged.data.params["layer_decay"], logged.data.params["encoder.dim"]) == ("0.8", "64")
    assert logged.data.tags["mlflow.parentRunId"] == find_run(client, source.record.run_key)
    assert (logged.data.tags["crate_ray.job"], logged.data.tags["crate_ray.parent_step"]) == ("finetune", "40")

    # In the registry: the same predictions as the exported model's, from pixels of any form.
    version = register(run.storage.uri, "digit-classes", tracking, S3Config())
    with pytest.raises(
        UserError, match=r"digit-classes has versions that are classifiers, and .*pretrained holds an en"
    ):
        register(source.storage.uri, "digit-classes", tracking, S3Config())
    reference = f"models:/digit-classes/{version.version}"
    held_out = load_dataset(open_storage(digits[1], S3Config()))
    with evaluation_loader(held_out, earlier.model, DataConfig(train=digits[1]), batch_size=1000) as loader:
        batch = next(iter(loader))
    predictor = ServedModel.from_folder(tmp_path / "runs" / "tuned" / "model")
    probabilities = predictor(batch.images)
    assert (probabilities.argmax(1).numpy() == batch.labels).mean() == pytest.approx(top1[STEPS], abs=0.003)
    mlflow.set_tracking_uri(config.tracking.uri or "")
    pyfunc = mlflow.pyfunc.load_model(reference)
    pixels = batch.images[:100].permute(0, 2, 3, 1).numpy()
    predicted = torch.from_numpy(pyfunc.predict(pd.DataFrame({"image": list(pixels)})))
    torch.testing.assert_close(predicted, probabilities[:100])
    model = load_model(reference, tracking=tracking)
    assert isinstance(model, Classifier)
    for name, weight in predictor.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    with pytest.raises(UserError, match="fine-tuned classifier, but a pretrained model is needed"):
        load_encoder(reference, tracking, S3Config())
