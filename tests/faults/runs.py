"""The run that faults hit: small, with all that could break equality."""

from __future__ import annotations

import threading
from pathlib import Path

from mlflow import MlflowClient

from crate_ray.config import PrepareConfig
from crate_ray.data.builtin import digits_source
from crate_ray.data.packing import pack
from crate_ray.data.storage import LocalStorage, Storage, open_storage
from tests.jobs import RayCluster, final_weights, finish, job, start

STEPS, EVERY = 60, 12


def pack_digits(folder: Path) -> str:
    """Address of a packed dataset in a folder, beside which is a database for MLflow's records."""
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()  # once, not by jobs that start together
    config = PrepareConfig(source="digits", split="test", output=str(folder / "digits"))
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    return config.output


def pretrain(digits: str, workers: int = 2, **settings: object) -> list[str]:
    """Command line: augmentation, accumulation, uneven batches, several epochs; MLflow's records beside the data.

    More settings by their names, with __ for the dot.
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
    """Where a job that was started in a folder keeps its run."""
    return LocalStorage(folder / "runs" / "run")


class Undisturbed:
    """Final weights of runs that nothing hits, each trained when it is asked for first."""

    def __init__(self, digits: str, folder: Path, cluster: RayCluster) -> None:
        self._digits, self._folder, self._cluster = digits, folder, cluster
        self._weights: dict[int, str] = {}
        self._lock = threading.Lock()

    def weights(self, workers: int) -> str:
        """Digest of the final weights for a number of workers."""
        with self._lock:
            if workers not in self._weights:
                folder = self._folder / f"undisturbed-{workers}"
                folder.mkdir()
                finish(start(pretrain(self._digits, workers), folder, self._cluster))
                self._weights[workers] = final_weights(run_in(folder))
            return self._weights[workers]
