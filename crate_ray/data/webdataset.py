"""Samples in this project's order, for pipelines built with webdataset.

Shards that `crate-ray prepare` packs are plain WebDataset shards, so stock webdataset opens them too:

    import torch
    import webdataset

    dataset = (
        webdataset.WebDataset(f"{folder}/shard-{{000000..000001}}.tar", shardshuffle=False)
        .decode("rgb8", only=["png", "cls"])
        .to_tuple("png", "cls")
        .batched(10)
    )
    for images, labels in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2):
        train(images, labels)

With `samples`, unlike with stock webdataset, batches do not depend on the number of workers, and a run can resume at an
exact position within an epoch. The same pipeline, on one of several ranks, starting at a step:

    from crate_ray.data.webdataset import samples

    dataset = (
        samples(folder, batch_size=20, rank=rank, world_size=2, first_step=step, steps=6)
        .decode("rgb8", only=["png", "cls"])
        .to_tuple("png", "cls")
        .batched(10)
    )
    for images, labels in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2):
        train(images, labels)
        step += 1

Training itself does not read with webdataset, because webdataset streams whole shards per process. It cannot resume
inside a shard, give all ranks the same number of batches, or keep the order if the number of workers changes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
import webdataset

from crate_ray.config import DataConfig, S3Config
from crate_ray.data.format.samples import Sample
from crate_ray.data.format.tar import DamagedShard
from crate_ray.data.order.dataset_order import Draw
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.plan import plan_order
from crate_ray.data.order.sequence import SampleOrder, worker_slots
from crate_ray.data.read.mixture import MixtureReader, open_mixture
from crate_ray.data.read.resident import ResidentSource
from crate_ray.data.read.shard_reader import Unreadable
from crate_ray.data.read.streamed import StreamedSource

_FOREVER = 2**62
_WINDOWS_AHEAD = 8


def samples(
    train: str | dict[str, float],
    *,
    batch_size: int,
    steps: int | None = None,
    first_step: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    planned_workers: int | None = None,
    handler: Callable[[Exception], bool] = webdataset.reraise_exception,
    s3: S3Config | None = None,
    **data: Any,
) -> webdataset.FluidWrapper:
    """One rank's samples as a webdataset pipeline, in the order of `crate_ray.data.stream`.

    A sample is a dict: `__key__`; `__url__`, the address of its shard; `__step__`; and the bytes of each member by its
    lower-case suffix. The result has webdataset's methods (`.decode()`, `.map()`, `.batched()` …) and is also a first
    stage for `webdataset.DataPipeline`.

    Warning:
        Stock `.decode()` runs code that is stored in `.pkl`, `.pyd` and `.pth` members. For shards that you did not
        write, list the members to decode (`only=["jpg", "cls"]`) or set WDS_SECURE=1 in the environment.

    In a `torch.utils.data.DataLoader`, each of its n worker processes takes every n-th step, so batches of this rank's
    size come out in order. Each process reads and buffers on its own.

    Args:
        train: local folder or s3://bucket/prefix that `crate-ray prepare` has packed or indexed; or several, with their
            shares of every batch: {"s3://data/photos": 3, "s3://data/drawings": 1}.
        batch_size: samples per step over all ranks. Rank w gets slots [w·B/W, (w+1)·B/W) of each step.
        steps: step to stop before. By default the samples never end: one epoch follows another.
        first_step: step to begin with. To resume, pass the last finished step + 1, on any number of ranks.
        seed: seed of the order.
        rank: this rank, from 0.
        world_size: number of ranks.
        planned_workers: number of ranks for which window sizes are planned, by default 1. If the data is larger than
            memory_bytes, the order depends on this number, so do not change it if you resume on other ranks.
        handler: called with a DamagedShard error for a sample that cannot be read. It returns True to skip the sample,
            False to stop, or raises, as webdataset's handlers do.
        s3: object storage.
        data: reading settings of config.DataConfig, such as memory_bytes or cache_dir. Augmentation is up to you.

    Raises:
        UserError: there is no such dataset, or it has fewer samples than a batch.
        pydantic.ValidationError: a setting is unknown or invalid.
    """
    config = DataConfig(train=train, **data)
    mixture = open_mixture(config.train, s3 or S3Config())
    order = plan_order(mixture, config, batch_size=batch_size, seed=seed, workers=planned_workers or 1)
    slots = worker_slots(batch_size, rank, world_size)
    span = range(first_step, _FOREVER if steps is None else steps)
    return webdataset.FluidWrapper(_OrderedSamples(mixture, order, slots, span, config, handler))


class _OrderedSamples(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The first stage of the pipeline. Holds no threads, so it can be sent to DataLoader's processes."""

    def __init__(
        self,
        mixture: Mixture,
        order: SampleOrder,
        slots: tuple[int, int],
        steps: range,
        data: DataConfig,
        handler: Callable[[Exception], bool],
    ) -> None:
        self._mixture, self._order, self._slots, self._steps = mixture, order, slots, steps
        self._data, self._handler = data, handler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        process = torch.utils.data.get_worker_info()
        steps = self._steps if process is None else self._steps[process.id :: process.num_workers]
        is_resident = self._mixture.total_bytes <= self._data.memory_bytes
        kind = ResidentSource if is_resident else StreamedSource
        source = kind(MixtureReader(self._mixture, self._data), self._order, self._slots, self._data)
        windows = 1 if is_resident else _WINDOWS_AHEAD * self._order.steps_per_window
        ahead = self._data.prefetch_batches + windows
        requested = 0
        try:
            for number, step in enumerate(steps):
                while requested < min(number + ahead, len(steps)) and source.request(steps[requested]):
                    requested += 1
                # Do not bind the samples to a name: their memory must be free for the next windows.
                if not (yield from self._dicts(step, *source.take(step))):
                    return
        finally:
            source.close()

    def _dicts(self, step: int, draw: Draw, read: list[Sample | Unreadable]) -> Generator[dict[str, Any], None, bool]:
        """The samples of a step. Returns whether to go on."""
        for number, sample in zip(draw.samples.tolist(), read, strict=True):
            if isinstance(sample, Unreadable):
                if not self._handler(DamagedShard(f"{sample.key}: {sample.error}")):
                    return False
                continue
            members = {suffix: bytes(content) for suffix, content in sample.members.items()}
            yield {"__key__": sample.key, "__url__": self._url(number), "__step__": step, **members}
        return True

    def _url(self, sample: int) -> str:
        dataset, number = self._mixture.locate(sample)
        shards = self._mixture.datasets[dataset]
        return f"{shards.shard_storage.uri}/{shards.shard_name(shards.locate(number)[0])}"
