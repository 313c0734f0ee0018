"""Order settings of a new run: blocks, windows and lanes that fit the config's byte budgets."""

from __future__ import annotations

from crate_ray.config import DataConfig
from crate_ray.data.order import SampleOrder
from crate_ray.data.shards import INDEX_STRIDE, Manifest
from crate_ray.errors import UserError

_BLOCK_BYTES = 4 * 2**20  # one ranged GET: long against the request's latency, short against the buffer
_MAX_LANES = 32
_BLOCKS_PER_LANE = 20  # at least: up to one block of each lane is left out of an epoch


def plan_order(manifest: Manifest, data: DataConfig, *, batch_size: int, seed: int, workers: int) -> SampleOrder:
    """Order settings of a new run: b, g and L from the config, or from its byte budgets where it leaves them open.

    Parameters: the dataset; the global batch; the number of workers that start the run,
    whose buffers hold lanes owned × g × b × sample bytes, twice for the window ahead.
    Raises UserError when a batch cannot be drawn: too few samples, or a batch size that the lanes do not divide.
    """
    num_samples = manifest.num_samples
    sample_bytes = max(manifest.total_bytes / num_samples, 1.0)
    resident = manifest.total_bytes <= data.memory_bytes
    block = data.block_samples or (
        1 if resident else max(int(_BLOCK_BYTES / sample_bytes) // INDEX_STRIDE, 1) * INDEX_STRIDE
    )
    num_blocks = -(-num_samples // block)
    most_lanes = max(1, min(_MAX_LANES, num_blocks // _BLOCKS_PER_LANE)) if data.shuffle else 1
    lanes = data.lanes or max(n for n in range(1, most_lanes + 1) if batch_size % n == 0)
    window = data.window_blocks
    if window is None:
        owned = min(lanes, -(-lanes // workers) + 1)
        budget = 4096 // block if resident else int(data.buffer_bytes / (2 * owned * block * sample_bytes))
        window = max(1, min(budget, num_blocks // lanes))
    try:
        return SampleOrder(
            num_samples=num_samples,
            batch_size=batch_size,
            block_samples=block,
            window_blocks=window,
            lanes=lanes,
            seed=seed,
            shuffle=data.shuffle,
        )
    except ValueError as error:
        raise UserError(str(error).split("Value error, ")[-1].split(" [type=")[0]) from None
