"""Batches of decoded, augmented samples, prepared ahead by threads: the way from a dataset to the training step."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import TypedDict, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import DataConfig, ImageModelConfig
from crate_ray.data.decode.nvjpeg import check_nvjpeg, decode_batch_cuda
from crate_ray.data.decode.samples import Cause, decode_batch
from crate_ray.data.decode.transforms import (
    LARGEST_SMALL_SIDE,
    CropRule,
    Crops,
    centre_crops,
    random_crops,
    random_flips,
)
from crate_ray.data.device import DeviceFeed
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.format.samples import Sample
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.sequence import (
    STREAM_CROP,
    STREAM_REPLACEMENT,
    Draw,
    Int64,
    SampleOrder,
    Window,
    hash64,
    uniform,
    worker_slots,
)
from crate_ray.data.read.reader import MixtureReader, Order, ResidentSource, StreamedSource, Unreadable
from crate_ray.errors import UserError

_CHUNK = 32  # samples per decoding task: long enough to hide a task's cost, short enough to share a batch out
_SMALL_CHUNK = 128  # the same of small images, which are decoded and resized together, at the least
_SMALL_PIXELS = 2**20  # and at the most
_WINDOWS_AHEAD = 8  # the buffer's bytes are the limit; this one bounds the planning
_REPORTED_BAD = 10_000
_CPU = torch.device("cpu")
BAD_CAUSES: tuple[str, ...] = (*get_args(Cause), "damaged_shard", "no_image", "no_label")
"""Why samples cannot be used."""
_JUDGED_SAMPLES = 1000  # the share of bad samples is taken of at least so many
_REPLACEMENTS_TRIED = 64
_CLOSING_SECONDS = 1.0  # a store that is away holds the planner for longer


@dataclass
class Batch:
    """One worker's part of a global batch."""

    step: int
    """Global step that the batch belongs to."""
    epochs: Int64
    """(n,) epoch, of its dataset, in which each sample is drawn."""
    images: Tensor
    """(n, channels, height, width), on the loader's device; uint8 for images, float32 for grids, not normalised."""
    samples: Int64
    """(n,) numbers of the samples in the dataset; several datasets are numbered through."""
    keys: list[str]
    """Keys of the samples."""
    labels: Int64 | None
    """(n,) class numbers from the members `cls`; None where not every sample has one, and for several datasets."""

    def select(self, keep: NDArray[np.bool_]) -> Batch:
        """The samples of the batch where keep, (n,), is true."""
        labels = None if self.labels is None else self.labels[keep]
        keys = [key for key, kept in zip(self.keys, keep, strict=True) if kept]
        images = self.images[torch.from_numpy(keep)]
        return Batch(self.step, self.epochs[keep], images, self.samples[keep], keys, labels)


class SequentialOrder:
    """Every stride-th sample exactly once, in the order of the shards: for evaluation. The last batch may be short."""

    def __init__(self, num_samples: int, batch_size: int, block_samples: int, stride: int = 1) -> None:
        self.num_samples, self.batch_size, self.block_samples = -(-num_samples // stride), batch_size, block_samples
        self.stride = stride

    def describe(self) -> dict[str, object]:
        """All that the order depends on, as plain data."""
        return {"num_samples": self.num_samples, "batch_size": self.batch_size, "stride": self.stride}

    @property
    def num_steps(self) -> int:
        """Batches of one pass."""
        return -(-self.num_samples // self.batch_size)

    @property
    def steps_per_window(self) -> int:
        """Steps that one block lasts for, at least one."""
        return -(-self.block_samples // self.batch_size)

    def draw(self, step: int, start: int, stop: int) -> Draw:
        """Samples of slots [start, stop) of a step, those that exist."""
        low, high = self._places(step, start, stop)
        return Draw(np.arange(low, high, dtype=np.int64) * self.stride, np.zeros(high - low, np.int64))

    def windows(self, step: int, start: int, stop: int) -> list[Window]:
        """One window is one block."""
        low, high = self._places(step, start, stop)
        if low == high:
            return [Window(0, 0, step * self.batch_size // self.block_samples)]
        first, last = low // self.block_samples, (high - 1) // self.block_samples
        return [Window(0, 0, block) for block in range(first, last + 1)]

    def blocks(self, window: Window) -> list[range]:
        """What the window's samples are read with: one range, or one for each where they lie far apart."""
        first = window.round * self.block_samples
        numbers = range(first, min(first + self.block_samples, self.num_samples))
        if not numbers:
            return []
        if self.stride < INDEX_STRIDE:
            return [range(numbers[0] * self.stride, numbers[-1] * self.stride + 1)]
        return [range(number * self.stride, number * self.stride + 1) for number in numbers]

    def _places(self, step: int, start: int, stop: int) -> tuple[int, int]:
        first = step * self.batch_size
        return min(first + start, self.num_samples), min(first + stop, self.num_samples)


class BadSamples:
    """Samples that could not be used, by key, with their causes; a loader's own share of them."""

    def __init__(self, max_fraction: float, uri: str, causes: dict[str, str] | None = None) -> None:
        self._max_fraction, self._uri = max_fraction, uri
        self._lock = threading.Lock()
        self._drawn = self._bad = 0
        self._taken: Counter[str] = Counter()
        self.causes = {} if causes is None else causes
        """Cause of each bad sample's key, of the first 10,000 of them."""
        self.counts: Counter[str] = Counter()
        """Times that a sample was not usable, by cause; a sample counts again in every epoch."""

    def take_counts(self) -> list[int]:
        """The counts of BAD_CAUSES since the last call."""
        with self._lock:
            new, self._taken = self.counts - self._taken, self.counts.copy()
        return [new[cause] for cause in BAD_CAUSES]

    def drawn(self, count: int) -> None:
        """Count samples that a batch asked for."""
        with self._lock:
            self._drawn += count

    def add(self, key: str, cause: str, error: str) -> None:
        """Count a bad sample. Raises UserError when there are too many."""
        with self._lock:
            self._bad += 1
            self.counts[cause] += 1
            if len(self.causes) < _REPORTED_BAD:
                self.causes.setdefault(key, cause)
            if self._bad > self._max_fraction * max(self._drawn, _JUDGED_SAMPLES):
                kinds = ", ".join(f"{count} {name}" for name, count in self.counts.most_common())
                raise UserError(
                    f"{self._bad} of {self._drawn} samples of {self._uri} are unusable, more than "
                    f"data.max_bad_fraction {self._max_fraction:g} allows ({kinds}; the last is {key!r}: {error}); "
                    "pack the good ones again with crate-ray prepare --source, or raise data.max_bad_fraction"
                )


class LoaderState(TypedDict):
    """Position of a loader, as plain data for a checkpoint of any kind."""

    step: int
    """The next step."""
    dataset: str
    """Digest of the dataset."""
    order: dict[str, object]
    """What the order of its samples depends on: seed, batch size, blocks."""


class Loader:
    """Iterates over one worker's part of every batch; threads fetch and decode ahead. Close it, or use it in a `with`.

    Iterating goes on where the last iteration stopped; `state_dict` is the position of what was handed out.
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
        replacements: Callable[[int, int, int], Iterator[int]] | None = None,
        causes: dict[str, str] | None = None,
    ) -> None:
        """Start the threads.

        Args:
            mixture: the datasets.
            order: which samples a step's slots hold.
            slots: the half-open range of the batch's slots that this worker computes.
            steps: the steps to iterate over.
            make_crops: crop rule of the samples that are drawn.
            model: image size and channels.
            data: budgets and threads.
            device: where batches are to be.
            replacements: numbers to try in the place of (step, slot, sample) when that sample is bad; without it, bad
                samples are left out of their batch.
            causes: takes up the keys of bad samples with their causes.
        """
        self._mixture, self._order, self._slots, self._stop = mixture, order, slots, steps.stop
        self._make_crops, self._model, self._data, self._replacements = make_crops, model, data, replacements
        self._reader = MixtureReader(mixture, data)
        self._feed = DeviceFeed(device)
        self._on_device = data.decode_device == "cuda"
        if self._on_device:
            check_nvjpeg(device)
        self.bad = BadSamples(data.max_bad_fraction, mixture.uri, causes)
        """What could not be used so far."""
        self._suffixes = [dataset.manifest.image_suffixes for dataset in mixture.datasets]
        self._threads = data.decode_threads or len(os.sched_getaffinity(0))
        self._chunk = self._chunk_size()
        self._begin(steps.start)

    def _chunk_size(self) -> int:
        """Samples of a decoding task."""
        largest = self._mixture.largest_hw
        if largest is None or max(largest) > LARGEST_SMALL_SIDE:
            return _CHUNK
        # The larger a task, the less its thread waits for the interpreter; but two for each thread are to be there.
        ahead = self._data.prefetch_batches * (self._slots[1] - self._slots[0])
        return max(_SMALL_CHUNK, min(ahead // (2 * self._threads), _SMALL_PIXELS // max(largest) ** 2))

    def _begin(self, step: int) -> None:
        self._step = step
        resident = self._mixture.total_bytes <= self._data.memory_bytes
        source = ResidentSource if resident else StreamedSource
        self._source = source(self._reader, self._order, self._slots, self._data)
        windows = 1 if resident else _WINDOWS_AHEAD * self._order.steps_per_window
        self._lookahead = self._data.prefetch_batches + windows
        self._pool = ThreadPoolExecutor(self._threads, "decode")
        self._ready: Queue[_Decoding | BaseException | None] = Queue(self._data.prefetch_batches)
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
            batch.images = self._feed.hand_over(batch.images)
            if self._feed.copies_ahead:
                self._send_next()
            yield batch

    def _send_next(self) -> None:
        """Start the copy of the next batch to the device, if it is ready: beside the step that the caller begins."""
        with self._ready.mutex:
            item = self._ready.queue[0] if self._ready.queue else None
        if isinstance(item, _Decoding) and item.is_ready:
            item.finish(self._feed)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def state_dict(self) -> LoaderState:
        """Position after the last batch that was handed out. It does not depend on the number of workers."""
        return {"step": self._step, "dataset": self._mixture.digest, "order": self._order.describe()}

    def load_state_dict(self, state: LoaderState) -> None:
        """Go to a position that `state_dict` gave, of a loader on any worker of any number of workers.

        Raises UserError where it belongs to another dataset, or to another order of the samples.
        """
        if state["dataset"] != self._mixture.digest:
            raise UserError(
                f"the saved position belongs to another dataset than {self._mixture.uri} "
                f"(digest {state['dataset'][:12]}); open the dataset it was saved with"
            )
        if differences := _differences(state["order"], self._order.describe()):
            raise UserError(
                f"the saved position belongs to another order of {self._mixture.uri}, in which samples would be "
                f"repeated or lost: {', '.join(differences)}; use the settings that it was saved with (unless they are "
                "set, blocks, windows and lanes follow from memory_bytes, buffer_bytes and the planned workers)"
            )
        self.close()
        self._begin(state["step"])

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        self._source.close()
        with suppress(Empty):  # makes room for what the planner is about to put
            while True:
                self._ready.get_nowait()
        # A thread that is within torch when the interpreter ends would abort the process.
        self._planner.join(_CLOSING_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _plan(
        self,
        source: ResidentSource | StreamedSource,
        pool: ThreadPoolExecutor,
        ready: Queue[_Decoding | BaseException | None],
        closed: threading.Event,
    ) -> None:
        """Thread: has samples fetched ahead, and hands batches to the decode threads in order."""

        def put(item: _Decoding | BaseException | None) -> bool:
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return True
                except Full:
                    continue
            return False

        def request(first: int, step: int) -> int:
            """Ask for steps from `first` on, for a loader that takes `step` next; the first one left out."""
            for ahead in range(max(first, step), min(step + self._lookahead, self._stop)):
                if not source.request(ahead):
                    return ahead
                first = ahead + 1
            return first

        try:
            requested = request(self._step, self._step)
            for step in range(self._step, self._stop):
                # No name of ours: the samples' bytes are to be free as soon as they are decoded.
                decoding = self._start_decoding(pool, step, *source.take(step))
                requested = request(requested, step + 1)
                if not put(decoding):
                    return
            put(None)
        except BaseException as error:
            put(error)

    def _start_decoding(
        self, pool: ThreadPoolExecutor, step: int, draw: Draw, samples: list[Sample | Unreadable]
    ) -> _Decoding:
        dtype = torch.float32 if self._mixture.kind == "grid" else torch.uint8
        place = {"device": self._feed.device} if self._on_device else {"pin_memory": self._feed.device.type == "cuda"}
        shape = (len(samples), self._model.channels, *self._model.image_hw)
        has_labels = self._mixture.num_classes is not None
        batch = Batch(
            step=step,
            epochs=draw.epochs,
            images=torch.empty(shape, dtype=dtype, **place),
            samples=draw.samples,
            keys=[s.key for s in samples],
            labels=np.full(len(samples), -1, np.int64) if has_labels else None,
        )
        usable = np.ones(len(samples), bool)
        self.bad.drawn(len(samples))
        starts = range(0, len(samples), self._chunk)
        chunks = [slice(start, min(start + self._chunk, len(samples))) for start in starts]
        return _Decoding(batch, usable, [pool.submit(self._decode, batch, usable, samples, c) for c in chunks])

    def _decode(self, batch: Batch, usable: NDArray[np.bool_], samples: list[Sample | Unreadable], rows: slice) -> None:
        """Thread: fill these rows of a batch; bad samples are replaced, or marked as not usable."""
        errors = self._try(batch, rows, samples[rows])
        for i, bad in enumerate(errors, rows.start):
            if bad is None:
                continue
            self.bad.add(batch.keys[i], *bad)
            usable[i] = self._replacements is not None and self._replace(batch, i)

    def _try(self, batch: Batch, rows: slice, samples: Sequence[Sample | Unreadable]) -> list[tuple[str, str] | None]:
        """Decode samples into rows of a batch; cause and error of those that cannot be used."""
        contents, found = self._contents(batch.samples[rows], samples)
        if batch.labels is not None:
            batch.labels[rows] = _labels(samples, found)
        crop = self._make_crops(Draw(batch.samples[rows], batch.epochs[rows]))
        kind = self._mixture.kind
        decode = decode_batch_cuda if self._on_device else decode_batch
        with self._feed.queue():
            errors = decode(contents, kind, crop, batch.images[rows], max_pixels=self._data.max_pixels)
        for error in errors:
            if error is not None:  # else it holds itself, and so the samples, until the garbage is collected
                error.__traceback__ = error.__context__ = error.__cause__ = None
        return [
            bad or (None if error is None else (error.cause, str(error)))
            for bad, error in zip(found, errors, strict=True)
        ]

    def _contents(
        self, numbers: Int64, samples: Sequence[Sample | Unreadable]
    ) -> tuple[list[bytes | memoryview], list[tuple[str, str] | None]]:
        """Image or grid of each sample, and what is wrong with those that have none."""
        if len(self._suffixes) == len(self._suffixes[0]) == 1:
            usual = self._suffixes[0][0]
            with suppress(KeyError):  # nearly always all have it, and sample by sample it takes longer
                return [sample.members[usual] for sample in samples], [None] * len(samples)
        contents: list[bytes | memoryview] = []
        found: list[tuple[str, str] | None] = []
        for number, sample in zip(numbers.tolist(), samples, strict=True):
            suffixes = self._suffixes[self._mixture.locate(number)[0]]
            content = next((sample.members[suffix] for suffix in suffixes if suffix in sample.members), None)
            if content is not None:
                bad = None
            elif isinstance(sample, Unreadable):
                bad = ("damaged_shard", sample.error)
            else:
                bad = ("no_image", f"it has no member with a suffix of {list(suffixes)}")
            contents.append(b"" if content is None else content)
            found.append(bad)
        return contents, found

    def _replace(self, batch: Batch, row: int) -> bool:
        """Put another sample in the place of a bad one, the same on whichever worker has it."""
        assert self._replacements is not None
        bad_key = batch.keys[row]
        for number in self._replacements(batch.step, self._slots[0] + row, int(batch.samples[row])):
            sample = self._reader.read(range(number, number + 1))[0]
            batch.samples[row], batch.keys[row] = number, sample.key
            if self._try(batch, slice(row, row + 1), [sample])[0] is None:
                return True
        raise UserError(
            f"sample {bad_key!r} of {self._mixture.uri} is unusable, and so are all that were tried in its "
            "place; pack the good ones again with crate-ray prepare --source"
        )


def _labels(samples: Sequence[Sample | Unreadable], found: list[tuple[str, str] | None]) -> list[int]:
    """Class numbers; of samples that have none -1, which is noted as what is wrong with them."""
    with suppress(KeyError, ValueError):  # as above
        return [int(bytes(sample.members["cls"])) for sample in samples]
    labels = []
    for i, sample in enumerate(samples):
        label = -1
        if found[i] is None:
            try:
                label = int(bytes(sample.members["cls"]))
            except (KeyError, ValueError):
                found[i] = ("no_label", "its member 'cls' is missing or no number")
        labels.append(label)
    return labels


def _differences(saved: object, here: object, name: str = "") -> list[str]:
    """What differs of two pieces of plain data, by name."""
    if isinstance(saved, dict) and isinstance(here, dict):
        pairs = [(f"{name}.{key}".lstrip("."), saved.get(key), here.get(key)) for key in {**saved, **here}]
    elif isinstance(saved, list | tuple) and isinstance(here, list) and len(saved) == len(here):
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(saved, here, strict=True))]
    else:
        return [] if saved == here else [f"{name} was {saved} and is {here}"]
    return [difference for key, before, now in pairs for difference in _differences(before, now, key)]


@dataclass
class _Decoding:
    """A batch that the decode threads are filling."""

    batch: Batch
    usable: NDArray[np.bool_]
    parts: list[Future[None]]
    is_sent: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it is filled."""
        return all(part.done() and not part.cancelled() and part.exception() is None for part in self.parts)

    def finish(self, feed: DeviceFeed) -> Batch:
        """The batch, its copy to the device begun; waits until it is filled, and raises what its threads raised."""
        for part in self.parts:
            part.result()
        if not self.is_sent:
            if not self.usable.all():
                with feed.queue():
                    self.batch = self.batch.select(self.usable)
            self.batch.images = feed.send(self.batch.images)
            self.is_sent = True
        return self.batch


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
    """Augmented batches of the run's steps for one worker: slots [rank·B/W, (rank+1)·B/W) of every global batch.

    Works under any launcher: rank and world size are all it needs to know. With `together`, each so many slots in a row
    stay on one worker, such as pairs that are to be mixed.
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


def stride_of(num_samples: int, max_samples: int | None) -> int:
    """The s of every s-th sample of a dataset, such that they are at most max_samples."""
    return 1 if max_samples is None else -(-num_samples // max_samples)


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
    causes: dict[str, str] | None = None,
) -> Loader:
    """Every sample exactly once, centre-cropped and resized; batch t holds samples tB .. (t+1)B, shared by the workers.

    With max_samples at most so many, spread evenly (`stride_of`); nothing else is decoded. All workers get the same
    number of batches; a worker's part of the last one may be short or empty. Samples that cannot be used are left out
    and counted (`Loader.bad`); causes takes up their keys, for who counts over several passes.
    """
    total = shards.manifest.num_samples
    stride = stride_of(total, max_samples)
    order = SequentialOrder(total, batch_size, max(256 // stride, INDEX_STRIDE), stride)
    slots = worker_slots(batch_size, rank, world_size)

    def make_crops(draw: Draw) -> CropRule:
        return lambda heights, widths: centre_crops(heights, widths, model.image_hw)

    steps = range(order.num_steps)
    return Loader(Mixture.of(shards), order, slots, steps, make_crops, model, data, device, causes=causes)
