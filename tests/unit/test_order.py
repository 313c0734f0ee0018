"""Properties of the data order: a permutation, independent of the workers, unbiased, addressed by one integer."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.config import DataConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.index import INDEX_DTYPE, INDEX_STRIDE, SHARD_DTYPE
from crate_ray.data.format.manifest import Manifest
from crate_ray.data.order.dataset_order import DatasetOrder
from crate_ray.data.order.hashing import hash64, permute, uniform
from crate_ray.data.order.mixture import Mixture, whole_weights
from crate_ray.data.order.plan import plan_order
from crate_ray.data.order.sequence import SampleOrder, worker_slots
from crate_ray.errors import UserError
from crate_ray.storage.local import LocalStorage


@st.composite
def dataset_orders(draw: st.DrawFn, batch_size: int) -> DatasetOrder:
    lanes, block, window = draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    least = lanes * block * 2 + batch_size + lanes
    return DatasetOrder(
        num_samples=draw(st.integers(least, least + 300)),
        block_samples=block,
        window_blocks=window,
        lanes=lanes,
        seed=draw(st.integers(0, 2**63)),
        shuffle=draw(st.booleans()),
    )


@st.composite
def orders(draw: st.DrawFn, most_datasets: int = 3) -> SampleOrder:
    batch_size = draw(st.integers(1, 40))
    datasets = draw(st.lists(dataset_orders(batch_size), min_size=1, max_size=most_datasets))
    weights = draw(st.lists(st.integers(1, 50), min_size=len(datasets), max_size=len(datasets)))
    return SampleOrder(batch_size=batch_size, datasets=tuple(datasets), weights=tuple(weights))


def one_dataset(batch_size: int, **values: Any) -> SampleOrder:
    return SampleOrder(batch_size=batch_size, datasets=(DatasetOrder(**values),))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_and_inverse_undoes_it(size: int, key: int) -> None:
    positions = np.arange(size)
    image = permute(positions, size, key)
    assert np.array_equal(np.sort(image), positions)
    assert np.array_equal(permute(image, size, key, inverse=True), positions)


def test_permute_spreads_every_element_over_every_place() -> None:
    # 40 × 40 counts over 1,500 keys: chi-square of a uniform law stays near its 1,521 degrees of freedom.
    size, keys = 40, 1500
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, key)] += 1
    chi2 = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert abs(chi2 - (size - 1) ** 2) < 5 * np.sqrt(2 * (size - 1) ** 2)


def test_hash_is_fixed_for_ever() -> None:
    # A change of these numbers would silently change the data order of every run that resumes.
    assert [int(v) for v in hash64(1, np.arange(3))] == [
        11697650158695045367,
        7828417261637933830,
        14775472578978778478,
    ]
    u = uniform(3, np.arange(20000))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.03


@given(orders(most_datasets=1), st.integers(0, 3))
def test_every_sample_at_most_once_per_epoch(order: SampleOrder, epoch: int) -> None:
    steps = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
    batches = [order.draw(t) for t in steps]
    assert all(len(batch.samples) == order.batch_size for batch in batches)
    assert all((batch.epochs == epoch).all() for batch in batches)
    seen = np.concatenate([batch.samples for batch in batches])
    assert len(np.unique(seen)) == len(seen) and seen.min() >= 0 and seen.max() < order.num_samples
    # Left out: less than a batch, a ragged block for each lane, and a block for each lane of the last round.
    lanes, block = order.datasets[0].lanes, order.datasets[0].block_samples
    assert order.num_samples - len(seen) < order.batch_size + 2 * lanes * block


@given(orders(), st.integers(0, 100))
def test_datasets_are_drawn_by_weight_and_each_epoch_of_one_has_its_samples_once(
    order: SampleOrder, start: int
) -> None:
    steps = range(start, start + 30)
    drawn = [order.draw(t) for t in steps]
    samples = np.concatenate([d.samples for d in drawn])
    epochs = np.concatenate([d.epochs for d in drawn])
    total = sum(order.weights)
    for number, (dataset, weight) in enumerate(zip(order.datasets, order.weights, strict=True)):
        first, end = order.first_sample[number : number + 2]
        own = (samples >= first) & (samples < end)
        pairs = np.stack([epochs[own], samples[own]])
        assert len(np.unique(pairs, axis=1).T) == own.sum()  # no sample twice in an epoch of its dataset
        assert (np.diff(np.concatenate([d.epochs[(d.samples >= first) & (d.samples < end)] for d in drawn])) >= 0).all()
        # The share of every stretch of steps is exact but for the rounding of this dataset and those before it.
        assert abs(own.sum() - 30 * order.batch_size * weight / total) <= 2 * (number + 1)
        assert order.drawn_before(start + 30)[number] - order.drawn_before(start)[number] == own.sum()
        if order.drawn_before(start)[number] == 0 and own.sum() >= dataset.drawn_per_epoch and len(order.datasets) > 1:
            assert (epochs[own] == 0).sum() == dataset.drawn_per_epoch
    assert sum(order.drawn_before(start)) == start * order.batch_size


@given(orders(), st.integers(0, 100), st.integers(1, 40), st.integers(1, 9))
def test_global_batch_is_the_same_for_every_number_of_workers(
    order: SampleOrder, step: int, workers: int, micro_batch: int
) -> None:
    workers = min(workers, order.batch_size)
    slots = [worker_slots(order.batch_size, w, workers) for w in range(workers)]
    sizes = [stop - start for start, stop in slots]
    assert max(sizes) - min(sizes) <= 1
    # Each worker draws its slots in one piece, or micro-batch by micro-batch.
    whole = order.draw(step)
    for pieces in (slots, [(i, min(i + micro_batch, e)) for b, e in slots for i in range(b, e, micro_batch)]):
        parts = [order.draw(step, *span) for span in pieces]
        assert np.array_equal(np.concatenate([part.samples for part in parts]), whole.samples)
        assert np.array_equal(np.concatenate([part.epochs for part in parts]), whole.epochs)


@given(orders(), st.integers(0, 60), st.integers(1, 5))
def test_windows_name_where_a_workers_samples_come_from(order: SampleOrder, step: int, workers: int) -> None:
    workers = min(workers, order.batch_size)
    for worker in range(workers):
        span = worker_slots(order.batch_size, worker, workers)
        windows = order.windows(step, *span)
        named = {sample for window in windows for block in order.blocks(window) for sample in block}
        assert set(order.draw(step, *span).samples.tolist()) <= named
        assert named == {sample for window in windows for sample in order.window_samples(window).tolist()}


@pytest.mark.parametrize(("samples", "block"), [(103, 1), (103, 4), (104, 4)])
def test_leftovers_favour_no_sample(samples: int, block: int) -> None:
    order = one_dataset(12, num_samples=samples, block_samples=block, window_blocks=3, lanes=3, seed=7)
    epochs = 200
    used = Counter(s for t in range(epochs * order.batches_per_epoch) for s in order.draw(t).samples.tolist())
    counts = np.array([used[s] for s in range(samples)])
    share = counts.mean() / epochs
    assert share < 1  # some are left out, or there is nothing to test
    deviation = np.sqrt(epochs * share * (1 - share))
    assert np.abs(counts - counts.mean()).max() < 5 * deviation


def test_epochs_and_seeds_differ_and_blocks_mix() -> None:
    sizes = {"num_samples": 4000, "block_samples": 5, "window_blocks": 4, "lanes": 8}
    order = one_dataset(40, **sizes, seed=1)
    first, again = order.draw(0).samples, order.draw(order.batches_per_epoch).samples
    assert len(np.intersect1d(first, again)) < 10
    assert len(np.intersect1d(first, one_dataset(40, **sizes, seed=2).draw(0).samples)) < 10
    assert len(np.unique(first // 5)) > 15


def mixture(num_samples: int, total_bytes: int, shard_samples: int = 1024) -> Mixture:
    described = {"kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 3}
    measured = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "num_measured": 1}
    digests = {"shards_sha256": "0" * 64, "index_sha256": "0" * 64}
    shards = np.zeros(-(-num_samples // shard_samples), SHARD_DTYPE)
    shards["samples"] = np.diff(np.minimum(np.arange(len(shards) + 1) * shard_samples, num_samples))
    counts = {"num_samples": num_samples, "num_shards": len(shards), "total_bytes": total_bytes}
    manifest = Manifest.model_validate({**counts, **described, **measured, **digests})
    return Mixture.of(ShardSet(LocalStorage(Path("unused")), manifest, shards, np.empty(0, INDEX_DTYPE)))


def test_planned_order_fits_budgets_and_explains_what_does_not_fit() -> None:
    data = DataConfig(train="x", memory_bytes=1, buffer_bytes=64 * 2**20)
    order = plan_order(mixture(1_281_167, 140 * 2**30), data, batch_size=4096, seed=0, workers=8)
    dataset, sample_bytes = order.datasets[0], 140 * 2**30 / 1_281_167
    owned = dataset.lanes // 8 + 1
    assert 2 * owned * dataset.window_blocks * dataset.block_samples * sample_bytes <= 64 * 2**20
    assert dataset.block_samples % 16 == 0 and order.batches_per_epoch >= 310
    small = plan_order(mixture(1000, 10**6), DataConfig(train="x"), batch_size=64, seed=0, workers=2)
    assert small.datasets[0].block_samples == 1 and small.batches_per_epoch == 15
    uneven = plan_order(mixture(1000, 10**6), DataConfig(train="x", lanes=3), batch_size=64, seed=0, workers=2)
    assert uneven.datasets[0].lanes == 3 and uneven.batches_per_epoch == 15
    with pytest.raises(UserError, match="do not fill one batch of 64"):
        plan_order(mixture(50, 10**6), DataConfig(train="x"), batch_size=64, seed=0, workers=2)


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("shard_samples", [1000, 999, 500, 40])
def test_blocks_that_begin_between_index_entries_are_large_enough(shard_samples: int, workers: int) -> None:
    num_samples, sample_bytes = 200_000, 117_000
    data = DataConfig(train="x", memory_bytes=1)

    def plan(shard_samples: int, **values: Any) -> DatasetOrder:
        settings = data.model_copy(update=values)
        found = mixture(num_samples, num_samples * sample_bytes, shard_samples)
        return plan_order(found, settings, batch_size=1024, seed=0, workers=workers).datasets[0]

    def samples_read(order: DatasetOrder, first: int) -> int:
        """Number of samples that are read for the block at `first`, in whole index entries of its shards."""
        count, stop = 0, min(first + order.block_samples, order.num_samples)
        while first < stop:
            begin = first // shard_samples * shard_samples
            size = min(shard_samples, order.num_samples - begin)
            last = min(stop - begin, size)
            count += min(-(-last // INDEX_STRIDE) * INDEX_STRIDE, size) - (first - begin) // INDEX_STRIDE * INDEX_STRIDE
            first = begin + last
        return count

    order, aligned = plan(shard_samples), plan(1024)
    read = [samples_read(order, first) for first in range(0, num_samples, order.block_samples)]
    assert sum(read) <= 1.27 * num_samples
    owned = -(-order.lanes // workers)
    assert 2 * owned * order.window_blocks * np.mean(read) * sample_bytes <= data.buffer_bytes
    assert order.lanes * order.window_blocks * order.block_samples > 0.4 * (
        aligned.lanes * aligned.window_blocks * aligned.block_samples
    )
    assert aligned.block_samples == 16 == plan(num_samples).block_samples
    assert plan(shard_samples, block_samples=48).block_samples == 48
    assert plan(shard_samples, memory_bytes=2**40) == plan(1024, memory_bytes=2**40)


def test_weights_are_the_decimals_that_were_written() -> None:
    assert whole_weights((0.7, 0.3)) == (7, 3) and whole_weights((2, 1.0, 0.001)) == (2000, 1000, 1)
    assert whole_weights((1e-3, 1e-3)) == (1, 1)
