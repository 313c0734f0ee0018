"""Batches of decoded, augmented samples, prepared ahead by threads: the way from a dataset to the training step."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Full, Queue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import DataConfig, ImageModelConfig
from crate_ray.data.decode import DecodeError, decode_grid, decode_image
from crate_ray.data.order import STREAM_CROP, Int64, SampleOrder, uniform, worker_slots
from crate_ray.data.reader import Order, ResidentSource, StreamedSource, Window
from crate_ray.data.shards import Sample, ShardSet
from crate_ray.data.transforms import CROP_UNIFORMS, Crop, centre_crop, crop_resize, crop_resize_grid, random_crop
from crate_ray.errors import UserError

_CHUNK = 16  # samples per decoding task: long enough to hide a task's cost, short enough to share a batch out


@dataclass
class Batch:
    """One worker's part of a global batch."""

    step: int
    """Global step that the batch belongs to."""
    epoch: int
    """Epoch of that step."""
    images: Tensor
    """(n, channels, height, width); uint8 for images, float32 for grids, not normalised."""
    samples: Int64
    """(n,) numbers of the samples in the dataset."""
    keys: list[str]
    """Keys of the samples."""
    labels: Int64 | None
    """(n,) class numbers from the members `cls`; None where not every sample of the dataset has one."""

    def select(self, keep: NDArray[np.bool_]) -> Batch:
        """The samples of the batch where keep, (n,), is true."""
        labels = None if self.labels is None else self.labels[keep]
        keys = [key for key, kept in zip(self.keys, keep, strict=True) if kept]
        return Batch(self.step, self.epoch, self.images[torch.from_numpy(keep)], self.samples[keep], keys, labels)


class SequentialOrder:
    """Every sample exactly once, in the order of the shards: for evaluation. The last batch may be short."""

    def __init__(self, num_samples: int, batch_size: int, block_samples: int) -> None:
        self.num_samples, self.batch_size, self.block_samples = num_samples, batch_size, block_samples

    @property
    def num_steps(self) -> int:
        """Batches of one pass."""
        return -(-self.num_samples // self.batch_size)

    @property
    def steps_per_window(self) -> int:
        """Steps that one block lasts for, at least one."""
        return -(-self.block_samples // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """There is only one pass."""
        return 0

    def samples(self, step: int, start: int, stop: int) -> Int64:
        """Sample numbers of slots [start, stop) of a step, those that exist."""
        first = step * self.batch_size
        return np.arange(min(first + start, self.num_samples), min(first + stop, self.num_samples), dtype=np.int64)

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """One window is one block."""
        numbers = self.samples(step, start, stop)
        if not len(numbers):
            return [(0, 0, step * self.batch_size // self.block_samples)]
        return [(0, 0, r) for r in range(numbers[0] // self.block_samples, numbers[-1] // self.block_samples + 1)]

    def window_blocks_of(self, epoch: int, lane: int, round_: int) -> Int64:
        """The window's single block."""
        return np.array([round_] if round_ * self.block_samples < self.num_samples else [], np.int64)


class Loader:
    """Iterator over one worker's batches of steps start .. stop; threads prepare the next ones meanwhile.

    Use as a context manager, or call close(): threads and buffers are released then.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        slots: tuple[int, int],
        steps: range,
        make_crops: Callable[[int, Int64], Callable[[int, int, int], Crop]],
        model: ImageModelConfig,
        data: DataConfig,
    ) -> None:
        self._shards, self._order, self._slots, self._steps = shards, order, slots, steps
        self._make_crops, self._model = make_crops, model
        resident = shards.manifest.total_bytes <= data.memory_bytes
        source = ResidentSource if resident else StreamedSource
        self._source = source(shards, order, slots, data.fetch_threads)
        self._lookahead = data.prefetch_batches + (1 if resident else order.steps_per_window)
        threads = data.decode_threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._ready: Queue[tuple[Batch, list[Future[None]]] | BaseException | None] = Queue(data.prefetch_batches)
        self._closed = threading.Event()
        self._planner = threading.Thread(target=self._plan, name="plan", daemon=True)
        self._planner.start()

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, parts = item
            for part in parts:
                part.result()
            yield batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        self._source.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self) -> None:
        try:
            requested = self._request(self._steps.start, self._steps.start)
            for step in self._steps:
                numbers, samples = self._source.take(step)
                requested = self._request(requested, step + 1)
                if not self._put(self._start_decoding(step, numbers, samples)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _request(self, first: int, step: int) -> int:
        """Have the source fetch steps from `first` on for a loader that takes `step` next; the first one left out."""
        for ahead in range(first, min(step + self._lookahead, self._steps.stop)):
            if not self._source.request(ahead):
                return ahead
            first = ahead + 1
        return first

    def _put(self, item: tuple[Batch, list[Future[None]]] | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False

    def _start_decoding(self, step: int, numbers: Int64, samples: list[Sample]) -> tuple[Batch, list[Future[None]]]:
        dtype = torch.float32 if self._shards.manifest.kind == "grid" else torch.uint8
        shape = (len(samples), self._model.channels, *self._model.image_hw)
        images = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        epoch = self._order.epoch_of(step)
        crop_of = self._make_crops(epoch, numbers)
        has_labels = self._shards.manifest.num_classes is not None
        batch = Batch(
            step=step,
            epoch=epoch,
            images=images,
            samples=numbers,
            keys=[s.key for s in samples],
            labels=np.array([int(bytes(s.members["cls"])) for s in samples], np.int64) if has_labels else None,
        )
        chunks = [range(i, min(i + _CHUNK, len(samples))) for i in range(0, len(samples), _CHUNK)]
        return batch, [self._pool.submit(self._decode, samples, crop_of, images, chunk) for chunk in chunks]

    def _decode(
        self, samples: list[Sample], crop_of: Callable[[int, int, int], Crop], images: Tensor, chunk: range
    ) -> None:
        manifest, channels = self._shards.manifest, self._model.channels
        for i in chunk:
            try:
                encoded = next(samples[i].members[s] for s in manifest.image_suffixes if s in samples[i].members)
                if manifest.kind == "grid":
                    grid = decode_grid(encoded, channels)
                    crop_resize_grid(grid, crop_of(i, *grid.shape[1:]), images[i])
                else:
                    pixels = decode_image(encoded, channels)
                    crop_resize(pixels, crop_of(i, *pixels.shape[:2]), images[i])
            except (DecodeError, StopIteration) as error:
                cause = str(error) or f"it has no member with a suffix of {list(manifest.image_suffixes)}"
                raise UserError(
                    f"sample {samples[i].key!r} of {self._shards.storage.uri} cannot be used: {cause}; "
                    "remove it and run jobs/prepare.py again"
                ) from error


def training_loader(
    shards: ShardSet,
    order: SampleOrder,
    model: ImageModelConfig,
    data: DataConfig,
    *,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Augmented batches of the run's steps for one worker: slots [rank·B/W, (rank+1)·B/W) of every global batch.

    Works under any launcher: rank and world size are all it needs to know.
    """

    def make_crops(epoch: int, numbers: Int64) -> Callable[[int, int, int], Crop]:
        u: NDArray[np.float64] = uniform(order.seed, STREAM_CROP, epoch, numbers[:, None], np.arange(CROP_UNIFORMS))
        if data.crop_scale == (1, 1):
            return lambda i, h, w: replace(centre_crop(h, w, model.image_hw), flip=data.flip and bool(u[i, -1] < 0.5))
        return lambda i, h, w: random_crop(h, w, u[i], data.crop_scale, data.crop_ratio, data.flip)

    slots = worker_slots(order.batch_size, rank, world_size)
    return Loader(shards, order, slots, steps, make_crops, model, data)


def evaluation_loader(
    shards: ShardSet,
    model: ImageModelConfig,
    data: DataConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Every sample exactly once, centre-cropped and resized; batch t holds samples tB .. (t+1)B, shared by the workers.

    All workers get the same number of batches; a worker's part of the last one may be short or empty.
    """
    order = SequentialOrder(shards.manifest.num_samples, batch_size, block_samples=256)
    slots = worker_slots(batch_size, rank, world_size)

    def make_crops(epoch: int, numbers: Int64) -> Callable[[int, int, int], Crop]:
        return lambda i, h, w: centre_crop(h, w, model.image_hw)

    return Loader(shards, order, slots, range(order.num_steps), make_crops, model, data)
