"""Order settings of a new run: blocks, windows and lanes that fit the config's byte budgets."""

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

_BLOCK_BYTES = 2 * 2**20  # one ranged GET: long against the request's latency, short against the buffer
_LEAST_WINDOW_BLOCKS = 8  # smaller blocks, rather than fewer to a window: what is close together mixes worst
_MAX_LANES = 32
_MOST_OVERHEAD = 0.25  # of samples read beside a block's own: rather larger blocks, as far as the buffer has room
_WINDOWS_HELD = 2.25  # in the buffer, per lane: the current one and the next, whose samples may be larger than most
_BLOCKS_PER_LANE = 20  # at least: up to one block of each lane is left out of an epoch


def plan_order(mixture: Mixture, data: DataConfig, *, batch_size: int, seed: int, workers: int) -> SampleOrder:
    """Order settings of a new run: b, g and L from the config, or from its byte budgets where it leaves them open.

    Parameters: the datasets; the global batch; the number of workers that start the run,
    whose buffers hold lanes owned × g × b × sample bytes, twice for the window ahead, and some room. Blocks that begin
    between two entries of the index count with the samples that are read beside their own.
    Raises UserError when a batch cannot be drawn: too few samples.
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
    """Order of one dataset, of which each batch draws so many samples, and a worker's buffer holds so many bytes."""
    manifest = dataset.manifest
    sample_bytes = max(manifest.total_bytes / manifest.num_samples, 1.0)
    beside = 0.0 if resident else _samples_beside(dataset)  # samples that are read with a block and are not of it
    block = data.block_samples
    if block is None:
        room = buffer_bytes / (_WINDOWS_HELD * min(_MAX_LANES, _MAX_LANES // workers + 2)) / sample_bytes
        strides = int(min(_BLOCK_BYTES / sample_bytes, room / _LEAST_WINDOW_BLOCKS - beside)) // INDEX_STRIDE
        least = min(ceil(beside / _MOST_OVERHEAD / INDEX_STRIDE), int(room - beside) // INDEX_STRIDE)
        block = 1 if resident else max(strides, least, 1) * INDEX_STRIDE
    elif block % INDEX_STRIDE and not resident:
        beside = INDEX_STRIDE - 1.0
    num_blocks = -(-manifest.num_samples // block)
    # What is in memory is shuffled sample by sample: lanes have nothing to add.
    most_lanes = min(_MAX_LANES, num_blocks // _BLOCKS_PER_LANE, int(drawn)) if data.shuffle and not resident else 1
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
    """Samples read on average with a block, of whole index entries, that are not of it.

    None where blocks begin at entries of the index: where every shard before holds a multiple of 16 samples. Where
    samples do not lie together, members are read by themselves.
    """
    begin_between = (dataset.first_sample[:-1] % INDEX_STRIDE != 0) & (dataset.shards["table"] == 0)
    return INDEX_STRIDE * int(dataset.samples[begin_between].sum()) / dataset.manifest.num_samples
