"""What the driver does: check everything that can be checked, start or resume the run on Ray Train, follow it."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crate_ray.config import PretrainConfig
from crate_ray.data.arrow import arrow_filesystem
from crate_ray.data.mixture import Mixture, open_mixture
from crate_ray.data.plan import plan_order
from crate_ray.data.shards import load_dataset
from crate_ray.data.storage import Storage, open_storage
from crate_ray.errors import UserError
from crate_ray.training.checkpoint import RunRecord, newest_valid, read_record, write_record
from crate_ray.training.loop import train_loop
from crate_ray.training.telemetry import Listener

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Run:
    """A run that is about to start or to go on."""

    config: PretrainConfig
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


def open_run(config: PretrainConfig) -> Run:
    """Check the settings against the data and, when the run exists, against its record; nothing is started yet.

    Raises UserError when the data is missing or does not fit, or when the run was begun with other data or another
    model.
    """
    training = config.training
    if config.scaling.workers > training.batch_size:
        raise UserError(
            f"{config.scaling.workers} workers are more than the {training.batch_size} samples of a batch; "
            "lower scaling.workers or raise training.batch_size"
        )
    config = _with_absolute_paths(config)
    mixture = open_mixture(config.data.train, config.s3)
    held_out = [load_dataset(open_storage(config.data.validation, config.s3))] if config.data.validation else []
    for dataset in (*mixture.datasets, *held_out):
        other = dataset.manifest
        if (other.kind == "grid" and other.channels != config.model.channels) or config.model.channels not in (1, 3):
            raise UserError(
                f"the model has {config.model.channels} channels, the samples of {dataset.storage.uri} have "
                f"{other.channels}; set model.channels"
            )
    order = plan_order(
        mixture,
        config.data,
        batch_size=training.batch_size,
        seed=config.seed,
        workers=config.scaling.workers,
    )
    mean, std = config.data.mean or mixture.mean_std[0], config.data.std or mixture.mean_std[1]
    channels = config.model.channels
    if len(mean) == len(std) == 1:
        mean, std = mean * channels, std * channels
    elif channels == 1 and mixture.kind == "image" and not config.data.mean:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"data.mean and data.std need {channels} numbers each, one per channel of the model")
    storage = open_storage(config.storage, config.s3).under(config.name)
    newest = next(newest_valid(storage), None)
    record = read_record(storage)
    if record is None or not (newest or _same_run(record, config, mixture.digest)):
        record = RunRecord(
            run_key=uuid.uuid4().hex,
            config=config,
            dataset=mixture.digest,
            order=order,
            kind=mixture.kind,
            mean=mean,
            std=std,
            threads=config.scaling.cpus_per_worker or 0,
        )
    elif difference := _difference(record, config, mixture.digest):
        raise UserError(
            f"run {config.name!r} at {config.storage} was begun with {difference}; "
            "choose another --name for a new run, or the settings it was begun with to resume it"
        )
    total_steps = training.steps or math.ceil((training.epochs or 0) * record.order.batches_per_epoch)
    return Run(config, record, storage, mixture, total_steps, newest[0].step if newest else 0)


def _with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
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


def _difference(record: RunRecord, config: PretrainConfig, dataset: str) -> str | None:
    """What a record disagrees on with the settings of a resumption, for a sentence; None where it can be resumed."""
    old = record.config
    if record.dataset != dataset:
        return f"another dataset ({old.data.train}, digest {record.dataset[:12]}; now {dataset[:12]})"
    old_model, new_model = old.model.model_dump(), config.model.model_dump()
    for name in sorted({*old_model, *new_model} - {"preset"}):
        if old_model.get(name) != new_model.get(name):
            return f"another model (model.{name} was {old_model.get(name)}, is {new_model.get(name)})"
    pairs = {
        "training.batch_size": (old.training.batch_size, config.training.batch_size),
        "seed": (old.seed, config.seed),
    }
    for name, (was, now) in pairs.items():
        if was != now:
            return f"{name} {was}, not {now}"
    return None


def _same_run(record: RunRecord, config: PretrainConfig, dataset: str) -> bool:
    return record.config == config and record.dataset == dataset


def pretrain(run: Run, listeners: Sequence[Listener]) -> None:
    """Train to the last step, on `scaling.workers` Ray Train workers; recovers from up to max_failures failures.

    Needs Ray (see ray_cluster.start_ray). Listeners hear of metrics and pictures in this thread. Returns at once when
    the run is already finished. Raises UserError for what a worker found wrong with the user's input.
    """
    if run.is_finished:
        return
    config = run.config
    resources, use_gpu = _worker_resources(config)
    threads = run.record.threads or int(resources["CPU"])
    if config.scaling.cpus_per_worker not in (None, threads):
        raise UserError(
            f"run {config.name!r} was begun with {threads} CPUs per worker and results depend on it; "
            f"set scaling.cpus_per_worker {threads}"
        )
    record = run.record.model_copy(update={"threads": threads})
    write_record(run.storage, record)

    # Each start of the driver is an attempt with a Ray Train folder of its own: our commit records, not Ray's snapshot
    # of an earlier driver, say which checkpoint is the newest.
    attempt = f"attempt-{len({i.key.split('/')[0] for i in run.storage.list('attempt-')}) + 1:03d}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(_Mailbox).options(scheduling_strategy=here).remote()
    loop_config = {
        "config": config.model_dump(mode="json"),
        "record": record.model_dump(mode="json"),
        "total_steps": run.total_steps,
        "attempt": attempt,
        "mailbox": mailbox,
    }
    scaling = ray.train.ScalingConfig(
        num_workers=config.scaling.workers, use_gpu=use_gpu, resources_per_worker=resources
    )
    # A task of its own: it leaves the driver's signal handlers alone, ends with the driver, and the address lets Ray
    # Train clean up after that even where several Rays run on one machine.
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit).options(
        scheduling_strategy=here, runtime_env={"env_vars": address}
    )
    done = fit.remote(loop_config, scaling, run.storage.uri, config)
    try:
        while not ray.wait([done], timeout=_POLL_SECONDS)[0]:
            _deliver(mailbox, listeners)
        _deliver(mailbox, listeners)
        ray.get(done)
    except BaseException:
        ray.cancel(done, force=True)
        raise


def _fit(loop_config: dict[str, Any], scaling: ray.train.ScalingConfig, uri: str, config: PretrainConfig) -> None:
    filesystem, path = arrow_filesystem(uri, config.s3)
    TorchTrainer(
        train_loop,
        train_loop_config=loop_config,
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=loop_config["attempt"],
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.scaling.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    ).fit()


def _deliver(mailbox: Any, listeners: Sequence[Listener]) -> None:
    for kind, step, *rest in ray.get(mailbox.drain.remote()):
        for listener in listeners:
            if kind == "metrics":
                listener.metrics(step, *rest)
            elif kind == "picture":
                listener.picture(step, *rest)
            elif kind == "bad_samples":
                listener.bad_samples(step, *rest)
        if kind == "error":
            # Ray Train would try again, which would not help.
            raise UserError(*rest)


class _Mailbox:
    """Actor on the driver's node that holds events until the driver asks for them."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, ...]] = []

    def put(self, event: tuple[Any, ...]) -> None:
        """Add an event."""
        self._events.append(event)

    def drain(self) -> list[tuple[Any, ...]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events


def _worker_resources(config: PretrainConfig) -> tuple[dict[str, float], bool]:
    """CPUs and GPUs of each worker, and whether it has a GPU: what is set, or an equal share of the cluster's nodes."""
    workers, scaling = config.scaling.workers, config.scaling
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    use_gpu = scaling.gpu if scaling.gpu is not None else gpus >= workers
    cpus = scaling.cpus_per_worker
    if cpus is None:
        counts = [int(node.get("CPU", 0)) for node in nodes]
        fitting = [c for c in range(1, max(counts, default=0) + 1) if sum(n // c for n in counts) >= workers]
        if not fitting:
            raise UserError(
                f"{workers} workers need a CPU each, the cluster has {sum(counts)}; lower scaling.workers, add nodes, "
                "or set scaling.cpus_per_worker where an autoscaler will add them"
            )
        cpus = max(fitting)
    return ({"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}), use_gpu
