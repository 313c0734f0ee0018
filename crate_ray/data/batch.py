"""A worker's part of a global batch, and the threads that decode it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import DataConfig, ImageModelConfig
from crate_ray.data.decode.nvjpeg import check_nvjpeg, decode_batch_cuda
from crate_ray.data.decode.samples import decode_batch
from crate_ray.data.decode.transforms import LARGEST_SMALL_SIDE, CropRule
from crate_ray.data.device import DeviceFeed, Sent
from crate_ray.data.format.samples import Sample
from crate_ray.data.order.dataset_order import Draw
from crate_ray.data.order.hashing import Int64
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.read.bad_samples import BadSampleCounter, SampleError
from crate_ray.data.read.content import NO_LABEL, Contents, LabelUse, sample_contents
from crate_ray.data.read.mixture import MixtureReader
from crate_ray.data.read.shard_reader import Unreadable
from crate_ray.errors import UserError

_CHUNK = 32  # samples per decoding task: enough to hide the cost of a task, and few enough to split a batch
_SMALL_CHUNK = 128  # smallest task for small images, which are decoded and resized together
_SMALL_PIXELS = 2**20  # largest task for small images, in pixels

Replacements = Callable[[int, int, int], Iterator[int]]
"""Maps (step, slot, sample number) of a bad sample to the numbers of samples to try instead."""


@dataclass
class Batch:
    """One worker's part of a global batch of n samples."""

    step: int
    """Global step that the batch belongs to."""
    epochs: Int64
    """(n,) epoch, of its dataset, in which each sample is drawn."""
    images: Tensor
    """(n, channels, height, width), on the loader's device; uint8 for images, float32 for grids, not normalised."""
    samples: Int64
    """(n,) numbers of the samples. Several datasets are numbered one after the other."""
    keys: list[str]
    """Keys of the samples."""
    labels: Int64 | None
    """(n,) class numbers from the members `cls`; None if not every sample has one, and for several datasets."""

    def select(self, mask: NDArray[np.bool_]) -> Batch:
        """The samples for which the mask, (n,), is true."""
        labels = None if self.labels is None else self.labels[mask]
        keys = [key for key, selected in zip(self.keys, mask, strict=True) if selected]
        images = self.images[torch.from_numpy(mask)]
        return Batch(self.step, self.epochs[mask], images, self.samples[mask], keys, labels)


@dataclass
class PendingBatch:
    """A batch that the decode threads are filling."""

    batch: Batch
    usable: NDArray[np.bool_]
    """(n,) false for bad samples that were not replaced."""
    tasks: list[Future[None]]
    sent: Sent | None = None
    """Set once its copy to the device has started."""

    @property
    def is_ready(self) -> bool:
        """Whether all of its samples are decoded."""
        return all(task.done() and not task.cancelled() and task.exception() is None for task in self.tasks)

    def send(self, feed: DeviceFeed) -> Sent:
        """Wait until the batch is decoded, and start its copy to the device. Raises what the decode threads raised."""
        for task in self.tasks:
            task.result()
        if self.sent is None:
            if not self.usable.all():
                with feed.queue():
                    self.batch = self.batch.select(self.usable)
            self.sent = feed.send(self.batch.images)
        return self.sent

    def finish(self, feed: DeviceFeed) -> Batch:
        """The batch, ready for work that is queued on the caller's stream. Raises as `send` does."""
        self.batch.images = feed.hand_over(self.send(feed))
        return self.batch


class BatchDecoder:
    """Decodes samples into batches, replaces bad ones, and counts them.

    Args:
        mixture: the datasets.
        reader: reads replacements.
        model: image size and channels.
        data: limits and threads.
        feed: the device that batches go to.
        slots: the half-open range of the global batch's slots that this worker computes.
        make_crops: crop rule of drawn samples.
        replacements: samples to try in place of a bad sample. If None, bad samples are left out of their batch.
        bad: counts bad samples.
    """

    def __init__(
        self,
        mixture: Mixture,
        reader: MixtureReader,
        model: ImageModelConfig,
        data: DataConfig,
        feed: DeviceFeed,
        slots: tuple[int, int],
        make_crops: Callable[[Draw], CropRule],
        replacements: Replacements | None,
        bad: BadSampleCounter,
    ) -> None:
        self._mixture, self._reader, self._feed, self._slots = mixture, reader, feed, slots
        self._make_crops, self._replacements, self._bad = make_crops, replacements, bad
        self._max_pixels = data.max_pixels
        self._image_shape = (model.channels, *model.image_hw)
        self._on_device = data.decode_device == "cuda"
        if self._on_device:
            check_nvjpeg(feed.device)
        self._suffixes = [dataset.manifest.image_suffixes for dataset in mixture.datasets]
        self._label_use: LabelUse = "ignored" if mixture.num_classes is None else "required"
        # Not the CPUs of the machine: a Ray worker has a share of them, which is torch's number of threads.
        self.num_threads = data.decode_threads or torch.get_num_threads()
        """Decode threads to use."""
        self._chunk = self._chunk_size(data.prefetch_batches)

    def _chunk_size(self, prefetch_batches: int) -> int:
        """Samples per decoding task."""
        largest = self._mixture.largest_hw
        if largest is None or max(largest) > LARGEST_SMALL_SIDE:
            return _CHUNK
        # Threads wait for the GIL less often in large tasks, but every thread needs two tasks within the batches ahead.
        ahead = prefetch_batches * (self._slots[1] - self._slots[0])
        return max(_SMALL_CHUNK, min(ahead // (2 * self.num_threads), _SMALL_PIXELS // max(largest) ** 2))

    def start(
        self, pool: ThreadPoolExecutor, step: int, draw: Draw, samples: list[Sample | Unreadable]
    ) -> PendingBatch:
        """Start decoding a step's samples in the pool."""
        batch = Batch(
            step=step,
            epochs=draw.epochs,
            images=self._empty(len(samples)),
            samples=draw.samples,
            keys=[s.key for s in samples],
            labels=None if self._label_use == "ignored" else np.full(len(samples), NO_LABEL, np.int64),
        )
        usable = np.ones(len(samples), bool)
        self._bad.count_drawn(len(samples))
        starts = range(0, len(samples), self._chunk)
        chunks = [slice(start, min(start + self._chunk, len(samples))) for start in starts]
        return PendingBatch(batch, usable, [pool.submit(self._decode, batch, usable, samples, c) for c in chunks])

    def _empty(self, count: int) -> Tensor:
        """Memory for a batch: on the device if it is decoded there, else on the host."""
        shape = (count, *self._image_shape)
        dtype = torch.float32 if self._mixture.kind == "grid" else torch.uint8
        if not self._on_device:
            return torch.empty(shape, dtype=dtype, pin_memory=self._feed.device.type == "cuda")
        with self._feed.queue():  # the stream that writes it: it may be memory whose last use there is still queued
            return torch.empty(shape, dtype=dtype, device=self._feed.device)

    def _decode(self, batch: Batch, usable: NDArray[np.bool_], samples: list[Sample | Unreadable], rows: slice) -> None:
        """In a thread: fill these rows of a batch, and replace bad samples or mark them as not usable."""
        for i, error in enumerate(self._try(batch, rows, samples[rows]), rows.start):
            if error is None:
                continue
            self._bad.add(error.of_source(self._reader.source_name(int(batch.samples[i]))))
            usable[i] = self._replacements is not None and self._replace(batch, i)

    def _try(self, batch: Batch, rows: slice, samples: Sequence[Sample | Unreadable]) -> list[SampleError | None]:
        """Decode samples into rows of a batch. Returns the errors of those that cannot be used."""
        contents = self._contents(batch.samples[rows], samples)
        if batch.labels is not None:
            batch.labels[rows] = contents.labels
        crop = self._make_crops(Draw(batch.samples[rows], batch.epochs[rows]))
        decode = decode_batch_cuda if self._on_device else decode_batch
        with self._feed.queue():
            found = decode(contents.encoded, self._mixture.kind, crop, batch.images[rows], max_pixels=self._max_pixels)
        errors = []
        for sample, error, decode_error in zip(samples, contents.errors, found, strict=True):
            if decode_error is not None:
                # The traceback refers to itself. It would keep the samples in memory until garbage collection.
                decode_error.__traceback__ = decode_error.__context__ = decode_error.__cause__ = None
                error = error or SampleError.of_decode_error(sample.key, decode_error)
            errors.append(error)
        return errors

    def _contents(self, numbers: Int64, samples: Sequence[Sample | Unreadable]) -> Contents:
        if len(set(self._suffixes)) == 1:
            return sample_contents(samples, self._suffixes[0], self._label_use)
        encoded, labels, errors = [], [], []
        for number, sample in zip(numbers.tolist(), samples, strict=True):  # suffixes depend on the sample's dataset
            one = sample_contents([sample], self._suffixes[self._mixture.locate(number)[0]], self._label_use)
            encoded += one.encoded
            labels += one.labels
            errors += one.errors
        return Contents(encoded, labels, errors)

    def _replace(self, batch: Batch, row: int) -> bool:
        """Replace a bad sample; every worker would choose the same replacement."""
        assert self._replacements is not None
        bad, bad_key = int(batch.samples[row]), batch.keys[row]
        for number in self._replacements(batch.step, self._slots[0] + row, bad):
            sample = self._reader.read(range(number, number + 1))[0]
            batch.samples[row], batch.keys[row] = number, sample.key
            if self._try(batch, slice(row, row + 1), [sample])[0] is None:
                return True
        name = self._reader.source_name(bad)
        raise UserError(
            f"sample {bad_key!r}{f' ({name})' if name else ''} of {self._mixture.uri} is unusable, and so are all "
            "replacements that were tried; "
            "pack the good samples again with `crate-ray prepare`"
        )
