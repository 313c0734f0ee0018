"""Batches do not depend on who loads them: not on the number of workers, the first step, the threads or the way of
reading. Evaluation sees every sample once; bad samples are named; buffers stay within their plan."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from crate_ray.config import CrateMAEConfig, DataConfig, PrepareConfig, S3Config
from crate_ray.data import batch as batch_module
from crate_ray.data import loader as loader_module
from crate_ray.data.batch import Batch
from crate_ray.data.decode.samples import decode_batch
from crate_ray.data.decode.transforms import CROP_UNIFORMS, random_crops
from crate_ray.data.device import DeviceFeed, Sent
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.loader import Loader, evaluation_loader, training_loader
from crate_ray.data.order.dataset_order import DatasetOrder, Window
from crate_ray.data.order.hashing import STREAM_CROP, uniform
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.sequence import SampleOrder, worker_slots
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source
from crate_ray.data.read.mixture import open_mixture
from crate_ray.data.read.shard_reader import ShardReader, Unreadable
from crate_ray.data.read.streamed import StreamedSource
from crate_ray.errors import UserError
from crate_ray.storage.cache import PartCache
from crate_ray.storage.interface import Replaced
from crate_ray.storage.local import LocalStorage
from tests.uniforms import from_table

MODEL = CrateMAEConfig(image_size=(16, 12), patch_size=4, dim=8, num_subspaces=2, depth=1)
SAMPLES, BATCH = 203, 20


class RecordingStorage(LocalStorage):
    """Remembers which ranges of shards were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, int, int]] = []

    def read_version(self, key: str, start: int = 0, length: int | None = None) -> tuple[bytes, str]:
        assert length is not None
        self.reads.append((key, start, length))
        return super().read_version(key, start, length)


def picture(number: int) -> bytes:
    random, file = np.random.default_rng(number), io.BytesIO()
    size = random.integers(12, 30, 2)
    kind, channels = ("JPEG", "PNG", "WEBP")[number % 3], 1 if number % 5 == 0 else 3
    noise = random.integers(0, 256, (*size, channels), np.uint8)
    Image.fromarray(noise.squeeze(2) if channels == 1 else noise).save(file, kind)
    return file.getvalue()


def pack_items(folder: Path, load: Callable[[int], dict[str, bytes]], count: int, shard_samples: int = 48) -> ShardSet:
    items = [Item(str(number), lambda number=number: load(number)) for number in range(count)]
    pack(Source(items, None), LocalStorage(folder), PrepareConfig(output="unused", shard_samples=shard_samples))
    return load_dataset(RecordingStorage(folder))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Pictures of three formats and many sizes in shards of 48, the last one ragged."""
    suffixes = ("jpg", "png", "webp")
    return pack_items(
        tmp_path_factory.mktemp("pictures"),
        lambda n: {suffixes[n % 3]: picture(n), "cls": str(n % 7).encode()},
        SAMPLES,
    )


@pytest.fixture(scope="module")
def stock(shards: ShardSet) -> list[tuple[str, bytes, int]]:
    """Key, picture and label of every sample, as webdataset reads the shards."""
    root = shards.storage.uri
    paths = [f"{root}/{shards.shard_name(number)}" for number in range(shards.manifest.num_shards)]
    assert len(paths) == 5
    return [
        (s["__key__"], next(s[k] for k in ("jpg", "png", "webp") if k in s), int(s["cls"]))
        for s in wds.WebDataset(paths, shardshuffle=False)
    ]


def config(streamed: bool, **values: Any) -> DataConfig:
    """Small threads' worth of settings; streamed mode is what data that does not fit memory gets."""
    options = {"train": "unused", "fetch_threads": 3, "decode_threads": 2, "prefetch_batches": 3}
    return DataConfig(**{**options, "memory_bytes": 1 if streamed else 2**30, **values})


def sample_order(
    block: int = 16, window: int = 1, lanes: int = 4, batch_size: int = BATCH, **values: Any
) -> SampleOrder:
    sizes = {"block_samples": block, "window_blocks": window, "lanes": lanes}
    dataset = DatasetOrder(**{"num_samples": SAMPLES, "seed": 5, **sizes, **values})
    return SampleOrder(batch_size=batch_size, datasets=(dataset,))


ORDERS = [sample_order(), sample_order(7, 2, 3), sample_order(1, 40, 1), sample_order(16, 2, 2, shuffle=False)]


def name(order: SampleOrder) -> str:
    return " ".join(f"b{d.block_samples} g{d.window_blocks} L{d.lanes}" for d in order.datasets)


def train_on(data: ShardSet | Mixture, order: SampleOrder, model: Any, settings: DataConfig, **place: Any) -> Loader:
    return training_loader(data if isinstance(data, Mixture) else Mixture.of(data), order, model, settings, **place)


def batches(loader: Loader) -> list[Batch]:
    with loader:
        return list(loader)


def load(
    shards: ShardSet | Mixture, order: SampleOrder, streamed: bool, steps: range, rank: int = 0, world: int = 1
) -> Any:
    return batches(train_on(shards, order, MODEL, config(streamed), steps=steps, rank=rank, world_size=world))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert [(b.step, b.keys) for b in left] == [(b.step, b.keys) for b in right]
    for a, b in zip(left, right, strict=True):
        assert np.array_equal(a.samples, b.samples) and torch.equal(a.images, b.images)
        assert np.array_equal(a.epochs, b.epochs)
        assert a.labels is not None and b.labels is not None and np.array_equal(a.labels, b.labels)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_global_batches_are_the_same_for_every_number_of_workers(
    shards: ShardSet, stock: list[tuple[str, bytes, int]], order: SampleOrder, streamed: bool
) -> None:
    steps = range(order.batches_per_epoch - 3, order.batches_per_epoch + 3)  # across an epoch's end
    whole = load(shards, order, streamed, steps)
    assert [b.step for b in whole] == list(steps)
    for batch in whole:
        assert np.array_equal(batch.epochs, [batch.step // order.batches_per_epoch] * BATCH)
        assert np.array_equal(batch.samples, order.draw(batch.step).samples)
        assert batch.images.shape == (BATCH, 3, 16, 12) and batch.images.dtype == torch.uint8
        assert [(k, n) for k, n in zip(batch.keys, batch.labels, strict=True)] == [
            (stock[s][0], stock[s][2]) for s in batch.samples
        ]
    for world in (2, 3, 5):
        ranks = [load(shards, order, streamed, steps, rank, world) for rank in range(world)]
        for number, batch in enumerate(whole):
            parts = [part[number] for part in ranks]
            assert [key for part in parts for key in part.keys] == batch.keys
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
            assert np.array_equal(np.concatenate([part.labels for part in parts]), batch.labels)


def test_pixels_are_the_samples_own_crop(shards: ShardSet, stock: list[tuple[str, bytes, int]]) -> None:
    order = sample_order(7, 2, 5)
    step = order.batches_per_epoch + 1
    batch = load(shards, order, True, range(step, step + 1))[0]
    for sample, image in zip(batch.samples, batch.images, strict=True):
        u = uniform(order.seed, STREAM_CROP, 1, sample, np.arange(CROP_UNIFORMS))[None]
        expected = torch.empty_like(image)[None]
        crop = partial(random_crops, uniforms=from_table(u), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True)
        assert decode_batch([stock[sample][1]], "image", crop, expected) == [None]
        assert torch.equal(image, expected[0])
    # Another epoch, another crop of the same sample.
    first = load(shards, order, False, range(order.batches_per_epoch))
    seen = {s: i for b in first for s, i in zip(b.samples.tolist(), b.images, strict=True)}
    pairs = [(seen[s], i) for s, i in zip(batch.samples.tolist(), batch.images, strict=True) if s in seen]
    assert len(pairs) > 10 and not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loader_can_start_at_any_step(shards: ShardSet, streamed: bool) -> None:
    order = sample_order()
    stop = order.batches_per_epoch + 4
    whole = load(shards, order, streamed, range(stop), rank=1, world=3)
    for start in (1, order.batches_per_epoch - 1, order.batches_per_epoch, stop - 1):
        assert_same(load(shards, order, streamed, range(start, stop), rank=1, world=3), whole[start:])


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_resident_and_streamed_data_give_the_same_batches(shards: ShardSet, order: SampleOrder) -> None:
    steps = range(order.batches_per_epoch + 2)
    assert_same(load(shards, order, True, steps, 1, 2), load(shards, order, False, steps, 1, 2))


def test_crop_scale_one_keeps_the_largest_centre(shards: ShardSet) -> None:
    order, steps = sample_order(), range(3)
    still = config(False, crop_scale=(1, 1), flip=False)
    mirrored = config(False, crop_scale=(1, 1))
    plain = {k: i for b in batches(evaluation_loader(shards, MODEL, still, batch_size=50)) for k, i in rows(b)}
    for batch in batches(train_on(shards, order, MODEL, still, steps=steps)):
        assert all(torch.equal(image, plain[key]) for key, image in rows(batch))
    flips = 0
    for batch in batches(train_on(shards, order, MODEL, mirrored, steps=steps)):
        for key, image in rows(batch):
            is_flipped = torch.equal(image, plain[key].flip(-1))
            assert is_flipped or torch.equal(image, plain[key])
            flips += is_flipped
    assert 15 < flips < 45  # of 60


def rows(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    return zip(batch.keys, batch.images, strict=True)


@pytest.mark.parametrize(
    ("streamed", "world", "batch_size"), [(False, 1, 20), (True, 2, 64), (False, 3, 7), (True, 5, 3)]
)
def test_evaluation_sees_every_sample_once(
    shards: ShardSet, stock: list[tuple[str, bytes, int]], streamed: bool, world: int, batch_size: int
) -> None:
    # With 5 workers and batches of 3 some have nothing to do, and still as many batches as the others.
    data = config(streamed)
    ranks = [
        batches(evaluation_loader(shards, MODEL, data, batch_size=batch_size, rank=rank, world_size=world))
        for rank in range(world)
    ]
    steps = -(-SAMPLES // batch_size)
    assert [[b.step for b in parts] for parts in ranks] == [list(range(steps))] * world
    in_order = [parts[step] for step in range(steps) for parts in ranks]
    assert np.array_equal(np.concatenate([b.samples for b in in_order]), np.arange(SAMPLES))
    assert [key for b in in_order for key in b.keys] == [key for key, _, _ in stock]
    assert np.concatenate([b.labels for b in in_order]).tolist() == [label for _, _, label in stock]
    alone = batches(evaluation_loader(shards, MODEL, config(False), batch_size=SAMPLES))[0]
    assert torch.equal(torch.cat([b.images for b in in_order]), alone.images)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("max_samples", [SAMPLES, 30, 9, 1])
def test_evaluation_of_some_reads_and_decodes_no_others(shards: ShardSet, streamed: bool, max_samples: int) -> None:
    """Strides of 1, of less than what an index entry covers, of more, and of the whole dataset."""
    everything = batches(evaluation_loader(shards, MODEL, config(False), batch_size=SAMPLES))[0]
    stored = RecordingStorage(shards.storage.root)  # type: ignore[attr-defined]
    loader = evaluation_loader(load_dataset(stored), MODEL, config(streamed), batch_size=7, max_samples=max_samples)
    found = batches(loader)
    assert [len(batch.keys) for batch in found[:-1]] == [7] * (len(found) - 1)
    samples = np.concatenate([batch.samples for batch in found])
    assert max_samples / 2 < len(samples) <= max_samples and len(set(np.diff(samples))) <= 1
    assert loader.bad._drawn == len(samples)
    assert torch.equal(torch.cat([batch.images for batch in found]), everything.images[torch.from_numpy(samples)])
    if streamed and max_samples < SAMPLES / INDEX_STRIDE:  # what shares an index entry is read with it
        read = sum(length for name, _, length in stored.reads if name.endswith(".tar"))
        assert read < 1.1 * len(samples) * INDEX_STRIDE / SAMPLES * shards.manifest.total_bytes


def test_grids_are_loaded_as_float_without_labels(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).normal(size=(20, 2, 16, 12)).astype(np.float32) * 300

    def load_grid(number: int) -> dict[str, bytes]:
        file = io.BytesIO()
        np.save(file, grids[number])
        return {"npy": file.getvalue(), "cls": b"a word" if number == 3 else b"1"}

    model = MODEL.model_copy(update={"channels": 2})
    dataset = pack_items(tmp_path, load_grid, 20)
    batch = batches(evaluation_loader(dataset, model, config(False), batch_size=20))[0]
    assert batch.images.dtype == torch.float32 and batch.labels is None
    assert sorted(map(np.sum, batch.images.numpy())) == sorted(map(np.sum, grids))


# --- Mixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(shards: ShardSet, with_bad: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """A good dataset, one with bad samples, and one whose pictures are not its first image member by another's rule."""
    annotated = pack_items(
        tmp_path_factory.mktemp("annotated"), lambda n: {"jpg": picture(3 * n), "mask.png": picture(3 * n)}, 30
    )
    return Mixture((shards, with_bad, annotated), (5, 3, 1))


MIXED = SampleOrder(
    batch_size=BATCH,
    datasets=(
        DatasetOrder(num_samples=SAMPLES, block_samples=16, window_blocks=2, lanes=3, seed=5),
        DatasetOrder(num_samples=80, block_samples=7, window_blocks=2, lanes=4, seed=6),
        DatasetOrder(num_samples=30, block_samples=1, window_blocks=30, lanes=1, seed=7),
    ),
    weights=(5, 3, 1),
)


@pytest.mark.parametrize("streamed", [False, True])
def test_mixed_datasets_give_the_same_batches_for_every_number_of_workers(mixture: Mixture, streamed: bool) -> None:
    steps = range(40)  # several epochs of the second dataset
    data = config(streamed, max_bad_fraction=0.2)
    whole = batches(train_on(mixture, MIXED, MODEL, data, steps=steps))
    drawn = np.concatenate([b.samples for b in whole])
    asked = np.concatenate([MIXED.draw(step).samples for step in steps])
    bad = np.isin(asked, [SAMPLES + n for n in BAD])
    assert bad.any() and np.array_equal(drawn[~bad], asked[~bad])
    assert ((drawn[bad] >= SAMPLES) & (drawn[bad] < SAMPLES + 80)).all()  # replaced by others of the same dataset
    counts = np.histogram(drawn, mixture.first_sample)[0]
    assert np.abs(counts - len(drawn) * np.array([5, 3, 1]) / 9).max() < 2
    assert whole[-1].epochs.max() >= 3 and whole[-1].epochs.min() <= 2 and whole[0].labels is None
    keys = {n: key for b in whole for n, key in zip(b.samples.tolist(), b.keys, strict=True)}
    assert all(int(keys[n]) == n - SAMPLES for n in keys if SAMPLES <= n < SAMPLES + 80)
    for world in (2, 3):
        ranks = [
            batches(train_on(mixture, MIXED, MODEL, data, steps=steps, rank=rank, world_size=world))
            for rank in range(world)
        ]
        for batch, *parts in zip(whole, *ranks, strict=True):
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
            assert [key for part in parts for key in part.keys] == batch.keys
    start = batches(train_on(mixture, MIXED, MODEL, data, steps=range(23, 40)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(start, whole[23:], strict=True))


def test_a_mixture_is_opened_by_its_weights(mixture: Mixture, tmp_path: Path) -> None:
    first, second, _ = (dataset.storage.uri for dataset in mixture.datasets)
    opened = open_mixture({first: 0.75, second: 0.25}, S3Config())
    assert opened.weights == (3, 1) and opened.num_samples == SAMPLES + 80
    (mean, std), parts = opened.mean_std, [dataset.manifest for dataset in opened.datasets]
    assert mean == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(parts[0].mean, parts[1].mean, strict=True)])
    squares = [0.75 * (parts[0].std[c] ** 2 + parts[0].mean[c] ** 2) + 0.25 * (parts[1].std[c] ** 2
               + parts[1].mean[c] ** 2) for c in range(3)]  # fmt: skip
    assert std == pytest.approx([(s - m**2) ** 0.5 for s, m in zip(squares, mean, strict=True)])
    assert len({opened.digest, open_mixture({first: 2, second: 1}, S3Config()).digest, parts[0].digest()}) == 3
    grids = pack_items(tmp_path, lambda n: {"npy": npy(np.zeros((3, 8, 8), np.float32))}, 4)
    with pytest.raises(UserError, match="mix datasets of the same kind only"):
        open_mixture({first: 1, grids.storage.uri: 1}, S3Config())


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# --- Reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_streaming_reads_every_byte_at_most_once_an_epoch(shards: ShardSet, world: int) -> None:
    storage = shards.storage
    assert isinstance(storage, RecordingStorage)
    order = sample_order(16, 2, 3, batch_size=12)
    for rank in range(world):
        storage.reads.clear()
        load(shards, order, True, range(order.batches_per_epoch), rank, world)
        ranges = sorted(storage.reads)
        assert ranges
        for (name, start, length), (next_name, next_start, _) in pairwise(ranges):
            assert name != next_name or start + length <= next_start
        if world == 1:  # one read for a block that lies in one shard
            assert len(ranges) <= order.datasets[0].num_blocks
        else:  # a worker reads its lanes alone
            assert sum(length for *_, length in ranges) < 0.6 * shards.manifest.total_bytes


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Shards of 41, so that most blocks begin between two entries of the index."""
    return pack_items(
        tmp_path_factory.mktemp("uneven"), lambda n: {"png": picture(3 * n + 1)}, SAMPLES, shard_samples=41
    )


@pytest.mark.parametrize("windows", [0, 1.1, 1.5, 2, 3, 4.5])
@pytest.mark.parametrize("batch_size", [10, 12, 30])
def test_no_window_is_read_twice_however_tight_the_buffer(uneven: ShardSet, batch_size: int, windows: float) -> None:
    storage, order = uneven.storage, sample_order(16, 1, 3, batch_size)
    assert isinstance(storage, RecordingStorage)
    steps, reader = range(order.batches_per_epoch), ShardReader(uneven)
    needed = {window for step in steps for window in order.windows(step, 0, batch_size)}
    sizes = [sum(reader.num_bytes(block.start, len(block)) for block in order.blocks(window)) for window in needed]
    storage.reads.clear()
    data = config(True, buffer_bytes=1 + int(windows * order.datasets[0].lanes * np.mean(sizes)))
    assert len(batches(train_on(uneven, order, MODEL, data, steps=steps))) == len(steps)
    assert sum(length for *_, length in storage.reads) == sum(sizes)


@pytest.mark.parametrize(("window", "batch_size"), [(1, 12), (2, 12), (1, 30), (3, 3)])
def test_streaming_holds_what_is_needed_and_ahead_only_what_the_buffer_has_room_for(
    shards: ShardSet, window: int, batch_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held: list[int] = []
    requested_late: list[int] = []

    class Watched(StreamedSource):
        def request(self, step: int) -> bool:
            done = super().request(step)
            self.note()
            return done

        def take(self, step: int) -> Any:
            needed = set(order.windows(step, *self._slots))
            if not needed.issubset(self._windows):
                requested_late.append(step)
            taken = super().take(step)
            self.note()
            return taken

        def note(self) -> None:
            assert {part.start for parts in self._windows.values() for part in parts} == set(self._parts)
            held.append(max(Counter(window.lane for window in self._windows).values(), default=0))

    monkeypatch.setattr(loader_module, "StreamedSource", Watched)
    order = sample_order(16, window, 3, batch_size)
    windows = 3 * window * 16 * shards.manifest.total_bytes / SAMPLES  # one of each lane
    for buffer_bytes, most in ((1, 2), (int(3 * windows), 5), (2**30, 20)):
        held.clear()
        requested_late.clear()
        caplog.clear()
        data = config(True, buffer_bytes=buffer_bytes)
        batches(train_on(shards, order, MODEL, data, steps=range(2 * order.batches_per_epoch)))
        assert buffer_bytes < 2**30 or not requested_late
        assert max(held) <= most
        warnings = [record.getMessage() for record in caplog.records]
        if buffer_bytes == 1:
            assert len(warnings) == 1 and "rest is stored in unnamed files under /" in warnings[0]
            assert max(held) == 2  # the next one goes to disk as well
        elif window > 1:  # a step needs no more than two windows of a lane
            assert not warnings
    assert max(held) >= 3  # with room, several windows ahead


class CountedBytes(bytes):
    """Says when it is no longer there."""

    storage: CountingStorage

    def __del__(self) -> None:
        self.storage.count(-len(self))


class CountingStorage(LocalStorage):
    """Counts the bytes that were read from it and are still in memory."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.alive = self.most = 0
        self.lock = threading.RLock()

    def count(self, num_bytes: int) -> None:
        with self.lock:
            self.alive += num_bytes
            self.most = max(self.most, self.alive)

    def read_version(self, key: str, start: int = 0, length: int | None = None) -> tuple[bytes, str]:
        data, version = super().read_version(key, start, length)
        counted = CountedBytes(data)
        counted.storage = self
        self.count(len(data))
        return counted, version


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    block=st.sampled_from([7, 16]), window=st.integers(1, 3), lanes=st.sampled_from([1, 3, 5]),
    batch_size=st.sampled_from([5, 12, 30]), world=st.integers(1, 2), room=st.sampled_from([0, 0.6, 1, 1.3, 2.2]),
)  # fmt: skip
@example(block=16, window=1, lanes=1, batch_size=12, world=1, room=1)
def test_encoded_bytes_in_memory_never_exceed_the_buffer(
    shards: ShardSet, block: int, window: int, lanes: int, batch_size: int, world: int, room: float
) -> None:
    """This includes bytes of batches that wait for a slow decoder. The batches do not change."""
    order, storage = sample_order(block, window, lanes, batch_size), CountingStorage(shards.storage.root)  # type: ignore[attr-defined]
    steps, dataset = range(min(order.batches_per_epoch + 3, 20)), load_dataset(storage)
    slots, reader = worker_slots(batch_size, world - 1, world), ShardReader(dataset)

    def size(window: Window) -> int:
        return sum(reader.num_bytes(block.start, len(block)) for block in order.blocks(window))

    drawn = [set(order.windows(step, *slots)) for step in steps]
    largest = max(map(size, set().union(*drawn)))
    # A lane that a step does not draw from may hold a window that is past, and the next one.
    needed = max(
        sum(map(size, windows)) + 2 * largest * (lanes - len({window.lane for window in windows})) for windows in drawn
    )
    part = max(reader.num_bytes(n, block) for n in range(0, SAMPLES, block))
    data = config(True, buffer_bytes=max(1, int(room * needed)), decode_threads=1)

    def decode(*args: Any, **options: Any) -> Any:
        time.sleep(0.002)
        return decode_batch(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "decode_batch", decode)
        place = {"steps": steps, "rank": world - 1, "world_size": world}
        with train_on(dataset, order, MODEL, data, **place) as loader:
            found = list(loader)
            uses_disk = loader._source._uses_disk  # type: ignore[union-attr]
    assert 0 < storage.most <= data.buffer_bytes + uses_disk * data.fetch_threads * part
    assert not (uses_disk and room >= 1)
    assert_same(found, load(shards, order, False, steps, world - 1, world))


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("plan", "fetch", "decode"))]


def assert_no_threads() -> None:
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert loader_threads() == []


@pytest.mark.parametrize("streamed", [False, True])
def test_closing_early_or_late_leaves_no_threads(shards: ShardSet, streamed: bool) -> None:
    assert_no_threads()
    order = sample_order()
    with train_on(shards, order, MODEL, config(streamed), steps=range(10**6)) as loader:
        batch = next(iter(loader))
        assert batch.step == 0 and "plan" in loader_threads()
    assert "plan" not in loader_threads()  # at once: as a daemon within torch, it would abort an interpreter that ends
    assert_no_threads()
    train_on(shards, order, MODEL, config(streamed), steps=range(10**6)).close()  # before the first batch
    assert_no_threads()
    load(shards, order, streamed, range(2))
    assert_no_threads()


def test_a_slow_consumer_bounds_what_is_prepared(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    monkeypatch.setattr(
        batch_module,
        "decode_batch",
        lambda contents, *args, **options: (
            decoded.extend([1] * len(contents)),
            decode_batch(contents, *args, **options),
        )[1],
    )
    with train_on(shards, sample_order(), MODEL, config(True), steps=range(1000)) as loader:
        next(iter(loader))
        # The one taken, prefetch_batches of three in the queue, and one that waits for its place there.
        deadline = time.monotonic() + 5
        while len(decoded) < 5 * BATCH and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(decoded) == 5 * BATCH


# --- Copies to the device -------------------------------------------------------------------------------------------


class RecordingFeed(DeviceFeed):
    """The feed of a device whose copies overlap with computation."""

    copies_ahead = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.sent: list[Sent] = []
        self.handed_over: list[Tensor] = []

    def send(self, images: Tensor) -> Sent:
        self.sent.append(super().send(images))
        return self.sent[-1]

    def hand_over(self, sent: Sent) -> Tensor:
        self.handed_over.append(super().hand_over(sent))
        return self.handed_over[-1]


def test_the_next_batch_is_sent_before_this_one_is_used_if_it_is_ready(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, may_decode = load(shards, sample_order(), True, range(6)), threading.Semaphore(0)

    def decode(*args: Any, **options: Any) -> Any:
        assert may_decode.acquire(timeout=20)
        return decode_batch(*args, **options)

    monkeypatch.setattr(loader_module, "DeviceFeed", RecordingFeed)
    monkeypatch.setattr(batch_module, "decode_batch", decode)
    with train_on(shards, sample_order(), MODEL, config(True, decode_threads=1), steps=range(6)) as loader:
        feed, steps = loader._feed, iter(loader)
        assert isinstance(feed, RecordingFeed)
        may_decode.release()
        found = [next(steps)]  # the next one is not waited for
        assert len(feed.sent) == len(feed.handed_over) == 1
        may_decode.release(2)
        deadline = time.monotonic() + 20
        while sum(item.is_ready for item in list(loader._ready.queue)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found.append(next(steps))
        assert (len(feed.sent), len(feed.handed_over)) == (3, 2) and loader.state_dict()["step"] == 2
        may_decode.release(3)
        found += steps
    assert_same(found, expected)
    assert [id(sent.images) for sent in feed.sent] == [id(images) for images in feed.handed_over]
    assert_no_threads()


# --- Positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_saved_position_continues_on_another_number_of_workers(shards: ShardSet, streamed: bool) -> None:
    order, stop = sample_order(16, 2, 5), 13
    whole = [b.samples.tolist() for b in load(shards, order, streamed, range(stop))]
    seen: list[list[int]] = []
    state = None
    for world, count in ((2, 4), (3, 5), (1, 4)):
        loaders = [
            train_on(shards, order, MODEL, config(streamed), steps=range(stop), rank=rank, world_size=world)
            for rank in range(world)
        ]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(json.loads(state))
        parts = [[next(iter(loader)).samples.tolist() for _ in range(count)] for loader in loaders]
        seen += [[n for part in step for n in part] for step in zip(*parts, strict=True)]
        states = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(states) == 1
        state = states.pop()
        for loader in loaders:
            loader.close()
    assert seen == whole
    assert_no_threads()


@pytest.mark.parametrize(
    ("saved", "difference"),
    [
        (sample_order(seed=6), r"datasets\[0\]\.seed was 6 and is 5"),
        (sample_order(batch_size=21), "batch_size was 21 and is 20"),
        (
            sample_order(32, 2, 5),
            r"block_samples was 32 and is 16, .*window_blocks was 2 and is 1, .*lanes was 5 and is 4",
        ),
        (sample_order(shuffle=False), "shuffle was False and is True"),
    ],
)
def test_a_position_in_another_order_is_refused(shards: ShardSet, saved: SampleOrder, difference: str) -> None:
    with train_on(shards, saved, MODEL, config(False), steps=range(3)) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
    with train_on(shards, sample_order(), MODEL, config(False), steps=range(3)) as loader:
        with pytest.raises(UserError, match=f"another order of .*: .*{difference}; use the settings"):
            loader.load_state_dict(state)
        assert [b.step for b in loader] == [0, 1, 2]
    with evaluation_loader(shards, MODEL, config(False), batch_size=50) as loader:
        evaluated = loader.state_dict()
        loader.load_state_dict(json.loads(json.dumps(evaluated)))
        with pytest.raises(UserError, match="another order"):
            loader.load_state_dict(state)
    other = evaluation_loader(shards, MODEL, config(False), batch_size=40, max_samples=60)
    with other, pytest.raises(UserError, match="batch_size was 50 and is 40, stride was 1 and is 4"):
        other.load_state_dict(evaluated)


def test_a_loader_that_is_used_up_gives_nothing_more(shards: ShardSet, tmp_path: Path) -> None:
    with train_on(shards, sample_order(), MODEL, config(False), steps=range(3)) as loader:
        assert [b.step for b in loader] == [0, 1, 2] and list(loader) == []
        loader.load_state_dict({**loader.state_dict(), "step": 1})
        assert [b.step for b in loader] == [1, 2]
        with pytest.raises(UserError, match="belongs to another dataset"):
            loader.load_state_dict({**loader.state_dict(), "dataset": "0" * 64})
    loader.load_state_dict({**loader.state_dict(), "step": 0})
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


# --- Bad samples ----------------------------------------------------------------------------------------------------

BAD = {4: b"", 17: b"not a picture", 30: b"\xff\xd8\xff\xe0 nor this", 31: picture(0)[:150]}
CAUSES = {4: "empty", 17: "not_an_image", 30: "damaged", 31: "damaged"}


@pytest.fixture(scope="module")
def with_bad(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Shards somebody else wrote, unchecked: four of 80 samples cannot be decoded."""
    folder = tmp_path_factory.mktemp("bad")
    for shard in range(2):
        with wds.TarWriter(str(folder / f"s-{shard:04d}.tar")) as tar:
            for n in range(40 * shard, 40 * shard + 40):
                tar.write({"__key__": f"{n:03d}", "jpg": BAD.get(n, picture(3 * n)), "cls": str(n)})
    index_existing(LocalStorage(folder))
    return load_dataset(LocalStorage(folder))


@pytest.mark.parametrize("order", ORDERS, ids=name)
def test_bad_samples_are_replaced_alike_on_every_number_of_workers(with_bad: ShardSet, order: SampleOrder) -> None:
    order = SampleOrder(batch_size=BATCH, datasets=(order.datasets[0].model_copy(update={"num_samples": 80}),))
    steps = range(6 * order.batches_per_epoch)
    data = config(True, max_bad_fraction=0.2)
    alone = train_on(with_bad, order, MODEL, data, steps=steps)
    whole = batches(alone)
    asked = np.concatenate([order.draw(step).samples for step in steps])
    bad = np.isin(asked, list(BAD))
    used = np.concatenate([b.samples for b in whole])
    assert bad.sum() > 8 and np.array_equal(used[~bad], asked[~bad]) and not np.isin(used, list(BAD)).any()
    assert sum(alone.bad.counts.values()) == bad.sum()
    assert alone.bad.causes == {f"{n:03d}": cause for n, cause in CAUSES.items() if n in asked}
    for batch in whole:
        assert batch.labels is not None
        assert [int(key) for key in batch.keys] == batch.samples.tolist() == batch.labels.tolist()
    ranks = [
        train_on(with_bad, order, MODEL, config(False, max_bad_fraction=0.2), steps=steps, rank=r, world_size=3)
        for r in range(3)
    ]
    for batch, *parts in zip(whole, *map(batches, ranks), strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert np.array_equal(np.concatenate([part.samples for part in parts]), batch.samples)
    assert sum((loader.bad.counts for loader in ranks), Counter()) == alone.bad.counts


@pytest.mark.parametrize("streamed", [False, True])
def test_evaluation_leaves_bad_samples_out(with_bad: ShardSet, streamed: bool) -> None:
    loader = evaluation_loader(with_bad, MODEL, config(streamed), batch_size=16)
    seen = np.concatenate([b.samples for b in batches(loader)])
    assert seen.tolist() == [n for n in range(80) if n not in BAD]
    assert loader.bad.causes == {f"{n:03d}": cause for n, cause in CAUSES.items()}


def test_bad_samples_are_not_kept_in_memory_by_their_errors(with_bad: ShardSet) -> None:
    order = sample_order(16, 1, 2, 16, num_samples=80)
    gc.disable()  # it would free them in the end
    try:
        with train_on(with_bad, order, MODEL, config(True, max_bad_fraction=0.2), steps=range(15)) as loader:
            assert len(list(loader)) == 15 and loader.bad.causes
        source, deadline = loader._source, time.monotonic() + 10
        assert isinstance(source, StreamedSource)
        while source._count_freed(0.1) or (source._passed and time.monotonic() < deadline):
            pass  # a decoding thread may still hold its last task
        assert source._passed == 0
    finally:
        gc.enable()


def test_too_many_bad_samples_stop_the_loader(with_bad: ShardSet) -> None:
    with pytest.raises(UserError, match=r"unusable, more than data\.max_bad_fraction 0\.001 allows .*not_an_image"):
        batches(evaluation_loader(with_bad, MODEL, config(False, max_bad_fraction=0.001), batch_size=16))
    assert_no_threads()


@pytest.mark.parametrize("streamed", [False, True])
def test_damage_after_indexing_costs_the_samples_around_it(tmp_path: Path, streamed: bool) -> None:
    dataset = pack_items(tmp_path, lambda n: {"png": picture(3 * n + 1)}, 80, shard_samples=80)
    path = tmp_path / dataset.shard_name(0)
    content = bytearray(path.read_bytes())
    start, end, _ = dataset.byte_range(0, 32, 1)
    content[(start + end) // 2] ^= 1
    path.write_bytes(content)
    lost = range(32, 32 + INDEX_STRIDE)
    read = ShardReader(dataset).read(5, 60)
    assert [n for n, sample in enumerate(read, 5) if isinstance(sample, Unreadable)] == list(lost)
    loader = evaluation_loader(dataset, MODEL, config(streamed, max_bad_fraction=1), batch_size=16)
    assert np.concatenate([b.samples for b in batches(loader)]).tolist() == [n for n in range(80) if n not in lost]
    assert loader.bad.counts == {"damaged_shard": INDEX_STRIDE}
    assert all(key.startswith("shard-000000.tar#") for key in loader.bad.causes)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_deleted_or_replaced_shard_stops_the_loader(tmp_path: Path, streamed: bool) -> None:
    dataset = pack_items(tmp_path, lambda n: {"png": picture(3 * n + 1)}, 80, shard_samples=40)
    path = tmp_path / dataset.shard_name(1)
    reader = ShardReader(dataset)
    reader.read(0, 80)
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(Replaced, match=r"shard-000001\.tar was replaced while"):
        reader.read(60, 1)
    for other in (content + b"\0" * 10240, content[:-1], content[:2000], b""):  # before it was read for the first time
        path.write_bytes(bytes(len(other) // 2) + other[len(other) // 2 :])
        with pytest.raises(UserError, match=rf"shard-000001\.tar was replaced .* had {len(content)} bytes"):
            batches(evaluation_loader(dataset, MODEL, config(streamed, max_bad_fraction=1), batch_size=8))
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar does not exist"):
        batches(evaluation_loader(dataset, MODEL, config(streamed), batch_size=8))
    assert_no_threads()


def test_images_of_another_number_of_channels_are_refused(shards: ShardSet) -> None:
    model = MODEL.model_copy(update={"channels": 4})
    with pytest.raises(UserError, match="channels"):
        batches(evaluation_loader(shards, model, config(False), batch_size=8))


# --- Shards whose samples do not lie together -----------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_scattered_and_linked_members_are_read_like_others(tmp_path: Path, streamed: bool) -> None:
    members = [(f"{n:03d}.{suffix}", picture(3 * n) if suffix == "jpg" else str(n % 7).encode())
               for n in range(60) for suffix in ("jpg", "cls")]  # fmt: skip
    for folder, order in (("together", members), ("apart", sorted(members, key=lambda m: (m[0][4:], m[0])))):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "a.tar", "w") as tar:
            for name, content in order:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if folder == "apart" and name == "031.cls":  # the same content as that of 003
                    info.type, info.linkname, info.size = tarfile.LNKTYPE, "003.cls", 0
                tar.addfile(info, io.BytesIO(content))
        index_existing(LocalStorage(tmp_path / folder))
    together, apart = (load_dataset(RecordingStorage(tmp_path / folder)) for folder in ("together", "apart"))
    assert apart.has_table(0) and not together.has_table(0)
    order = sample_order(8, 2, 2, num_samples=60)
    seen = [
        batches(train_on(d, order, MODEL, config(streamed, part_bytes=4096), steps=range(6))) for d in (together, apart)
    ]
    wanted = {f"{n:03d}": n % 7 for n in range(60)}
    assert all(wanted[key] == label for b in seen[1] for key, label in zip(b.keys, b.labels.tolist(), strict=True))
    assert_same(*seen)
    storage = apart.storage
    assert isinstance(storage, RecordingStorage) and len(storage.reads) < 60  # neighbours are read together
    content = bytearray((tmp_path / "apart" / "a.tar").read_bytes())
    content[content.index(picture(3 * 5)) + 40] ^= 1
    (tmp_path / "apart" / "a.tar").write_bytes(content)
    read = ShardReader(apart).read(0, 60)
    assert [n for n, sample in enumerate(read) if isinstance(sample, Unreadable)] == list(range(INDEX_STRIDE))


# --- Cache ----------------------------------------------------------------------------------------------------------


def test_a_cache_on_disk_is_shared_checked_and_limited(shards: ShardSet, tmp_path: Path) -> None:
    storage = shards.storage
    assert isinstance(storage, RecordingStorage)
    order, steps = sample_order(16, 2, 3, batch_size=12), range(5)
    plain = load(shards, order, True, steps)
    data = config(True, cache_dir=str(tmp_path / "cache"))

    def read() -> list[Batch]:
        storage.reads.clear()
        return batches(train_on(shards, order, MODEL, data, steps=steps))

    assert_same(read(), plain)
    assert storage.reads
    assert_same(read(), plain)
    assert not storage.reads  # all came from the cache
    entries = sorted((tmp_path / "cache").glob("??/*"))
    content = bytearray(entries[0].read_bytes())
    content[len(content) // 2] ^= 1
    entries[0].write_bytes(content)
    assert_same(read(), plain)
    assert len(storage.reads) == 1  # the damaged one was fetched again
    entries[1].write_bytes(b"")
    assert_same(read(), plain)
    assert len(storage.reads) == 1 and entries[1].stat().st_size

    cache, size = PartCache(tmp_path / "small", 1000), 300
    names = [hashlib.sha256(bytes([i])).hexdigest() for i in range(10)]
    fetched: list[str] = []

    def get(name: str) -> bytes:
        return cache.get(name, lambda: (fetched.append(name), name.encode()[:1] * size)[1], lambda data: None)

    with ThreadPoolExecutor(4) as pool:  # those who want the same part at once fetch it once
        assert len(set(pool.map(get, names[:1] * 20))) == 1 and len(fetched) == 1
        list(pool.map(get, names * 3))
    kept = list((tmp_path / "small").glob("??/*"))
    assert kept and sum(path.stat().st_size for path in kept) <= 1000
    assert get(names[3]) == names[3].encode()[:1] * size
