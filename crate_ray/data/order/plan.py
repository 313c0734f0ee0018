"""Order of a new run: blocks, windows and lanes that fit the byte budgets in the settings."""

from __future__ import annotations

from math import ceil

from crate_ray.config import DataConfig
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.order.dataset_order import DatasetOrder
from crate_ray.data.order.hashing import hash64
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.sequence import SampleOrder
from crate_ray.errors import UserError

_BLOCK_BYTES = 2 * 2**20  # one ranged GET: large enough to hide its latency, small compared to the buffer
_MIN_WINDOW_BLOCKS = 8  # with fewer blocks per window, use smaller blocks: samples of a block stay together
_MAX_LANES = 32
_MAX_OVERHEAD = 0.25  # share of extra samples that are read with a block; use larger blocks if the buffer has room
_WINDOWS_HELD = 2.25  # windows in the buffer per lane: the current and the next one, with a margin for large samples
_MIN_BLOCKS_PER_LANE = 20  # up to one block of each lane is left out of an epoch


def plan_order(mixture: Mixture, data: DataConfig, *, batch_size: int, seed: int, workers: int) -> SampleOrder:
    """Order of a new run: b, g and L from the settings, or from the byte budgets if they are not set.

    A worker's buffer holds (lanes that it draws from) × g × b samples. It holds this number twice, because windows are
    read ahead, with a margin. If blocks start between two index entries, the extra samples that are read count too.

    Args:
        mixture: the datasets.
        data: settings and byte budgets.
        batch_size: global batch B.
        seed: seed of the run.
        workers: number of workers that start the run.

    Raises:
        UserError: there are too few samples to fill a batch.
    """
    resident = mixture.total_bytes <= data.memory_bytes
    total = sum(mixture.weights)
    try:
        return SampleOrder(
            batch_size=batch_size,
            datasets=tuple(
                _plan_dataset(
                    dataset,
                    data,
                    resident=resident,
                    drawn=batch_size * weight / total,
                    buffer_bytes=data.buffer_bytes * weight / total,
                    seed=int(hash64(seed, number)[0]) if number else seed,
                    workers=workers,
                )
                for number, (dataset, weight) in enumerate(zip(mixture.datasets, mixture.weights, strict=True))
            ),
            weights=mixture.weights,
        )
    except ValueError as error:
        raise UserError(str(error).split("Value error, ")[-1].split(" [type=")[0]) from None


def _plan_dataset(
    dataset: ShardSet, data: DataConfig, *, resident: bool, drawn: float, buffer_bytes: float, seed: int, workers: int
) -> DatasetOrder:
    """Order of one dataset.

    Args:
        dataset: the dataset.
        data: settings.
        resident: whether all data stays in memory.
        drawn: samples in each batch.
        buffer_bytes: share of a worker's buffer.
        seed: seed of the permutations.
        workers: number of workers that start the run.
    """
    manifest = dataset.manifest
    sample_bytes = max(manifest.total_bytes / manifest.num_samples, 1.0)
    beside = 0.0 if resident else _samples_beside(dataset)  # samples that are read with a block but are not in it
    block = data.block_samples
    if block is None:
        room = buffer_bytes / (_WINDOWS_HELD * min(_MAX_LANES, _MAX_LANES // workers + 2)) / sample_bytes
        strides = int(min(_BLOCK_BYTES / sample_bytes, room / _MIN_WINDOW_BLOCKS - beside)) // INDEX_STRIDE
        least = min(ceil(beside / _MAX_OVERHEAD / INDEX_STRIDE), int(room - beside) // INDEX_STRIDE)
        block = 1 if resident else max(strides, least, 1) * INDEX_STRIDE
    elif block % INDEX_STRIDE and not resident:
        beside = INDEX_STRIDE - 1.0
    num_blocks = -(-manifest.num_samples // block)
    # Data in memory is shuffled sample by sample, so lanes would add nothing.
    most_lanes = min(_MAX_LANES, num_blocks // _MIN_BLOCKS_PER_LANE, int(drawn)) if data.shuffle and not resident else 1
    lanes = data.lanes or max(1, most_lanes)
    window = data.window_blocks
    if window is None:
        owned = lanes // workers if lanes % workers == 0 else min(lanes, lanes // workers + 2)
        read_bytes = (block + beside) * sample_bytes
        budget = 4096 // block if resident else int(buffer_bytes / (_WINDOWS_HELD * owned * read_bytes))
        window = max(1, min(budget, num_blocks // lanes))
    return DatasetOrder(
        num_samples=manifest.num_samples,
        block_samples=block,
        window_blocks=window,
        lanes=lanes,
        seed=seed,
        shuffle=data.shuffle,
    )


def _samples_beside(dataset: ShardSet) -> float:
    """Average number of samples that are read with a block but are not in it, because index entries are read whole.

    Zero if all blocks start at index entries, that is if all shards except the last hold a multiple of 16 samples. Also
    zero for shards with a table, whose members are read one by one.
    """
    begin_between = (dataset.first_sample[:-1] % INDEX_STRIDE != 0) & (dataset.shards["table"] == 0)
    return INDEX_STRIDE * int(dataset.samples[begin_between].sum()) / dataset.manifest.num_samples
