"""Properties of the data order: a permutation, independent of the workers, unbiased, addressed by one integer."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import DataConfig
from crate_ray.data.order import SampleOrder, hash64, permute, uniform, worker_slots
from crate_ray.data.plan import plan_order
from crate_ray.data.shards import Manifest
from crate_ray.errors import UserError


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    lanes = draw(st.integers(1, 6))
    per_lane, block, window = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    least = lanes * (per_lane + block) * 2
    return SampleOrder(
        num_samples=draw(st.integers(least, least + 300)),
        batch_size=lanes * per_lane,
        block_samples=block,
        window_blocks=window,
        lanes=lanes,
        seed=draw(st.integers(0, 2**63)),
        shuffle=draw(st.booleans()),
    )


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
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


@given(orders(), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_sample_at_most_once_per_epoch(order: SampleOrder, epoch: int) -> None:
    steps = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
    batches = [order.samples(t) for t in steps]
    assert all(len(batch) == order.batch_size for batch in batches)
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen) and seen.min() >= 0 and seen.max() < order.num_samples
    # Left out: less than a batch, a ragged block for each lane, and a block for each lane of the last round.
    assert order.num_samples - len(seen) < order.batch_size + 2 * order.lanes * order.block_samples


@given(orders(), st.integers(0, 100), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_global_batch_is_the_same_for_every_number_of_workers(order: SampleOrder, step: int, workers: int) -> None:
    workers = min(workers, order.batch_size)
    slots = [worker_slots(order.batch_size, w, workers) for w in range(workers)]
    sizes = [stop - start for start, stop in slots]
    assert max(sizes) - min(sizes) <= 1
    parts = [order.samples(step, *span) for span in slots]
    assert np.array_equal(np.concatenate(parts), order.samples(step))


@given(orders(), st.integers(0, 60), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_windows_name_where_a_workers_samples_come_from(order: SampleOrder, step: int, workers: int) -> None:
    workers = min(workers, order.batch_size)
    for worker in range(workers):
        span = worker_slots(order.batch_size, worker, workers)
        blocks = np.concatenate([order.window_blocks_of(*window) for window in order.windows(step, *span)])
        assert set(order.samples(step, *span) // order.block_samples) <= set(blocks)


@pytest.mark.parametrize(("samples", "block"), [(103, 1), (103, 4), (104, 4)])
def test_leftovers_favour_no_sample(samples: int, block: int) -> None:
    order = SampleOrder(num_samples=samples, batch_size=12, block_samples=block, window_blocks=3, lanes=3, seed=7)
    epochs = 200
    used = Counter(s for t in range(epochs * order.batches_per_epoch) for s in order.samples(t).tolist())
    counts = np.array([used[s] for s in range(samples)])
    share = counts.mean() / epochs
    assert share < 1  # some are left out, or there is nothing to test
    deviation = np.sqrt(epochs * share * (1 - share))
    assert np.abs(counts - counts.mean()).max() < 5 * deviation


def test_epochs_and_seeds_differ_and_blocks_mix() -> None:
    order = SampleOrder(num_samples=4000, batch_size=40, block_samples=5, window_blocks=4, lanes=8, seed=1)
    first, again = order.samples(0), order.samples(order.batches_per_epoch)
    assert len(np.intersect1d(first, again)) < 10
    assert len(np.intersect1d(first, order.model_copy(update={"seed": 2}).samples(0))) < 10
    assert len(np.unique(first // 5)) > 15


def dataset(num_samples: int, total_bytes: int) -> Manifest:
    described = {"kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 3}
    measured = {"mean": (0.5,), "std": (0.2,), "num_measured": 1, "shards_sha256": "", "index_sha256": ""}
    return Manifest(num_samples=num_samples, num_shards=1, total_bytes=total_bytes, **described, **measured)


def test_planned_order_fits_budgets_and_explains_what_does_not_fit() -> None:
    data = DataConfig(train="x", memory_bytes=1, buffer_bytes=64 * 2**20)
    order = plan_order(dataset(1_281_167, 140 * 2**30), data, batch_size=4096, seed=0, workers=8)
    sample_bytes = 140 * 2**30 / 1_281_167
    owned = order.lanes // 8 + 1
    assert 2 * owned * order.window_blocks * order.block_samples * sample_bytes <= 64 * 2**20
    assert order.block_samples % 16 == 0 and order.batches_per_epoch >= 310
    small = plan_order(dataset(1000, 10**6), DataConfig(train="x"), batch_size=64, seed=0, workers=2)
    assert small.block_samples == 1 and small.batches_per_epoch == 15
    with pytest.raises(UserError, match="batch size 64 is not a multiple of the 3 lanes"):
        plan_order(dataset(1000, 10**6), DataConfig(train="x", lanes=3), batch_size=64, seed=0, workers=2)
    with pytest.raises(UserError, match="do not fill one batch of 64"):
        plan_order(dataset(50, 10**6), DataConfig(train="x"), batch_size=64, seed=0, workers=2)
