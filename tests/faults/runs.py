"""The run of the fault tests: small, with everything that could break bitwise equality."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import torch.distributed as dist
from mlflow import MlflowClient

from crate_ray.cli import parse_config
from crate_ray.config import PrepareConfig, PretrainConfig
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.runs.pretraining import open_run
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.local import LocalStorage
from crate_ray.training.bare_loop import train
from crate_ray.training.pretraining import PretrainTask
from tests.jobs import digest_of, forkserver, job

STEPS, EVERY = 60, 12


def pack_digits(folder: Path) -> str:
    """Pack a dataset into a folder, with an MLflow database beside it; returns the dataset's address."""
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()  # create it here, once
    config = PrepareConfig(source="digits", split="test", output=str(folder / "digits"))
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    return config.output


def pretrain(digits: str, workers: int = 2, **settings: object) -> list[str]:
    """Command line of a run with augmentation, accumulation, uneven batches and several epochs.

    Other settings are given by their names, with __ for the dot.
    """
    values = {
        "name": "run",
        "storage": "runs",
        "data.train": digits,
        "data.crop_scale": "0.5,1",
        "model.image_size": 8,
        "model.patch_size": 2,
        "model.channels": 1,
        "model.dim": 64,
        "model.depth": 2,
        "model.num_subspaces": 4,
        "training.batch_size": 45,
        "training.micro_batch_size": 10,
        "training.steps": STEPS,
        "optim.lr": 0.003,
        "scaling.workers": workers,
        "scaling.cpus_per_worker": 1,
        "scaling.lease_seconds": 4,
        "checkpoint.every_steps": EVERY,
        "tracking.uri": f"sqlite:///{Path(digits).parent}/mlflow.db",
        "tracking.picture_every": "null",
    }
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    return job("pretrain", *[part for name, value in values.items() for part in (f"--{name}", str(value))])


def run_in(folder: Path) -> Storage:
    """The run's folder of a job that was started in a folder."""
    return LocalStorage(folder / "runs" / "run")


class Undisturbed:
    """Final weights of undisturbed runs, trained by the loop without Ray when they are first needed."""

    def __init__(self, digits: str, folder: Path) -> None:
        self._digits, self._folder = digits, folder
        self._weights: dict[int, str] = {}
        self._lock = threading.Lock()

    def weights(self, workers: int) -> str:
        """Digest of the final weights of a run with a number of workers."""
        with self._lock:
            if workers not in self._weights:
                self._weights[workers] = self._train(workers)
            return self._weights[workers]

    def _train(self, workers: int) -> str:
        folder = self._folder / f"undisturbed-{workers}"
        folder.mkdir()
        config = parse_config(PretrainConfig, pretrain(self._digits, workers, storage=folder)[2:])
        record = open_run(config).record.model_copy(update={"threads": 1})
        given = json.dumps([config.model_dump(mode="json"), record.model_dump(mode="json")])
        group = [forkserver().Process(target=_alone, args=(rank, workers, given, folder)) for rank in range(workers)]
        for process in group:
            process.start()
        try:
            for process in group:
                process.join(120)
                assert process.exitcode == 0
        finally:
            for process in group:
                process.kill()
        return (folder / "digest").read_text()


def _alone(rank: int, workers: int, given: str, folder: Path) -> None:
    """One process of the loop without Ray."""
    config, record = json.loads(given)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    done = train(PretrainTask, PretrainConfig.model_validate(config), RunRecord.model_validate(record), STEPS)
    if rank == 0:
        (folder / "digest").write_text(digest_of(done.weights))
    dist.destroy_process_group()
