"""Plans a run before it starts: checks settings against the data and the run's record, fixes data order and steps."""

from __future__ import annotations

import json
import math
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crate_ray.config import CrateMAEConfig, FinetuneConfig, PretrainConfig, ViTMAEConfig
from crate_ray.config.automatic import default_batch_size
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.plan import plan_order
from crate_ray.data.read.mixture import open_mixture
from crate_ray.errors import UserError
from crate_ray.runs.commits import fetch_newest, newest_complete
from crate_ray.runs.record import FinetuneStart, RunRecord, read_record
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.lease import Lease
from crate_ray.storage.node_folders import check_kept

_ORDER_SETTINGS = ("shuffle", "block_samples", "window_blocks", "lanes")

RunConfig = PretrainConfig | FinetuneConfig
_ConfigT = TypeVar("_ConfigT", PretrainConfig, FinetuneConfig)


@dataclass(frozen=True)
class Run:
    """A run that is about to start or to resume."""

    config: RunConfig
    record: RunRecord
    storage: Storage
    """Folder of the run."""
    mixture: Mixture
    """Training data."""
    total_steps: int
    """Step at which the run is finished."""
    first_step: int
    """Step at which the run starts or resumes: that of its newest checkpoint, or 0."""

    @property
    def is_finished(self) -> bool:
        """Whether no step is left."""
        return self.first_step >= self.total_steps


def driver_lease(config: RunConfig) -> Lease:
    """A lease on a run. Only the driver that holds it may write to the run's folder and track the run.

    Enter it before the run is opened, so that no other driver writes in between. Leave it after tracking has ended.
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
    """Check the settings against the data and, if the run exists, against its record. Writes and starts nothing.

    Args:
        config: settings with absolute paths (see `with_absolute_paths`).
        model: the model, or the encoder that is fine-tuned.
        mean_std: mean and standard deviation per channel to use instead of the dataset's.
        finetune: the fine-tuning's part of the record; None for pretraining.

    Raises:
        UserError: the data is missing or does not fit, or the run was started with other data or another model.
    """
    storage = open_storage(config.storage, config.s3).under(config.name)
    check_kept(storage.uri, "storage")
    record = read_record(storage)
    mixture = open_mixture(config.data.train, config.s3)
    config = _with_batch_size(config, mixture, record)
    _check_workers(config)
    _check_channels(config, mixture, model.channels)
    order = plan_order(
        mixture,
        config.data,
        batch_size=config.training.batch_size,
        seed=config.seed,
        workers=config.scaling.min_workers,  # the fewest workers need the largest buffers
    )
    mean, std = _normalisation(config, mixture, model.channels, mean_std or mixture.mean_std)
    newest = newest_complete(storage)
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
            f"run {config.name!r} at {config.storage} was started with {difference}; choose another --name for a new "
            "run, or use the settings of its first start to resume it"
        )
    elif fixed := _without_effect(record, config, mixture, (mean, std)):
        was = ", ".join(f"{name} {_setting(record.config, name)}" for name in fixed)
        raise UserError(
            f"{' and '.join(fixed)} would have no effect: run {config.name!r} at {config.storage} keeps the order and "
            f"the normalisation of its first start ({was}); set the same values to resume it, or choose another --name"
        )
    training = config.training
    total_steps = training.steps or math.ceil((training.epochs or 0) * record.order.batches_per_epoch)
    first_step = newest.step if newest else 0
    if first_step >= total_steps:  # otherwise the workers verify the checkpoint before its model is published
        with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
            newest = fetch_newest(storage, Path(temporary) / "checkpoint")
        first_step = newest.step if newest else 0
    return Run(config, record, storage, mixture, total_steps, first_step)


def with_threads(run: Run, cpus: int) -> RunRecord:
    """The run's record with the number of threads of each worker: that of its first start, or `cpus`.

    Raises:
        UserError: scaling.cpus_per_worker is another number.
    """
    threads = run.record.threads or cpus
    if run.config.scaling.cpus_per_worker not in (None, threads):
        raise UserError(
            f"run {run.config.name!r} was started with {threads} CPUs per worker, and its results depend on that "
            f"number; set scaling.cpus_per_worker {threads}"
        )
    return run.record.model_copy(update={"threads": threads})


def _check_workers(config: RunConfig) -> None:
    batch_size = config.training.batch_size
    mixes = isinstance(config, FinetuneConfig) and config.mixes
    if config.scaling.max_workers > batch_size // (2 if mixes else 1):
        raise UserError(
            f"{config.scaling.max_workers} workers are more than the {batch_size} samples of a batch"
            f"{', which are mixed in pairs' if mixes else ''}; lower scaling.workers or raise training.batch_size"
        )


def _check_channels(config: RunConfig, mixture: Mixture, channels: int) -> None:
    held_out = [load_dataset(open_storage(config.data.validation, config.s3))] if config.data.validation else []
    for dataset in (*mixture.datasets, *held_out):
        manifest = dataset.manifest
        if manifest.kind == "grid" and manifest.channels != channels:
            raise UserError(
                f"the model has {channels} channels, the samples of {dataset.storage.uri} have {manifest.channels}; "
                f"set model.channels {manifest.channels}"
            )
        if manifest.kind == "image" and channels not in (1, 3):
            raise UserError(
                f"the model has {channels} channels, but {dataset.storage.uri} holds images, which are read with 1 or "
                f"3; set model.channels {manifest.channels}, or store other data as .npy grids"
            )


def _normalisation(
    config: RunConfig, mixture: Mixture, channels: int, usual: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for each channel of the model."""
    mean, std = config.data.mean or usual[0], config.data.std or usual[1]
    if len(mean) == len(std) == 1:
        mean, std = mean * channels, std * channels
    elif channels == 1 and mixture.kind == "image" and not config.data.mean:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"data.mean and data.std need {channels} numbers each, one per channel of the model")
    return mean, std


def with_absolute_paths(config: _ConfigT) -> _ConfigT:
    """Make local folders in the settings absolute, because workers have other working directories."""
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


def _with_batch_size(config: RunConfig, mixture: Mixture, record: RunRecord | None) -> RunConfig:
    """Fill in a batch size that fits the data, if the settings have none.

    Raises UserError if they set one that is larger than the data.
    """
    training = config.training
    samples = sum(dataset.manifest.num_samples for dataset in mixture.datasets)
    fitting = default_batch_size(samples, config.scaling.max_workers)
    if "batch_size" not in training.model_fields_set:
        batch_size = record.config.training.batch_size if record else fitting
        return config.model_copy(update={"training": training.model_copy(update={"batch_size": batch_size})})
    if training.batch_size > samples:
        raise UserError(
            f"a batch of {training.batch_size} does not fit the {samples} samples of {mixture.uri}; set "
            f"training.batch_size to at most {samples}, such as {fitting}, or leave it out"
        )
    return config


def _difference(record: RunRecord, config: RunConfig, model: CrateMAEConfig | ViTMAEConfig, dataset: str) -> str | None:
    """How the settings differ from the run's record, for a message. None if the run can be resumed."""
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
        "optim.optimizer": (old.optim.optimizer, config.optim.optimizer),
    }
    if isinstance(old, PretrainConfig) and isinstance(config, PretrainConfig):
        pairs["init_from"] = (old.init_from, config.init_from or old.init_from)
    elif isinstance(old, FinetuneConfig) and isinstance(config, FinetuneConfig):
        pairs |= {name: (getattr(old, name), getattr(config, name)) for name in ("model", "image_size", "pooling")}
        if config.model == "scratch":
            was, now = old.encoder.model_dump(), config.encoder.model_dump()
            pairs |= {f"encoder.{name}": (was.get(name), now.get(name)) for name in {**was, **now}}
    for name, (was, now) in pairs.items():
        if was != now:
            return f"{name} {was}, not {now}"
    return None


def _without_effect(
    record: RunRecord, config: RunConfig, mixture: Mixture, mean_std: tuple[tuple[float, ...], tuple[float, ...]]
) -> list[str]:
    """Names of settings that differ from the first start's, and would have no effect because the record wins."""
    old = record.config
    fixed = [
        name for name, was, now in zip(("mean", "std"), (record.mean, record.std), mean_std, strict=True) if was != now
    ]
    changed = [name for name in _ORDER_SETTINGS if getattr(old.data, name) != getattr(config.data, name)]
    if changed:
        # Its other settings, such as budgets and workers, have effects of their own.
        data = old.data.model_copy(update={name: getattr(config.data, name) for name in changed})
        planned = [
            plan_order(mixture, one, batch_size=old.training.batch_size, seed=old.seed, workers=old.scaling.min_workers)
            for one in (old.data, data)
        ]
        if planned[0] != planned[1]:
            fixed += changed
    return [f"data.{name}" for name in fixed if getattr(old.data, name) != getattr(config.data, name)]


def _setting(config: RunConfig, name: str) -> str:
    value = getattr(config.data, name.removeprefix("data."))
    return json.dumps(value)  # as in YAML


def _same_run(record: RunRecord, config: RunConfig, dataset: str) -> bool:
    return record.config == config and record.dataset == dataset
