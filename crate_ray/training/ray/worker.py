"""A Ray Train worker: provides the training loop with what it needs from Ray, and reports errors to the driver."""

from __future__ import annotations

import logging
import uuid
import warnings
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.collective import barrier, broadcast_from_rank_zero

from crate_ray.errors import UserError
from crate_ray.runs.record import RunRecord
from crate_ray.storage.interface import open_storage
from crate_ray.storage.node_folders import process_folder
from crate_ray.training.checkpoints import Peers, WorkerCheckpoints
from crate_ray.training.control import WorkerControl, heartbeat_seconds
from crate_ray.training.loop import TrainingLoop
from crate_ray.training.ray.reporter import RayReporter
from crate_ray.training.task import Task
from crate_ray.training.worker import Worker


def run_worker(payload: dict[str, Any], task_class: type[Task]) -> None:
    """Train this worker's share of a run. Errors that the user can fix go to the driver at once.

    The payload comes from the driver: `config` and `record` as plain data, `total_steps`, the folder `attempt` for the
    checkpoints of this start, and the driver's `mailbox`.
    """
    try:
        _run_worker(payload, task_class)
    except UserError as error:
        ray.get(payload["mailbox"].put.remote(("error", 0, str(error))))
        raise


def _run_worker(payload: dict[str, Any], task_class: type[Task]) -> None:
    config = task_class.config_class.model_validate(payload["config"])
    record = RunRecord.model_validate(payload["record"])
    logging.getLogger().setLevel(logging.WARNING)
    # A token parameter has dimensions of size 1, whose strides have no meaning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

    context = ray.train.get_context()
    rank, world_size, local_rank = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
    group = broadcast_from_rank_zero(uuid.uuid4().hex[:12])
    reporter = RayReporter(payload["mailbox"], rank)
    control = WorkerControl(
        group,
        rank,
        world_size,
        send=reporter.heartbeat,
        stop_requested=reporter.stop_requested,
        heartbeat_seconds=heartbeat_seconds(config.scaling.hang_seconds),
        preemption_seconds=config.scaling.preemption_seconds,
    )
    run = open_storage(config.storage, config.s3).under(config.name)
    with process_folder(f"{group}-{context.get_node_rank()}-{local_rank}") as scratch, control:
        peers = Peers(
            group=group,
            rank=rank,
            world_size=world_size,
            is_first_of_node=local_rank == 0,
            scratch=scratch,
            node_scratch=scratch.with_name(f"{group}-{context.get_node_rank()}-0"),
            barrier=barrier,
            broadcast=broadcast_from_rank_zero,
        )
        device = ray.train.torch.get_device()
        worker = Worker(
            rank=rank,
            world_size=world_size,
            device=device,
            scratch=scratch,
            reporter=reporter,
            control=control,
            checkpoints=WorkerCheckpoints(run, payload["attempt"], record, config.checkpoint, peers, reporter, device),
            preemption_notice=lambda: ray.train.get_preemption_info() is not None,
            run=run,
        )
        TrainingLoop(task_class, config, record, payload["total_steps"], worker).train()
