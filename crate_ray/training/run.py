"""What the driver does: check everything that can be checked, start or resume the run on Ray Train, follow it."""

from __future__ import annotations

import logging
import math
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from crate_ray.config import PretrainConfig
from crate_ray.data.arrow import arrow_filesystem
from crate_ray.data.lease import Lease
from crate_ray.data.mixture import Mixture, open_mixture
from crate_ray.data.plan import plan_order
from crate_ray.data.shards import load_dataset
from crate_ray.data.storage import Storage, open_storage
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.training.checkpoint import (
    INITIAL_WEIGHTS,
    RunRecord,
    fetch_newest,
    newest_complete,
    read_record,
    write_initial_weights,
    write_record,
)
from crate_ray.training.control import Watchdog
from crate_ray.training.loop import train_loop
from crate_ray.training.signals import Stopped, StopRequest, stop_signals
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
    if config.scaling.max_workers > training.batch_size:
        raise UserError(
            f"{config.scaling.max_workers} workers are more than the {training.batch_size} samples of a batch; "
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
        workers=config.scaling.min_workers,  # whose buffers have to hold most
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
    newest = newest_complete(storage)
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
    first_step = newest.step if newest else 0
    if first_step >= total_steps:  # no worker will look at the checkpoint before its model is published
        with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
            newest = fetch_newest(storage, Path(temporary) / "checkpoint")
        first_step = newest.step if newest else 0
    return Run(config, record, storage, mixture, total_steps, first_step)


def start_from(run: Run, load: Callable[[str], Mapping[str, Tensor]]) -> Run:
    """The run, with the weights of `init_from` stored beside it, where it has not begun yet; else the run as it is.

    `load` gives the weights behind the reference. They are looked up once: a start that is repeated finds what the
    first one stored, wherever an alias points by then. Raises UserError when they do not fit the model.
    """
    config, record = run.config, run.record
    if config.init_from is None or run.first_step:
        return run
    if record.initial_weights and run.storage.exists(INITIAL_WEIGHTS):
        return run
    weights = load(config.init_from)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build_model(config.model).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted({*expected, *given}):
        if expected.get(name) != given.get(name):
            described = f"{name} has the shape {given[name]}" if name in given else f"there is no {name}"
            wanted = f"the run's model has {expected[name]}" if name in expected else "the run's model has none"
            raise UserError(
                f"the weights of init_from {config.init_from} do not fit the model: {described}, {wanted}; "
                "give the model settings that they were trained with, or other weights"
            )
    digest = write_initial_weights(run.storage, {name: tensor.float() for name, tensor in weights.items()})
    record = record.model_copy(update={"initial_weights": digest})
    write_record(run.storage, record)
    return replace(run, record=record)


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
        "init_from": (old.init_from, config.init_from or old.init_from),
    }
    for name, (was, now) in pairs.items():
        if was != now:
            return f"{name} {was}, not {now}"
    return None


def _same_run(record: RunRecord, config: PretrainConfig, dataset: str) -> bool:
    return record.config == config and record.dataset == dataset


def pretrain(run: Run, listeners: Sequence[Listener]) -> None:
    """Train to the last step, on `scaling.workers` Ray Train workers; recovers from up to max_failures failures, and
    from the newest checkpoint when an elastic run gets another number of workers.

    Needs Ray (see ray_cluster.start_ray). Listeners hear of metrics and pictures in this thread. Returns at once when
    the run is already finished. Raises UserError for what a worker found wrong with the user's input.
    """
    if run.is_finished:
        return
    config = run.config
    if config.init_from and not run.first_step and run.record.initial_weights is None:
        raise ValueError("the run is to start from weights that have not been given to it; see start_from")
    resources, use_gpu = _worker_resources(config)
    threads = run.record.threads or int(resources["CPU"])
    if config.scaling.cpus_per_worker not in (None, threads):
        raise UserError(
            f"run {config.name!r} was begun with {threads} CPUs per worker and results depend on it; "
            f"set scaling.cpus_per_worker {threads}"
        )
    with (
        Lease(run.storage, "driver.lease", f"run {config.name!r}", lease_seconds=config.scaling.lease_seconds) as lease,
        stop_signals() as asked,
    ):
        _fit_and_follow(run, listeners, lease, asked, resources, use_gpu=use_gpu, threads=threads)


def _fit_and_follow(
    run: Run,
    listeners: Sequence[Listener],
    lease: Lease,
    asked: StopRequest,
    resources: dict[str, float],
    *,
    use_gpu: bool,
    threads: int,
) -> None:
    """Start Ray Train, deliver what the workers tell, and pass on a wish to stop. Raises as `pretrain` does."""
    config = run.config
    record = run.record.model_copy(update={"threads": threads})
    write_record(run.storage, record)

    # Each start of the driver is an attempt with a Ray Train folder of its own: our commit records, not Ray's snapshot
    # of an earlier driver, say which checkpoint is the newest.
    earlier = [int(i.key.split("/")[0].removeprefix("attempt-")) for i in run.storage.list("attempt-")]
    attempt = f"attempt-{max(earlier, default=0) + 1:03d}"
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
        num_workers=config.scaling.workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=config.scaling.resize_seconds,
    )
    # A task of its own: it leaves the driver's signal handlers alone, ends with the driver, and the address lets Ray
    # Train clean up after that even where several Rays run on one machine.
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit).options(
        scheduling_strategy=here, runtime_env={"env_vars": address}
    )
    done = fit.remote(loop_config, scaling, run.storage.uri, config)
    try:
        watchdog, stopping = Watchdog(config.scaling.hang_seconds), False
        while not ray.wait([done], timeout=_POLL_SECONDS)[0]:
            _deliver(mailbox, listeners, watchdog)
            watchdog.check(time.monotonic())
            lease.check()
            if asked.signal and not stopping:
                stopping = True
                logger.warning("stopping: a checkpoint is saved first (Ctrl-C again to stop at once)")
                mailbox.stop.remote()
        _deliver(mailbox, listeners, watchdog)
        ray.get(done)
        newest = newest_complete(run.storage)
        if asked.signal and (newest is None or newest.step < run.total_steps):
            raise Stopped(asked.signal)
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


def _deliver(mailbox: Any, listeners: Sequence[Listener], watchdog: Watchdog) -> None:
    for kind, step, *rest in ray.get(mailbox.drain.remote()):
        if kind == "alive":
            watchdog.seen(rest[0], time.monotonic())
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
        self._stopping = False

    def stop(self) -> None:
        """Ask the workers to save a checkpoint and return."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether they were asked to."""
        return self._stopping

    def put(self, event: tuple[Any, ...]) -> None:
        """Add an event."""
        self._events.append(event)

    def drain(self) -> list[tuple[Any, ...]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events


def _worker_resources(config: PretrainConfig) -> tuple[dict[str, float], bool]:
    """CPUs and GPUs of each worker, and whether it has a GPU: what is set, or an equal share of the cluster's nodes.

    The share is for as many workers as the cluster has room for now, where their number is a range.
    """
    scaling = config.scaling
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    use_gpu = scaling.gpu if scaling.gpu is not None else gpus >= scaling.min_workers
    cpus = scaling.cpus_per_worker
    if cpus is None:
        counts = [int(node.get("CPU", 0)) for node in nodes]
        most = min(scaling.max_workers, gpus) if use_gpu and gpus >= scaling.min_workers else scaling.max_workers
        workers = min(most, sum(counts))
        if workers < scaling.min_workers:
            raise UserError(
                f"{scaling.min_workers} workers need a CPU each, the cluster has {sum(counts)}; lower scaling.workers, "
                "add nodes, or set scaling.cpus_per_worker where an autoscaler will add them"
            )
        cpus = max(c for c in range(1, max(counts) + 1) if sum(n // c for n in counts) >= workers)
    return ({"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}), use_gpu
