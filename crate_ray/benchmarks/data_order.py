"""Measures the cost of the data order for a billion samples, and how well the order mixes sorted shards.

Planning is measured in a new process, `python -m crate_ray.benchmarks.data_order FOLDER`, which reads settings and
writes figures as JSON. Mixing is computed for a dataset that is sorted by class, as class folders are often packed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from crate_ray.benchmarks.machine import describe_machine
from crate_ray.config import BenchmarkOrderConfig, DataConfig
from crate_ray.data.format.dataset import ShardSet, load_dataset, save_dataset
from crate_ray.data.format.index import INDEX_DTYPE, INDEX_STRIDE, SHARD_DTYPE
from crate_ray.data.format.manifest import Manifest
from crate_ray.data.format.tar import BLOCK
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.plan import plan_order
from crate_ray.data.order.sequence import worker_slots
from crate_ray.data.read.mixture import MixtureReader
from crate_ray.storage.local import LocalStorage

_MEASURED_BATCHES = 12
_STOCK_BUFFER = 1000  # samples, as in webdataset's documentation
_STOCK_PROCESSES = 4  # loader processes of each worker


def write_synthetic(folder: Path, num_shards: int, shard_samples: int, sample_bytes: int) -> None:
    """Write the manifest and index of a dataset whose shards do not exist."""
    entries = -(-shard_samples // INDEX_STRIDE)
    shards = np.zeros(num_shards, SHARD_DTYPE)
    shards["samples"], shards["bytes"] = shard_samples, shard_samples * sample_bytes
    index = np.zeros((num_shards, entries), INDEX_DTYPE)
    index["block"] = np.arange(entries) * (INDEX_STRIDE * sample_bytes // BLOCK)
    described = {"kind": "image", "image_suffixes": ("jpg",), "suffixes": ("cls", "jpg"), "channels": 3}
    measured = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "num_measured": 1}
    names = [f"shard-{number:07d}.tar" for number in range(num_shards)]
    save_dataset(LocalStorage(folder), names, shards, [index.ravel()], **described, **measured)


def measure_planning(folder: Path, config: BenchmarkOrderConfig) -> dict[str, float]:
    """Open a dataset, plan a run on it, and locate the samples of one worker's steps. Returns seconds and bytes."""
    before, began = _memory(), time.perf_counter()
    mixture = Mixture.of(load_dataset(LocalStorage(folder)))
    opened = time.perf_counter()
    data = _data_config(config)
    order = plan_order(mixture, data, batch_size=config.batch_size, seed=0, workers=config.workers)
    reader, slots = MixtureReader(mixture, data), worker_slots(config.batch_size, 1, config.workers)
    windows = order.windows(0, *slots)
    num_bytes = sum(reader.num_bytes(block) for window in windows for block in order.blocks(window))
    order.draw(0, *slots)
    planned = time.perf_counter()
    steps = np.linspace(1, 3 * order.batches_per_epoch, 200).astype(int).tolist()
    for step in steps:
        order.draw(step, *slots)
    return {
        "open_seconds": opened - began,
        "plan_seconds": planned - opened,
        "far_step_seconds": (time.perf_counter() - planned) / len(steps),
        **{name: now - before[name] for name, now in _memory().items()},
        "window_bytes": float(num_bytes),
    }


def _memory() -> dict[str, float]:
    """Bytes of this process's own memory, and of mapped files. A node's workers share the files' pages."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = {name: float(values[0]) * 1024 for name, *values in lines if name in ("RssAnon:", "RssFile:")}
    return {"own_memory_bytes": fields["RssAnon:"], "mapped_memory_bytes": fields["RssFile:"]}


def distinct_classes(config: BenchmarkOrderConfig) -> dict[str, float]:
    """Mean number of classes in a batch from data sorted by class: with our order, webdataset's, and uniform sampling.

    webdataset permutes the shards, splits them among workers and their processes, and shuffles in a buffer in each
    process. The buffer has the documented size, or as many bytes as ours.
    """
    size, batch = config.class_samples, config.batch_size
    num_samples = config.classes * size
    num_shards = -(-num_samples // config.shard_samples)
    total_bytes = num_samples * config.sample_bytes
    shards = np.zeros(num_shards, SHARD_DTYPE)
    described = {"kind": "image", "image_suffixes": ("jpg",), "suffixes": ("jpg",), "channels": 3}
    measured = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "num_measured": 1}
    digests = {"shards_sha256": "0" * 64, "index_sha256": "0" * 64}
    manifest = {
        "num_samples": num_samples,
        "num_shards": num_shards,
        "total_bytes": total_bytes,
        **described,
        **measured,
        **digests,
    }
    dataset = ShardSet(LocalStorage(Path()), Manifest.model_validate(manifest), shards, np.zeros(0, INDEX_DTYPE))
    order = plan_order(Mixture.of(dataset), _data_config(config), batch_size=batch, seed=0, workers=config.workers)
    steps = np.linspace(0, order.batches_per_epoch - 1, _MEASURED_BATCHES).astype(int).tolist()
    random = np.random.default_rng(0)
    buffer = config.buffer_bytes // config.sample_bytes // _STOCK_PROCESSES
    return {
        "ours": float(np.mean([len(np.unique(order.draw(step).samples // size)) for step in steps])),
        "stock": _stock_classes(config, _STOCK_BUFFER),
        "stock_with_our_memory": _stock_classes(config, buffer),
        "uniform": float(
            np.mean([len(np.unique(random.choice(num_samples, batch, replace=False) // size)) for _ in steps])
        ),
        "block_samples": float(order.datasets[0].block_samples),
    }


def _stock_classes(config: BenchmarkOrderConfig, buffer: int) -> float:
    num_samples = config.classes * config.class_samples
    shards = np.random.default_rng(1).permutation(-(-num_samples // config.shard_samples))
    readers = []
    for worker in range(config.workers):
        for process in range(_STOCK_PROCESSES):
            classes = _class_numbers(config, shards[worker :: config.workers][process::_STOCK_PROCESSES].tolist())
            readers.append(iter(wds.shuffle(buffer, initial=buffer)(classes)))
    counts = []
    for number in range(_MEASURED_BATCHES):
        seen: set[int] = set()
        for worker in range(config.workers):  # a DataLoader takes whole batches from its processes in turn
            first, last = worker_slots(config.batch_size, worker, config.workers)
            seen.update(islice(readers[worker * _STOCK_PROCESSES + number % _STOCK_PROCESSES], last - first))
        counts.append(len(seen))
    return float(np.mean(counts))


def _class_numbers(config: BenchmarkOrderConfig, shards: list[int]) -> Iterator[int]:
    """Classes of the samples of these shards, again and again."""
    while True:
        for shard in shards:
            first = shard * config.shard_samples
            last = min(first + config.shard_samples, config.classes * config.class_samples)
            yield from (sample // config.class_samples for sample in range(first, last))


def _data_config(config: BenchmarkOrderConfig) -> DataConfig:
    return DataConfig(train="synthetic", memory_bytes=1, buffer_bytes=config.buffer_bytes)


def measure_order(config: BenchmarkOrderConfig) -> dict[str, Any]:
    """Every figure, as plain data."""
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder), config.num_shards, config.shard_samples, config.sample_bytes)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "crate_ray.benchmarks.data_order", folder],
            input=config.model_dump_json(by_alias=True), stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return {
        "planning": json.loads(done.stdout.splitlines()[-1]),
        "distinct_classes": distinct_classes(config),
        "machine": describe_machine(),
        "settings": config.model_dump(mode="json", exclude={"json_file"}),
    }


if __name__ == "__main__":
    settings = BenchmarkOrderConfig.model_validate_json(sys.stdin.read())
    print(json.dumps(measure_planning(Path(sys.argv[1]), settings)))
