"""Speed and memory of our loader and of stock webdataset, on the same shards, to the same batches.

Each contestant runs in a fresh process, `python -m crate_ray.benchmarks.data_loading`: task in, measurement out, JSON.
"""

from __future__ import annotations

import functools
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from crate_ray.benchmarks.machine import describe_machine, peak_memory
from crate_ray.config import BenchmarkDataConfig, DataConfig, ImageModelConfig, S3Config
from crate_ray.data.loader import training_loader
from crate_ray.data.mixture import Mixture
from crate_ray.data.plan import plan_order
from crate_ray.data.s3_client import S3Client
from crate_ray.data.shards import ShardSet, load_dataset
from crate_ray.data.storage import open_storage
from crate_ray.errors import UserError

Contestant = Literal["crate_ray", "webdataset"]
_CHANNELS = 3
_SHUFFLE_BUFFER = 1000  # samples; what webdataset's documentation takes
_STARTING_SECONDS = 300.0  # for imports and the first batch of the slowest store


class Task(BaseModel):
    """What one contestant has to do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contestant: Contestant
    processes: int
    """Loader processes of webdataset; our loader has threads in one process."""
    uri: str
    image_size: int
    batch_size: int
    seconds: float
    memory_bytes: int
    s3: S3Config


class Measurement(BaseModel):
    """What one contestant did."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contestant: Contestant
    processes: int
    images_per_second: float
    images_per_second_per_core: float
    """Divided by the cores that the process may use, busy or not."""
    bytes_per_second: float
    """Bytes of the shards, tar headers included, that those images are stored in."""
    first_batch_seconds: float
    """From opening the dataset, libraries imported, to the first batch."""
    peak_memory_bytes: int | None
    """Sum of the largest resident sizes of all its processes, where Linux tells; pages that processes share count in
    each of them."""


class Answer(BaseModel):
    """What a contestant's process prints: one of the two."""

    measurement: Measurement | None = None
    error: str | None = None


# --- The contestants ------------------------------------------------------------------------------------------------


@contextmanager
def our_batches(shards: ShardSet, task: Task) -> Iterator[Iterator[Tensor]]:
    """Batches (B, 3, S, S), uint8, of our loader, epoch after epoch."""
    model = ImageModelConfig(image_size=task.image_size, patch_size=1, channels=_CHANNELS)
    data = DataConfig(train=task.uri, memory_bytes=task.memory_bytes)
    mixture = Mixture.of(shards)
    order = plan_order(mixture, data, batch_size=task.batch_size, seed=0, workers=1)
    with training_loader(mixture, order, model, data, steps=range(2**31)) as loader:
        yield (batch.images for batch in loader)


@contextmanager
def webdataset_batches(shards: ShardSet, task: Task) -> Iterator[Iterator[Tensor]]:
    """The same of webdataset, Pillow and WebLoader. Shards are resampled, so that every process has one at any time."""
    wds.gopen_schemes["s3"] = functools.partial(_open_object, task.s3)  # stock webdataset starts programs to read S3
    suffixes = shards.manifest.image_suffixes
    crop = functools.partial(random_resized_crop, size=task.image_size)
    dataset = (
        wds.WebDataset(_shard_urls(shards), resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(_SHUFFLE_BUFFER)
        .decode("pilrgb", only=list(suffixes))
        .to_tuple(";".join(suffixes))
        .map_tuple(crop)
        .batched(task.batch_size, partial=False)
    )
    yield (batch[0] for batch in wds.WebLoader(dataset, batch_size=None, num_workers=task.processes))


def random_resized_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Crop, resize (bicubic) and mirror as torchvision does by default of the loader: (3, size, size), uint8."""
    (low, high), ratio = DataConfig.model_fields["crop_scale"].default, DataConfig.model_fields["crop_ratio"].default
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(low, high)
        aspect = math.exp(random.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).transpose(2, 0, 1)


def _shard_urls(shards: ShardSet) -> list[str]:
    names, storage = map(shards.shard_name, range(shards.manifest.num_shards)), shards.shard_storage
    return [str(storage.local_path(name) or f"{storage.uri}/{name}") for name in names]


def _open_object(s3: S3Config, url: str, mode: str = "rb", bufsize: int = 0) -> Any:
    """A stream of an object, for webdataset."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return _client(s3).request(f"read {url}", lambda client, _: client.get_object(Bucket=bucket, Key=key)["Body"])


@functools.cache
def _client(s3: S3Config) -> S3Client:
    return S3Client(s3)


_BATCHES = {"crate_ray": our_batches, "webdataset": webdataset_batches}


# --- In the contestant's process ------------------------------------------------------------------------------------


def measure(task: Task) -> Measurement:
    """Load batches for a while. Batches of the first moments are not counted: some were prepared with the first one.

    Raises UserError when the dataset cannot be read, or does not hold images.
    """
    began = time.perf_counter()
    shards = load_dataset(open_storage(task.uri, task.s3))
    manifest = shards.manifest
    if manifest.kind != "image":
        raise UserError(f"{task.uri} holds {manifest.kind}s; the data benchmark compares loaders of encoded images")
    with _BATCHES[task.contestant](shards, task) as batches:
        shape = tuple(next(batches).shape)
        first = time.perf_counter()
        expected = (task.batch_size, _CHANNELS, task.image_size, task.image_size)
        if shape != expected:
            raise RuntimeError(f"{task.contestant} made a batch of shape {shape}, not {expected}")
        warm = first + min(1.0, task.seconds / 5)
        while time.perf_counter() < warm:
            next(batches)
        start, images = time.perf_counter(), 0
        while (end := time.perf_counter()) < start + task.seconds or not images:
            images += len(next(batches))
        memory = peak_memory()
    rate = images / (end - start)
    return Measurement(
        contestant=task.contestant,
        processes=task.processes,
        images_per_second=rate,
        images_per_second_per_core=rate / len(os.sched_getaffinity(0)),
        bytes_per_second=rate * manifest.total_bytes / manifest.num_samples,
        first_batch_seconds=first - began,
        peak_memory_bytes=memory,
    )


def main() -> None:
    """Do the task on standard input and print the answer."""
    # More processes than cores are one of the things to measure.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    try:
        answer = Answer(measurement=measure(Task.model_validate_json(sys.stdin.read())))
    except UserError as error:
        answer = Answer(error=str(error))
    print(answer.model_dump_json())


# --- In the job's process -------------------------------------------------------------------------------------------


def run_contestant(task: Task) -> Measurement:
    """Measure a contestant in a process of its own.

    Raises UserError as `measure` does, and when no batch arrives for minutes.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "crate_ray.benchmarks.data_loading"],
            input=task.model_dump_json(),
            stdout=subprocess.PIPE,
            text=True,
            timeout=2 * task.seconds + _STARTING_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{task.contestant} got no batch from {task.uri} within {error.timeout:.0f} s; look at the store, or "
            "lower batch_size"
        ) from None
    if done.returncode != 0:
        raise RuntimeError(f"the process of {task.contestant} ended with status {done.returncode}")
    answer = Answer.model_validate_json(done.stdout.splitlines()[-1])
    if answer.measurement is None:
        raise UserError(str(answer.error))
    return answer.measurement


def contestants(config: BenchmarkDataConfig, uri: str) -> list[Task]:
    """Our loader, and webdataset with each number of processes."""
    runs: list[tuple[Contestant, int]] = [("crate_ray", 1), *(("webdataset", n) for n in config.processes)]
    return [
        Task(
            contestant=contestant,
            processes=processes,
            uri=uri,
            image_size=config.image_size,
            batch_size=config.batch_size,
            seconds=config.seconds,
            memory_bytes=config.memory_bytes,
            s3=config.s3,
        )
        for contestant, processes in runs
    ]


def compare(config: BenchmarkDataConfig) -> dict[str, Any]:
    """Measure all contestants on all datasets, one after the other, and all of that `repeats` times.

    Returns:
        Plain data: machine, settings and, by dataset, every run, the fastest of each contestant (of webdataset with
        any number of processes), and our images/s divided by webdataset's: `ratio_on_same_data`, and
        `ratio_vs_webdataset`, where webdataset reads the first of the datasets. The first one's is at the top, too.

    Raises:
        UserError: a dataset cannot be read, or does not hold images.
    """
    runs: dict[str, list[Measurement]] = {name: [] for name in config.datasets}
    sizes = {}
    for name, uri in config.datasets.items():
        manifest = load_dataset(open_storage(uri, config.s3)).manifest
        sizes[name] = {"uri": uri, "num_samples": manifest.num_samples, "total_bytes": manifest.total_bytes}
    for _ in range(config.repeats):
        for name, uri in config.datasets.items():
            runs[name] += map(run_contestant, contestants(config, uri))

    best = {name: {who: _fastest(found, who) for who in _BATCHES} for name, found in runs.items()}
    stock = next(iter(best.values()))["webdataset"].images_per_second
    datasets = {}
    for name, found in best.items():
        ours = found["crate_ray"].images_per_second
        datasets[name] = sizes[name] | {
            **{who: measurement.model_dump() for who, measurement in found.items()},
            "ratio_on_same_data": ours / found["webdataset"].images_per_second,
            "ratio_vs_webdataset": ours / stock,
            "runs": [run.model_dump() for run in runs[name]],
        }
    return {
        "ratio_vs_webdataset": next(iter(datasets.values()))["ratio_vs_webdataset"],
        "datasets": datasets,
        "machine": describe_machine(),
        "settings": config.model_dump(mode="json", exclude={"s3", "json_file"}),
    }


def _fastest(runs: list[Measurement], contestant: str) -> Measurement:
    return max((r for r in runs if r.contestant == contestant), key=lambda r: r.images_per_second)


if __name__ == "__main__":
    main()
