"""The training loop, from top to bottom: what every Ray Train worker of every kind of run does."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.loader import BAD_CAUSES, training_loader
from crate_ray.data.order.mixture import open_mixture
from crate_ray.data.order.sequence import worker_slots
from crate_ray.errors import UserError
from crate_ray.models.exported import Normalizer
from crate_ray.models.flops import gpu_peak_flops
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import open_storage
from crate_ray.training.control import WorkerControl
from crate_ray.training.guard import Guard
from crate_ray.training.parallel import is_sharded, settle
from crate_ray.training.probe_batch import Look
from crate_ray.training.profiling import StepProfile
from crate_ray.training.ray.checkpoints import WorkerCheckpoints
from crate_ray.training.ray.worker import Reporter, judged, notes
from crate_ray.training.step import autocast_dtype, learning_rate, prepare_cpu, train_step
from crate_ray.training.task import Place, Task, assemble
from crate_ray.training.telemetry import KEYS_DIGEST_RANGE, StepLog, Stopwatch, keys_digest, used_memory


def train(
    task_class: type[Task], payload: dict[str, Any], control: WorkerControl, space: Path, node_space: Path
) -> None:
    """Train one worker's share of a run, from its newest committed checkpoint to its last step.

    The payload is the driver's: `config` and `record` as plain data, `total_steps`, the folder `attempt` of this
    start's checkpoints, and its `mailbox`. The control is this worker's, entered. The folders are local, of this worker
    and of the first one on its node.
    """
    config = task_class.config_class.model_validate(payload["config"])
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

    autocast = autocast_dtype(config.training.precision, device)
    normalizer = Normalizer.of(record.mean, record.std, device)
    place = Place(record, mixture, validation, rank, world_size, device, autocast, normalizer)
    task, trained, optimizer, micro_steps, arithmetic = assemble(task_class, config, place)
    model = task.model
    reporter = Reporter(payload["mailbox"], rank)
    checkpoints = WorkerCheckpoints(
        run,
        payload["attempt"],
        record,
        arithmetic,
        config.checkpoint,
        (space, node_space),
        reporter.flush,
        reporter.wait_until_recorded,
        reporter.checkpoint,
    )
    step = checkpoints.restore(model, optimizer)

    peak_flops = gpu_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    validate_every = config.training.validate_every or total_steps
    look_every = task.look_every if rank == 0 or is_sharded(model) else None
    if look_every and step == 0:
        _show(reporter, step, task.look(step))

    loader = training_loader(
        mixture,
        record.order,
        task.image_model,
        config.data,
        steps=range(step, total_steps),
        rank=rank,
        world_size=world_size,
        device=device,
        together=task.together,
    )
    first_slot, _ = worker_slots(config.training.batch_size, rank, world_size, task.together)
    profile = StepProfile(config.training.profile_steps, rank, run, space)
    told: dict[str, set[str]] = {"training": set(), "validation": set()}
    bad_held_out: dict[str, str] = {}

    def tell_bad(split: str, causes: dict[str, str]) -> None:
        if new := {key: cause for key, cause in list(causes.items()) if key not in told[split]}:
            told[split].update(new)
            reporter.bad_samples(step, new, split)

    def tell_bad_samples() -> None:
        tell_bad("training", loader.bad.causes)
        tell_bad("validation", bad_held_out)

    if rank == 0 and step == 0:
        for dataset in mixture.datasets:
            tell_bad("training", dataset.manifest.left_out)
        if validation:
            tell_bad("validation", validation.manifest.left_out)

    with loader, profile, ExitStack() as at_the_end:
        at_the_end.callback(tell_bad_samples)  # too many of them are why a run stops
        if step < total_steps:
            settle(trained, *task.blank(1))
        watch, batches = Stopwatch(device), iter(loader)
        step_log, guard = StepLog(config.tracking.log_every, device), Guard(config.training.max_skipped_steps)
        logged = step
        saved, rescued = step, False
        while step < total_steps:
            agreed = control.agree(step)
            if agreed.stop or (agreed.look and not rescued and ray.train.get_preemption_info()):
                # Before a node is taken away, go on training: Ray Train starts again when it is gone.
                rescued = True
                if step > saved:
                    tell_bad_samples()  # who goes on from there does not meet them again
                    with control.phase("checkpoint"):
                        checkpoints.save(step, model, optimizer, None)
                    saved = step
                if agreed.stop:
                    break
            if rank == 0:
                profile.before(step + 1)
            with watch.waiting(), control.phase("data"):
                batch = next(batches)

            images, given = task.inputs(batch)
            lr = learning_rate(step, total_steps, config.optim, config.training.batch_size)
            part_sum, gradient_norm = train_step(
                trained,
                optimizer,
                images,
                given,
                batch_size=config.training.batch_size,
                world_size=world_size,
                micro_steps=micro_steps,
                lr=lr,
                clip_norm=config.optim.clip_norm,
                autocast=autocast,
            )
            step_log.add(part_sum, gradient_norm)
            step += 1
            if written := profile.after(step):
                reporter.note(step, f"a profile was written to {written}; open it in Perfetto or chrome://tracing")

            if step % config.tracking.log_every == 0 or step == total_steps:
                with watch.logging():
                    sums = torch.tensor([keys_digest(batch.keys, first_slot), *loader.bad.take_counts()], device=device)
                    if world_size > 1:
                        dist.all_reduce(sums)
                    digest, *bad = sums.tolist()
                    losses, norms = step_log.take(config.training.batch_size, world_size)
                    judgement = guard.judge(logged + 1, losses, norms)
                    rates = watch.lap(step - logged, config.training.batch_size)
                    logged = step
                    epoch = step / record.order.batches_per_epoch
                    values = {"lr": lr, "epoch": epoch, **judged(judgement), **rates, **used_memory(device)}
                    values["batch_digest"] = float(digest % KEYS_DIGEST_RANGE)
                    times = zip(BAD_CAUSES, bad, strict=True)
                    values |= {f"bad_samples/{cause}": float(count) for cause, count in times if count}
                    if peak_flops and task.flops_per_image:
                        values["mfu"] = task.flops_per_image * rates["images_per_second"] / (peak_flops * world_size)
                    reporter.metrics(step, values)
                    for text in notes(judgement):
                        reporter.note(step, text)
                    tell_bad_samples()
            saves = step % config.checkpoint.every_steps == 0 or step == total_steps
            validates = step % validate_every == 0 or step == total_steps or (saves and config.checkpoint.keep_best)
            held_out: dict[str, float] = {}
            if validation and validates:
                with control.phase("validation"):
                    held_out = task.validate(bad_held_out)
                reporter.metrics(step, held_out)
            if look_every and (step % look_every == 0 or step == total_steps):
                _show(reporter, step, task.look(step))
            if saves:
                tell_bad_samples()
                began = time.perf_counter()
                with control.phase("checkpoint"):
                    checkpoints.save(step, model, optimizer, held_out.get("validation_loss"))
                saved = step
                reporter.metrics(step, {"checkpoint_blocking_seconds": time.perf_counter() - began})
        control.finish()

    checkpoints.finish()
    reporter.flush()
    if world_size > 1:
        # Without this gloo can deadlock when the process group is destroyed.
        del trained
        gc.collect()


def _show(reporter: Reporter, step: int, look: Look | None) -> None:
    if look is not None:
        reporter.metrics(step, look.metrics)
        for name, png in look.pictures.items():
            reporter.picture(step, name, png)
