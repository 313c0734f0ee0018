"""The run that faults hit: small, with all that could break equality."""

from __future__ import annotations

from tests.jobs import job

STEPS, EVERY = 60, 12


def pretrain(digits: str, workers: int = 2) -> list[str]:
    """Settings with all that could break equality: augmentation, accumulation, uneven batches, several epochs."""
    settings = {
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
        "checkpoint.every_steps": EVERY,
        "tracking.uri": "sqlite:///mlflow.db",
        "tracking.picture_every": "null",
    }
    return job("pretrain", *[part for name, value in settings.items() for part in (f"--{name}", str(value))])
