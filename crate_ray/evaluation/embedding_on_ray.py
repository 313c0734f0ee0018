"""Embeds the parts of a dataset on Ray: one actor per encoder, and another one for each that is lost."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import ray
import ray.exceptions

from crate_ray.config import EmbedConfig, S3Config
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding_output import EmbeddingRecord
from crate_ray.evaluation.embedding_parts import PartWriter, Progress, rebuild
from crate_ray.evaluation.features import compute_device
from crate_ray.models.exported import ModelDescription
from crate_ray.progress import CountDisplay
from crate_ray.ray_cluster import task_cpus
from crate_ray.storage.interface import Storage, open_storage

_ATTEMPTS = 4
"""How often a part is tried if its encoder is lost each time."""
_REPORTS = 50
"""Reports of progress per part."""


class _Job(NamedTuple):
    """Data that all encoders share."""

    data: str
    output: str
    s3: S3Config
    record: EmbeddingRecord
    description_json: str
    batch_size: int
    max_bad_fraction: float
    gpu: bool
    """Whether encoders have a GPU. Ray does not hide the node's GPUs from actors that asked for none."""


class _Failure(NamedTuple):
    """Why a part cannot be written."""

    message: str


class _Encoder:
    """Actor that embeds parts."""

    def __init__(self, job: _Job, weights: bytes) -> None:
        self._job, self._weights = job, weights

    @cached_property
    def _writer(self) -> PartWriter:
        job = self._job
        description = ModelDescription.model_validate_json(job.description_json)
        return PartWriter(
            load_dataset(open_storage(job.data, job.s3)),
            open_storage(job.output, job.s3),
            job.record,
            rebuild(description, self._weights),
            description,
            compute_device(job.gpu),
            batch_size=job.batch_size,
            max_bad_fraction=job.max_bad_fraction,
        )

    def write(self, samples: range) -> Iterator[Progress | _Failure]:
        """Embed a part. Yields some of PartWriter.write's results, and the last, or why there is none."""
        every = max(1, len(samples) // self._job.batch_size // _REPORTS)
        try:
            for number, progress in enumerate(self._writer.write(samples), 1):
                if progress.report is not None or number % every == 0:
                    yield progress
        except UserError as error:  # raised again by the driver; Ray would wrap it in a page of text
            yield _Failure(str(error))


class _Running(NamedTuple):
    """A part that an encoder works on."""

    encoder: Any
    samples: range


def write_parts(
    config: EmbedConfig,
    shards: ShardSet,
    output: Storage,
    record: EmbeddingRecord,
    description: ModelDescription,
    weights: bytes,
    parts: Sequence[range],
    workers: int,
    gpu: bool,
    display: CountDisplay,
) -> Iterator[tuple[range, Progress]]:
    """Write parts with several encoders. Yields the progress of each, in the order of time.

    A part whose encoder is lost is given to another one.

    Raises UserError if an encoder raises it, or if a part is tried too often.
    """
    job = _Job(
        data=shards.storage.uri,  # absolute, unlike the settings
        output=output.uri,
        s3=config.s3,
        record=record,
        description_json=description.model_dump_json(),
        batch_size=config.batch_size,
        max_bad_fraction=config.max_bad_fraction,
        gpu=gpu,
    )
    shared = ray.put(weights)
    encoder = ray.remote(num_cpus=task_cpus(workers, gpu), num_gpus=1 if gpu else 0, max_restarts=0)(_Encoder)
    waiting, lost = deque(parts), Counter[int]()
    running: dict[Any, _Running] = {}

    def start(actor: Any) -> None:
        samples = waiting.popleft()
        running[actor.write.options(num_returns="streaming").remote(samples)] = _Running(actor, samples)

    try:
        for _ in range(min(workers, len(waiting))):
            start(encoder.remote(job, shared))
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            work = running[ready[0]]
            try:
                progress: Progress | _Failure = ray.get(next(ready[0]))
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                del running[ready[0]]
                lost[work.samples.start] += 1
                cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                if lost[work.samples.start] == _ATTEMPTS:
                    raise UserError(
                        f"Ray lost the encoder of samples {work.samples.start:,} to {work.samples.stop:,} {_ATTEMPTS} "
                        f"times ({cause}); give encoders more memory, for example by fewer --workers, and start again"
                    ) from error
                display.say(f"an encoder was lost ({cause}); another one does its part")
                waiting.appendleft(work.samples)
                yield work.samples, Progress(0, 0)
                start(encoder.remote(job, shared))
                continue
            if isinstance(progress, _Failure):
                raise UserError(progress.message)
            yield work.samples, progress
            if progress.report is not None:
                del running[ready[0]]
                if waiting:
                    start(work.encoder)
    finally:
        for work in running.values():
            ray.kill(work.encoder)
