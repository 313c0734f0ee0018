"""The training loop with nothing around it, under torchrun: what the Ray Train job is compared with.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m crate_ray.benchmarks.bare_loop RUN TIMES

The file RUN holds a run's settings and record, TIMES gets the seconds of each interval of tracking.log_every
steps. No checkpoint, no validation, no logging.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray.config import PretrainConfig
from crate_ray.data.loader import training_loader
from crate_ray.data.mixture import open_mixture
from crate_ray.training.checkpoint import RunRecord
from crate_ray.training.parallel import settle
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.step import (
    Normalizer,
    autocast_dtype,
    learning_rate,
    prepare_cpu,
    train_step,
)
from crate_ray.training.task import Place, assemble


def train(config: PretrainConfig, record: RunRecord, total_steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train all steps in one process of a group that exists; seconds of each interval of steps, and the weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        prepare_cpu()
    torch.set_num_threads(record.threads)
    autocast = autocast_dtype(config.training.precision, device)
    normalizer = Normalizer.of(record.mean, record.std, device)
    mixture = open_mixture(config.data.train, config.s3)
    place = Place(record, mixture, None, rank, world_size, device, autocast, normalizer)
    task, trained, optimizer, micro_steps = assemble(PretrainTask, config, place)
    loader = training_loader(
        mixture,
        record.order,
        config.model,
        config.data,
        steps=range(total_steps),
        rank=rank,
        world_size=world_size,
        device=device,
    )
    settle(trained, *task.blank(1))
    seconds: list[float] = []
    with loader:
        began = time.perf_counter()
        for step, batch in enumerate(loader):
            images, given = task.inputs(batch)
            _, norm = train_step(
                trained,
                optimizer,
                images,
                given,
                batch_size=config.training.batch_size,
                world_size=world_size,
                micro_steps=micro_steps,
                lr=learning_rate(step, total_steps, config.optim, config.training.batch_size),
                clip_norm=config.optim.clip_norm,
                autocast=autocast,
            )
            if (step + 1) % config.tracking.log_every == 0:
                norm.item()  # the device has done these steps
                now = time.perf_counter()
                seconds.append(now - began)
                began = now
    weights = task.model.state_dict()
    del trained
    gc.collect()
    return seconds, weights


def main(settings: Path, times: Path) -> None:
    """Join the group that torchrun describes, train, and let the first process write its times."""
    given = json.loads(settings.read_text())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    seconds, _ = train(
        PretrainConfig.model_validate(given["config"]), RunRecord.model_validate(given["record"]), given["total_steps"]
    )
    if dist.get_rank() == 0:
        times.write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
