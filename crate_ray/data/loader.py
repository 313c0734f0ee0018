"""Batches of decoded, augmented samples, prepared ahead of use by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.config import DataConfig, ImageModelConfig
from crate_ray.data.batch import Batch, BatchDecoder, PendingBatch, Replacements
from crate_ray.data.decode.transforms import CropRule, Crops, centre_crops, random_crops, random_flips
from crate_ray.data.device import DeviceFeed
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.order.dataset_order import Draw
from crate_ray.data.order.hashing import STREAM_CROP, STREAM_REPLACEMENT, Int64, hash64, uniform
from crate_ray.data.order.interface import Order
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.sequence import SampleOrder, worker_slots
from crate_ray.data.order.sequential import SequentialOrder, stride_of
from crate_ray.data.read.bad_samples import BadSampleCounter
from crate_ray.data.read.mixture import MixtureReader
from crate_ray.data.read.resident import ResidentSource
from crate_ray.data.read.streamed import StreamedSource
from crate_ray.errors import UserError

_WINDOWS_AHEAD = 8  # limits only the planning; buffer_bytes limits the bytes that are read ahead
_CPU = torch.device("cpu")
_REPLACEMENTS_TRIED = 64
_CLOSING_SECONDS = 1.0  # do not wait longer, because a storage that does not answer can block the planning thread


class LoaderState(TypedDict):
    """Position of a loader as plain data, for any kind of checkpoint."""

    step: int
    """The next step."""
    dataset: str
    """Digest of the dataset."""
    order: dict[str, object]
    """Everything that the order of the samples depends on: seed, batch size, blocks."""


class Loader:
    """Iterates over one worker's part of every batch. Threads fetch and decode ahead.

    Close it, or use it in a `with` statement. Iterating continues where the last iteration stopped; `state_dict` is the
    position after the last batch that was returned.
    """

    def __init__(
        self,
        mixture: Mixture,
        order: Order,
        slots: tuple[int, int],
        steps: range,
        make_crops: Callable[[Draw], CropRule],
        model: ImageModelConfig,
        data: DataConfig,
        device: torch.device,
        replacements: Replacements | None = None,
        causes: dict[str, str] | None = None,
    ) -> None:
        """Start the threads.

        Args:
            mixture: the datasets.
            order: which samples the slots of a step hold.
            slots: the half-open range of the global batch's slots that this worker computes.
            steps: the steps to iterate over.
            make_crops: crop rule of drawn samples.
            model: image size and channels.
            data: budgets and threads.
            device: where to put batches.
            replacements: sample numbers to try instead of a bad sample; if None, bad samples are left out of their
                batch.
            causes: filled with the cause of each bad sample, by key.
        """
        self._mixture, self._order, self._slots, self._stop, self._data = mixture, order, slots, steps.stop, data
        self._reader = MixtureReader(mixture, data)
        self._feed = DeviceFeed(device)
        self.bad = BadSampleCounter(data.max_bad_fraction, mixture.uri, causes)
        """The bad samples so far."""
        self._decoder = BatchDecoder(
            mixture, self._reader, model, data, self._feed, slots, make_crops, replacements, self.bad
        )
        self._start_threads(steps.start)

    def _start_threads(self, step: int) -> None:
        self._step = step
        resident = self._mixture.total_bytes <= self._data.memory_bytes
        source = ResidentSource if resident else StreamedSource
        self._source = source(self._reader, self._order, self._slots, self._data)
        windows = 1 if resident else _WINDOWS_AHEAD * self._order.steps_per_window
        self._lookahead = self._data.prefetch_batches + windows
        self._pool = ThreadPoolExecutor(self._decoder.num_threads, "decode")
        self._ready: Queue[PendingBatch | BaseException | None] = Queue(self._data.prefetch_batches)
        self._closed = threading.Event()
        self._planner = threading.Thread(
            target=self._plan, args=(self._source, self._pool, self._ready, self._closed), name="plan", daemon=True
        )
        self._planner.start()

    def __iter__(self) -> Iterator[Batch]:
        while self._step < self._stop:
            if self._closed.is_set():
                raise RuntimeError("this loader is closed")
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                self.close()
                raise item
            batch = item.finish(self._feed)
            self._step = batch.step + 1
            if self._feed.copies_ahead:
                self._send_next()
            yield batch

    def _send_next(self) -> None:
        """If the next batch is ready, start its copy to the device, so that it overlaps the caller's step."""
        with self._ready.mutex:
            item = self._ready.queue[0] if self._ready.queue else None
        if isinstance(item, PendingBatch) and item.is_ready:
            item.send(self._feed)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def source_name(self, sample: int) -> str | None:
        """Name of a sample in the source that it was packed from; see `ShardReader.source_name`."""
        return self._reader.source_name(sample)

    def state_dict(self) -> LoaderState:
        """Position after the last batch that was returned. It does not depend on the number of workers."""
        return {"step": self._step, "dataset": self._mixture.digest, "order": self._order.describe()}

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue at a position from `state_dict`, of a loader on any worker of any number of workers.

        Raises UserError if the position belongs to another dataset, or to another order of the samples.
        """
        if state["dataset"] != self._mixture.digest:
            raise UserError(
                f"the saved position belongs to another dataset than {self._mixture.uri} "
                f"(digest {state['dataset'][:12]}); open the dataset it was saved with"
            )
        if differences := _differences(state["order"], self._order.describe()):
            raise UserError(
                f"the saved position belongs to another order of {self._mixture.uri}, which would repeat or lose "
                f"samples: {', '.join(differences)}; use the settings that it was saved with (blocks, windows and "
                "lanes are derived from memory_bytes, buffer_bytes and planned_workers unless they are set)"
            )
        self.close()
        self._start_threads(state["step"])

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        self._source.close()
        with suppress(Empty):  # make room for the item that the planning thread may be about to put
            while True:
                self._ready.get_nowait()
        # If a thread is inside torch when the interpreter exits, the process aborts.
        self._planner.join(_CLOSING_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _plan(
        self,
        source: ResidentSource | StreamedSource,
        pool: ThreadPoolExecutor,
        ready: Queue[PendingBatch | BaseException | None],
        closed: threading.Event,
    ) -> None:
        """In a thread: request samples ahead, and give batches to the decode threads in order."""

        def put(item: PendingBatch | BaseException | None) -> bool:
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return True
                except Full:
                    continue
            return False

        def request(first: int, step: int) -> int:
            """Request steps from `first` on. `step` is the next one to take. Returns the first step not requested."""
            for ahead in range(max(first, step), min(step + self._lookahead, self._stop)):
                if not source.request(ahead):
                    return ahead
                first = ahead + 1
            return first

        try:
            requested = request(self._step, self._step)
            for step in range(self._step, self._stop):
                # Do not bind the samples to a name, so that their bytes are freed as soon as they are decoded.
                pending = self._decoder.start(pool, step, *source.take(step))
                requested = request(requested, step + 1)
                if not put(pending):
                    return
            put(None)
        except BaseException as error:
            put(error)


def _differences(saved: object, here: object, name: str = "") -> list[str]:
    """Describe the differences between two pieces of plain data, by name."""
    if isinstance(saved, dict) and isinstance(here, dict):
        pairs = [(f"{name}.{key}".lstrip("."), saved.get(key), here.get(key)) for key in {**saved, **here}]
    elif isinstance(saved, list | tuple) and isinstance(here, list) and len(saved) == len(here):
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(saved, here, strict=True))]
    else:
        return [] if saved == here else [f"{name} was {saved} and is {here}"]
    return [difference for key, before, now in pairs for difference in _differences(before, now, key)]


def training_loader(
    mixture: Mixture,
    order: SampleOrder,
    model: ImageModelConfig,
    data: DataConfig,
    *,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = _CPU,
    together: int = 1,
) -> Loader:
    """Augmented batches for one worker: slots [rank·B/W, (rank+1)·B/W) of every global batch.

    Works with any launcher, because it needs only rank and world size.

    Args:
        mixture, order: the datasets and the order of their samples.
        model: image size and channels.
        data: augmentation, budgets and threads.
        steps: the run's steps to iterate over.
        rank, world_size: this worker, and the number of workers.
        device: where to put batches.
        together: each group of this many adjacent slots stays on one worker, for example pairs for mixup.
    """
    seed = order.seed

    def make_crops(draw: Draw) -> CropRule:
        def uniforms(rows: slice | Int64, columns: Int64) -> NDArray[np.float64]:
            return uniform(seed, STREAM_CROP, draw.epochs[rows, None], draw.samples[rows, None], columns)

        def centre(heights: Int64, widths: Int64) -> Crops:
            return centre_crops(heights, widths, model.image_hw)._replace(flip=data.flip & random_flips(uniforms))

        def anywhere(heights: Int64, widths: Int64) -> Crops:
            return random_crops(heights, widths, uniforms, data.crop_scale, data.crop_ratio, data.flip)

        return centre if data.crop_scale == (1, 1) else anywhere

    def replacements(step: int, slot: int, bad: int) -> Iterator[int]:
        window = order.windows(step, slot, slot + 1)[0]
        near = order.window_samples(window)
        ranked = near[np.argsort(hash64(seed, STREAM_REPLACEMENT, window.epoch, bad, near), kind="stable")]
        yield from ranked[ranked != bad][:_REPLACEMENTS_TRIED].tolist()
        dataset, _ = mixture.locate(bad)
        first, end = mixture.first_sample[dataset : dataset + 2]
        far = hash64(seed, STREAM_REPLACEMENT, window.epoch, bad, np.arange(_REPLACEMENTS_TRIED), 1)
        yield from (first + (far % np.uint64(end - first)).astype(np.int64)).tolist()

    slots = worker_slots(order.batch_size, rank, world_size, together)
    return Loader(mixture, order, slots, steps, make_crops, model, data, device, replacements)


def evaluation_loader(
    shards: ShardSet,
    model: ImageModelConfig,
    data: DataConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = _CPU,
    max_samples: int | None = None,
    samples: range | None = None,
    causes: dict[str, str] | None = None,
) -> Loader:
    """Every sample exactly once, centre-cropped. Batch t holds samples tB .. (t+1)B, split over the workers.

    All workers get the same number of batches; a worker's part of the last one may be short or empty. Bad samples are
    left out and counted (`Loader.bad`).

    Args:
        shards: the dataset.
        model: image size and channels.
        data: budgets and threads.
        batch_size: samples per step over all workers.
        rank, world_size: this worker, and the number of workers.
        device: where to put batches.
        max_samples: use at most this many samples, evenly spread over the dataset.
        samples: use only these consecutive samples of the dataset.
        causes: filled with the cause of each bad sample, by key; for callers that count over several passes.
    """
    samples = range(shards.manifest.num_samples) if samples is None else samples
    stride = stride_of(len(samples), max_samples)
    order = SequentialOrder(len(samples), batch_size, max(256 // stride, INDEX_STRIDE), stride, samples.start)
    slots = worker_slots(batch_size, rank, world_size)

    def make_crops(draw: Draw) -> CropRule:
        return lambda heights, widths: centre_crops(heights, widths, model.image_hw)

    steps = range(order.num_steps)
    return Loader(Mixture.of(shards), order, slots, steps, make_crops, model, data, device, causes=causes)
