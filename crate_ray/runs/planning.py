"""What a run is before it starts: settings checked against the data and against its record, its order, its length."""

from __future__ import annotations

import math
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crate_ray.config import CrateMAEConfig, FinetuneConfig, PretrainConfig, ViTMAEConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.order.mixture import Mixture, open_mixture
from crate_ray.data.order.plan import plan_order
from crate_ray.errors import UserError
from crate_ray.runs.checkpoint import FinetuneStart, RunRecord, fetch_newest, newest_complete, read_record
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.lease import Lease

RunConfig = PretrainConfig | FinetuneConfig
_ConfigT = TypeVar("_ConfigT", PretrainConfig, FinetuneConfig)


@dataclass(frozen=True)
class Run:
    """A run that is about to start or to go on."""

    config: RunConfig
    record: RunRecord
    storage: Storage
    """Folder of the run."""
    mixture: Mixture
    """Training data."""
    total_steps: int
    """Steps that the run has when it is finished."""
    first_step: int
    """Steps that its newest checkpoint has done."""

    @property
    def is_finished(self) -> bool:
        """Whether no step is left."""
        return self.first_step >= self.total_steps


def driver_lease(config: RunConfig) -> Lease:
    """The right to write to a run's folder and to track it, for one driver at a time.

    Enter it before the run is opened, so that nobody writes between, and leave it when all is told.
    """
    storage = open_storage(config.storage, config.s3).under(config.name)
    return Lease(storage, "driver.lease", f"run {config.name!r}", lease_seconds=config.scaling.lease_seconds)


def plan_run(
    config: RunConfig,
    model: CrateMAEConfig | ViTMAEConfig,
    *,
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    finetune: FinetuneStart | None = None,
) -> Run:
    """Check the settings against the data and, when the run exists, against its record; nothing is started yet.

    Parameters: settings with absolute paths (see `with_absolute_paths`); the model, or the encoder that is fine-tuned;
    mean and standard deviation per channel in the place of the dataset's own; and for the record what a fine-tuning is
    about. Raises UserError when the data is missing or does not fit, or when the run was begun with other data or
    another model.
    """
    training = config.training
    mixes = isinstance(config, FinetuneConfig) and config.mixes
    if config.scaling.max_workers > training.batch_size // (2 if mixes else 1):
        raise UserError(
            f"{config.scaling.max_workers} workers are more than the {training.batch_size} samples of a batch"
            f"{', which are mixed in pairs' if mixes else ''}; lower scaling.workers or raise training.batch_size"
        )
    mixture = open_mixture(config.data.train, config.s3)
    held_out = [load_dataset(open_storage(config.data.validation, config.s3))] if config.data.validation else []
    for dataset in (*mixture.datasets, *held_out):
        other = dataset.manifest
        if (other.kind == "grid" and other.channels != model.channels) or model.channels not in (1, 3):
            raise UserError(
                f"the model has {model.channels} channels, the samples of {dataset.storage.uri} have "
                f"{other.channels}; set model.channels"
            )
    order = plan_order(
        mixture,
        config.data,
        batch_size=training.batch_size,
        seed=config.seed,
        workers=config.scaling.min_workers,  # whose buffers have to hold most
    )
    usual_mean, usual_std = mean_std or mixture.mean_std
    mean, std = config.data.mean or usual_mean, config.data.std or usual_std
    channels = model.channels
    if len(mean) == len(std) == 1:
        mean, std = mean * channels, std * channels
    elif channels == 1 and mixture.kind == "image" and not config.data.mean:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"data.mean and data.std need {channels} numbers each, one per channel of the model")
    storage = open_storage(config.storage, config.s3).under(config.name)
    newest = newest_complete(storage)
    record = read_record(storage)
    if record is None or not (newest or _same_run(record, config, mixture.digest)):
        record = RunRecord(
            run_key=uuid.uuid4().hex,
            config=config,
            finetune=finetune,
            dataset=mixture.digest,
            order=order,
            kind=mixture.kind,
            mean=mean,
            std=std,
            threads=config.scaling.cpus_per_worker or 0,
        )
    elif difference := _difference(record, config, model, mixture.digest):
        raise UserError(
            f"run {config.name!r} at {config.storage} was begun with {difference}; "
            "choose another --name for a new run, or the settings it was begun with to resume it"
        )
    total_steps = training.steps or math.ceil((training.epochs or 0) * record.order.batches_per_epoch)
    first_step = newest.step if newest else 0
    if first_step >= total_steps:  # no worker will look at the checkpoint before its model is published
        with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
            newest = fetch_newest(storage, Path(temporary) / "checkpoint")
        first_step = newest.step if newest else 0
    return Run(config, record, storage, mixture, total_steps, first_step)


def with_absolute_paths(config: _ConfigT) -> _ConfigT:
    """The same settings with local folders made absolute: workers have other working directories."""
    data, s3 = config.data, config.s3
    absolute: dict[str, Any] = {}
    if isinstance(data.train, str):
        absolute["train"] = open_storage(data.train, s3).uri
    else:
        absolute["train"] = {open_storage(uri, s3).uri: weight for uri, weight in data.train.items()}
    if data.validation:
        absolute["validation"] = open_storage(data.validation, s3).uri
    storage = open_storage(config.storage, s3).uri
    if data.cache_dir:
        absolute["cache_dir"] = str(Path(data.cache_dir).expanduser().absolute())
    return config.model_copy(update={"data": data.model_copy(update=absolute), "storage": storage})


def _difference(record: RunRecord, config: RunConfig, model: CrateMAEConfig | ViTMAEConfig, dataset: str) -> str | None:
    """What a record disagrees on with the settings of a resumption, for a sentence; None where it can be resumed."""
    old = record.config
    if type(old) is not type(config):
        return "pretraining" if isinstance(old, PretrainConfig) else "fine-tuning"
    if record.dataset != dataset:
        return f"another dataset ({old.data.train}, digest {record.dataset[:12]}; now {dataset[:12]})"
    old_model, new_model = record.model.model_dump(), model.model_dump()
    for name in sorted({*old_model, *new_model} - {"preset"}):
        if old_model.get(name) != new_model.get(name):
            return f"another model (model.{name} was {old_model.get(name)}, is {new_model.get(name)})"
    pairs: dict[str, tuple[Any, Any]] = {
        "training.batch_size": (old.training.batch_size, config.training.batch_size),
        "seed": (old.seed, config.seed),
    }
    if isinstance(old, PretrainConfig) and isinstance(config, PretrainConfig):
        pairs["init_from"] = (old.init_from, config.init_from or old.init_from)
    elif isinstance(old, FinetuneConfig) and isinstance(config, FinetuneConfig):
        pairs |= {name: (getattr(old, name), getattr(config, name)) for name in ("model", "pooling")}
    for name, (was, now) in pairs.items():
        if was != now:
            return f"{name} {was}, not {now}"
    return None


def _same_run(record: RunRecord, config: RunConfig, dataset: str) -> bool:
    return record.config == config and record.dataset == dataset
