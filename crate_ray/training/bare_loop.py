"""The training loop with nothing around it: no Ray, no checkpoint, no log.

It is what the Ray Train job is compared with, in time and bit by bit, and what trains where there is torch alone. Under
torchrun:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m crate_ray.training.bare_loop RUN TIMES

The file RUN holds a pretraining run's settings and record, TIMES gets the seconds of each interval of
tracking.log_every steps.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crate_ray.config import FinetuneConfig, PretrainConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.loader import training_loader
from crate_ray.data.order.mixture import open_mixture
from crate_ray.models.exported import Normalizer
from crate_ray.runs.record import RunRecord
from crate_ray.training.parallel import settle
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.step import autocast_dtype, learning_rate, prepare_cpu, train_step
from crate_ray.training.task import Place, Task, assemble


class Trained(NamedTuple):
    """What the loop leaves."""

    weights: dict[str, Tensor]
    """Of the model, after the last step."""
    seconds: list[float]
    """Duration of each whole interval of tracking.log_every steps."""
    held_out: dict[str, float]
    """Metrics over the held-out data after the last step; empty without any."""


def train(
    task_class: type[Task],
    config: PretrainConfig | FinetuneConfig,
    record: RunRecord,
    total_steps: int,
    *,
    weights: Mapping[str, Tensor] | None = None,
    validation: ShardSet | None = None,
    told: Callable[[int, dict[str, float]], None] | None = None,
) -> Trained:
    """Train all steps of a run, as one process of a group where there is one, from other weights where they are given.

    `told` hears loss, images/s, step_seconds and lr of every interval. A record without a number of threads takes all
    cores.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        prepare_cpu()
    torch.set_num_threads(record.threads or len(os.sched_getaffinity(0)))
    autocast = autocast_dtype(config.training.precision, device)
    normalizer = Normalizer.of(record.mean, record.std, device)
    mixture = open_mixture(config.data.train, config.s3)
    place = Place(record, mixture, validation, rank, world_size, device, autocast, normalizer)
    task, trained, optimizer, micro_steps, _ = assemble(task_class, config, place)
    if weights is not None:
        task.model.load_state_dict(weights)
    loader = training_loader(
        mixture,
        record.order,
        task.image_model,
        config.data,
        steps=range(total_steps),
        rank=rank,
        world_size=world_size,
        device=device,
        together=task.together,
    )
    settle(trained, *task.blank(1))
    batch_size, every = config.training.batch_size, config.tracking.log_every
    seconds: list[float] = []
    with loader:
        began = time.perf_counter()
        for step, batch in enumerate(loader):
            images, given = task.inputs(batch)
            lr = learning_rate(step, total_steps, config.optim, batch_size)
            loss_sum, _ = train_step(
                trained,
                optimizer,
                images,
                given,
                batch_size=batch_size,
                world_size=world_size,
                micro_steps=micro_steps,
                lr=lr,
                clip_norm=config.optim.clip_norm,
                autocast=autocast,
            )
            if (step + 1) % every == 0:
                loss = loss_sum.item() / max(1, len(images))  # the device has done these steps
                now = time.perf_counter()
                seconds.append(now - began)
                if told is not None:
                    rates = {"images_per_second": every * batch_size / seconds[-1], "step_seconds": seconds[-1] / every}
                    told(step + 1, {"loss": loss, "lr": lr, **rates})
                began = now
    held_out = task.validate() if validation is not None else {}
    state = {name: tensor.detach().cpu() for name, tensor in task.model.state_dict().items()}
    del trained
    gc.collect()
    return Trained(state, seconds, held_out)


def main(settings: Path, times: Path) -> None:
    """Join the group that torchrun describes, train, and let the first process write its times."""
    given = json.loads(settings.read_text())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config, record = PretrainConfig.model_validate(given["config"]), RunRecord.model_validate(given["record"])
    seconds = train(PretrainTask, config, record, given["total_steps"]).seconds
    if dist.get_rank() == 0:
        times.write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
