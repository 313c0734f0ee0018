"""What every Ray Train worker runs: the training loop, from top to bottom."""

from __future__ import annotations

import gc
import logging
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero

from crate_ray.config import PretrainConfig
from crate_ray.data.loader import evaluation_loader, training_loader
from crate_ray.data.mixture import open_mixture
from crate_ray.data.order import worker_slots
from crate_ray.data.shards import ShardSet, load_dataset
from crate_ray.data.storage import open_storage
from crate_ray.errors import UserError
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.training.checkpoint import RunRecord
from crate_ray.training.control import WorkerControl
from crate_ray.training.local_space import local_space
from crate_ray.training.parallel import is_sharded, micro_steps_of, parallelize, settle
from crate_ray.training.step import (
    Normalizer,
    autocast_dtype,
    build_optimizer,
    compile_layers,
    learning_rate,
    mask_noise,
    num_micro_steps,
    prepare_cpu,
    probe_noise,
    should_compile,
    train_step,
)
from crate_ray.training.telemetry import KEYS_DIGEST_RANGE, Stopwatch, keys_digest, reconstruction_picture
from crate_ray.training.worker_checkpoints import WorkerCheckpoints

logger = logging.getLogger(__name__)
_PICTURE_SAMPLES = 8


def train_loop(payload: dict[str, Any]) -> None:
    """`train`, with errors that the user can mend told to the driver at once."""
    try:
        train(payload)
    except UserError as error:
        ray.get(payload["mailbox"].put.remote(("error", 0, str(error))))
        raise


def train(payload: dict[str, Any]) -> None:
    """`_train` with temporary folders on the node's disk, of this worker and of the first one on its node."""
    context = ray.train.get_context()
    start = broadcast_from_rank_zero(uuid.uuid4().hex[:12])
    names = [f"{start}-{context.get_node_rank()}-{local_rank}" for local_rank in (context.get_local_rank(), 0)]
    with local_space(names[0]) as own:
        _train(payload, own, own.with_name(names[1]))


def _train(payload: dict[str, Any], space: Path, node_space: Path) -> None:
    """Train one worker's share of a run, from its newest committed checkpoint to its last step.

    The payload holds the config and the run's record as plain data, the number of steps, the folder for this attempt's
    checkpoints, and the driver's mailbox.
    """
    config = PretrainConfig.model_validate(payload["config"])
    record = RunRecord.model_validate(payload["record"])
    total_steps: int = payload["total_steps"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        prepare_cpu()
    torch.set_num_threads(record.threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells of every report
    # A token parameter has dimensions of size 1, whose strides mean nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

    run = open_storage(config.storage, config.s3).under(config.name)
    mixture = open_mixture(config.data.train, config.s3)
    validation = load_dataset(open_storage(config.data.validation, config.s3)) if config.data.validation else None
    if mixture.digest != record.dataset:
        raise UserError(f"the dataset at {mixture.uri} changed while the run was starting; start it again")

    torch.manual_seed(config.seed)
    autocast = autocast_dtype(config.training.precision, device)
    model: MaskedAutoencoder = build_model(config.model).to(device)
    model.checkpoint_layers = config.training.activation_checkpointing
    if should_compile(config.training.compile, device):
        local = -(-config.training.batch_size // world_size)
        compile_layers(model, -(-local // num_micro_steps(config.training, world_size)), device, autocast)
    trained = parallelize(model, config.scaling.strategy, world_size=world_size, device=device, autocast=autocast)
    optimizer = build_optimizer(model, config.optim)
    reporter = _Reporter(payload["mailbox"] if rank == 0 else None)
    checkpoints = WorkerCheckpoints(
        run, payload["attempt"], record, config.checkpoint, (space, node_space), reporter.checkpoint
    )
    step = checkpoints.restore(model, optimizer)

    normalizer = Normalizer.of(record.mean, record.std, device)
    micro_steps = micro_steps_of(config.training, model, world_size)
    num_patches = config.model.num_patches
    validate_every = config.training.validate_every or total_steps
    picture_every = config.tracking.picture_every
    makes_pictures = rank == 0 or is_sharded(model)
    if makes_pictures and picture_every:
        probe = _probe_batch(validation or mixture.datasets[0], config)
        if step == 0:
            reporter.picture(step, probe, model, normalizer, num_patches)

    loader = training_loader(
        mixture,
        record.order,
        config.model,
        config.data,
        steps=range(step, total_steps),
        rank=rank,
        world_size=world_size,
        device=device,
    )
    first_slot, _ = worker_slots(config.training.batch_size, rank, world_size)
    mailbox = payload["mailbox"]
    control = WorkerControl(
        rank,
        world_size,
        show=lambda sign: mailbox.put.remote(("alive", sign.step, sign)),
        asked_to_stop=lambda: ray.get(mailbox.is_stopping.remote()),
        beat_seconds=min(10.0, config.scaling.hang_seconds / 6),
        look_seconds=config.scaling.preemption_seconds,
    )
    with loader, control:
        if step < total_steps:
            size = (config.model.channels, *config.model.image_hw)
            settle(trained, torch.zeros(1, *size, device=device), torch.zeros(1, num_patches, device=device))
        watch, batches = Stopwatch(), iter(loader)
        loss_sum, steps_since_log = torch.zeros((), device=device), 0
        told: set[str] = set()
        saved, rescued = step, False
        while step < total_steps:
            agreed = control.agree(step)
            if agreed.stop or (agreed.look and not rescued and ray.train.get_preemption_info()):
                # Before a node is taken away, go on training: Ray Train starts again when it is gone.
                rescued = True
                if step > saved:
                    with control.phase("checkpoint"):
                        checkpoints.save(step, model, optimizer, None)
                    saved = step
                if agreed.stop:
                    break
            began = watch.wait_began()
            with control.phase("data"):
                batch = next(batches)
            watch.wait_ended(began)

            images = normalizer(batch.images)
            noise = mask_noise(record.order.seed, batch.epochs, batch.samples, num_patches).to(device)
            lr = learning_rate(step, total_steps, config.optim, config.training.batch_size)
            part_sum, gradient_norm = train_step(
                trained,
                optimizer,
                images,
                noise,
                batch_size=config.training.batch_size,
                world_size=world_size,
                micro_steps=micro_steps,
                lr=lr,
                clip_norm=config.optim.clip_norm,
                autocast=autocast,
            )
            loss_sum += part_sum
            step, steps_since_log = step + 1, steps_since_log + 1

            if step % config.tracking.log_every == 0 or step == total_steps:
                digest = torch.tensor(keys_digest(batch.keys, first_slot), device=device)
                if world_size > 1:
                    dist.all_reduce(loss_sum)
                    dist.all_reduce(digest)
                loss = loss_sum.item() / (steps_since_log * config.training.batch_size)
                if not torch.isfinite(loss_sum):
                    raise UserError(
                        f"the loss is not finite near step {step}; lower optim.lr, or start from an earlier checkpoint"
                    )
                rates = watch.lap(steps_since_log, config.training.batch_size)
                epoch = step / record.order.batches_per_epoch
                values = {"loss": loss, "lr": lr, "gradient_norm": gradient_norm.item(), "epoch": epoch, **rates}
                values["batch_digest"] = float(digest.item() % KEYS_DIGEST_RANGE)
                reporter.metrics(step, values)
                loss_sum, steps_since_log = torch.zeros((), device=device), 0
                if new := {key: cause for key, cause in list(loader.bad.causes.items()) if key not in told}:
                    told |= new.keys()
                    payload["mailbox"].put.remote(("bad_samples", step, new))
            saves = step % config.checkpoint.every_steps == 0 or step == total_steps
            validates = step % validate_every == 0 or step == total_steps or (saves and config.checkpoint.keep_best)
            held_out = None
            if validation and validates:
                held_out = validation_loss(model, validation, config, normalizer, autocast, rank, world_size)
                reporter.metrics(step, {"validation_loss": held_out})
            if makes_pictures and picture_every and (step % picture_every == 0 or step == total_steps):
                reporter.picture(step, probe, model, normalizer, num_patches)
            if saves:
                began = time.perf_counter()
                with control.phase("checkpoint"):
                    checkpoints.save(step, model, optimizer, held_out)
                saved = step
                reporter.metrics(step, {"checkpoint_blocking_seconds": time.perf_counter() - began})
        control.finish()

    checkpoints.finish()
    reporter.flush()
    if world_size > 1:
        # Without this gloo can deadlock when the process group is destroyed.
        del trained
        gc.collect()


@torch.no_grad()
def validation_loss(
    model: MaskedAutoencoder,
    validation: ShardSet,
    config: PretrainConfig,
    normalizer: Normalizer,
    autocast: torch.dtype | None,
    rank: int = 0,
    world_size: int = 1,
) -> float:
    """Mean masked loss over every usable held-out sample exactly once, each with one fixed mask. A collective call."""
    device = normalizer.mean.device
    batch_size = min(config.training.micro_batch_size or config.training.batch_size, 256) * world_size
    total = torch.zeros(2, device=device, dtype=torch.float64)  # sum of losses, number of samples
    nothing = torch.zeros(1, config.model.channels, *config.model.image_hw, device=device)
    model.eval()
    with evaluation_loader(
        validation, config.model, config.data, batch_size=batch_size, rank=rank, world_size=world_size, device=device
    ) as loader:
        for batch in loader:
            if not len(batch.samples) and not is_sharded(model):
                continue
            noise = probe_noise(batch.samples, config.model.num_patches).to(device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                if not len(batch.samples):
                    model(nothing, noise.new_zeros(1, config.model.num_patches))  # the other workers wait for it
                    continue
                output = model(normalizer(batch.images), noise)
            total[0] += output.sample_loss.double().sum()
            total[1] += len(batch.samples)
    model.train()
    if world_size > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


class _Reporter:
    """Sends what rank 0 measured to the driver, without waiting for it; other ranks send nothing."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last = mailbox, None

    def flush(self) -> None:
        """Wait until the driver's mailbox has everything."""
        if self._last is not None:
            ray.get(self._last)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Send measured values."""
        if self._mailbox is not None:
            self._last = self._mailbox.put.remote(("metrics", step, values, int(time.time() * 1000)))

    def checkpoint(self, step: int, seconds: float) -> None:
        """Send, from the thread that uploads, how long that took, and wait until it has arrived."""
        if self._mailbox is not None:
            values = {"checkpoint_background_seconds": seconds}
            ray.get(self._mailbox.put.remote(("metrics", step, values, int(time.time() * 1000))))

    def picture(
        self,
        step: int,
        probe: tuple[torch.Tensor, torch.Tensor, tuple[float, float]],
        model: MaskedAutoencoder,
        normalizer: Normalizer,
        num_patches: int,
    ) -> None:
        """Send the reconstruction of the probe batch. A collective call where the model is sharded."""
        images, noise, value_range = probe
        device = normalizer.mean.device
        png = reconstruction_picture(model, normalizer, images.to(device), noise.to(device), value_range)
        if self._mailbox is not None:
            self._last = self._mailbox.put.remote(("picture", step, "reconstruction", png))


def _probe_batch(shards: ShardSet, config: PretrainConfig) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """The first samples of a dataset with their fixed masks, and the values that black and white stand for."""
    data = config.data.model_copy(update={"memory_bytes": 1})  # a few samples: read their block, not the dataset
    with evaluation_loader(shards, config.model, data, batch_size=_PICTURE_SAMPLES) as loader:
        batch = next(iter(loader))
    images = batch.images
    is_grid = shards.manifest.kind == "grid"
    value_range = (images.min().item(), images.max().item()) if is_grid else (0.0, 1.0)
    return images, probe_noise(batch.samples, config.model.num_patches), value_range
