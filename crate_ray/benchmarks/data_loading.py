"""Speed and memory of our loader, stock webdataset and others. All make the same batches from the same shards.

Each contestant runs in a new process, `python -m crate_ray.benchmarks.data_loading`. It reads the task and writes the
measurement as JSON.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import webdataset as wds
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from crate_ray.benchmarks.machine import describe_machine
from crate_ray.benchmarks.other_loaders import (
    Unavailable,
    converted_for_litdata,
    litdata_batches,
    random_box,
    random_resized_crop,
    spdl_batches,
)
from crate_ray.config import BenchmarkDataConfig, DataConfig, ImageModelConfig, S3Config
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.decode.samples import read_image_header, skim_jpeg
from crate_ray.data.decode.transforms import small_side
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.format.samples import Sample
from crate_ray.data.loader import training_loader
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.plan import plan_order
from crate_ray.data.read.mixture import MixtureReader
from crate_ray.errors import UserError
from crate_ray.memory import peak_memory
from crate_ray.storage.interface import open_storage
from crate_ray.storage.s3_client import S3Client

Contestant = Literal["crate_ray", "webdataset", "spdl", "litdata"]
_CHANNELS = 3
_SHUFFLE_BUFFER = 1000  # samples, as in webdataset's documentation
_FLOOR_IMAGES = 240
_FLOOR_PASSES = 3
_STARTING_SECONDS = 300.0  # for imports and the first batch of the slowest store


class Task(BaseModel):
    """Settings of one measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contestant: Contestant
    processes: int
    """Loader processes of webdataset and LitData. Our loader and spdl use threads in one process."""
    uri: str
    image_size: int
    batch_size: int
    seconds: float
    memory_bytes: int
    s3: S3Config
    converted: str | None = None
    """Folder with the dataset in LitData's format."""


class Measurement(BaseModel):
    """Result of one measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contestant: Contestant
    processes: int
    images_per_second: float
    images_per_second_per_core: float
    """Images/s divided by the number of cores that the process may use, busy or not."""
    bytes_per_second: float
    """Stored bytes of those images per second, tar headers included."""
    first_batch_seconds: float
    """Time from opening the dataset to the first batch. Libraries are imported before."""
    peak_memory_bytes: int | None
    """Sum of the peak resident sizes of all its processes. Shared pages count once for each process. None if the system
    does not report it."""


class Answer(BaseModel):
    """Output of a contestant's process. Exactly one field is set."""

    measurement: Measurement | None = None
    unavailable: str | None = None
    """Why this contestant does not work on this machine."""
    error: str | None = None


# --- The contestants ------------------------------------------------------------------------------------------------


@contextmanager
def our_batches(shards: ShardSet, task: Task) -> Iterator[Iterator[Tensor]]:
    """Endless batches (B, 3, S, S), uint8, of our loader."""
    model = ImageModelConfig(image_size=task.image_size, patch_size=1, channels=_CHANNELS)
    data = DataConfig(train=task.uri, memory_bytes=task.memory_bytes)
    mixture = Mixture.of(shards)
    order = plan_order(mixture, data, batch_size=task.batch_size, seed=0, workers=1)
    with training_loader(mixture, order, model, data, steps=range(2**31)) as loader:
        yield (batch.images for batch in loader)


@contextmanager
def webdataset_batches(shards: ShardSet, task: Task) -> Iterator[Iterator[Tensor]]:
    """Endless batches of webdataset with Pillow and WebLoader."""
    suffixes = shards.manifest.image_suffixes
    crop = functools.partial(random_resized_crop, size=task.image_size)
    dataset = (
        _encoded_samples(shards, task)
        .decode("pilrgb", only=list(suffixes))
        .to_tuple(";".join(suffixes))
        .map_tuple(crop)
        .batched(task.batch_size, partial=False)
    )
    yield (batch[0] for batch in wds.WebLoader(dataset, batch_size=None, num_workers=task.processes))


def _encoded_samples(shards: ShardSet, task: Task) -> wds.WebDataset:
    """Samples as webdataset shuffles them. Shards are resampled, so that every process has one at any time."""
    wds.gopen_schemes["s3"] = functools.partial(_open_object, task.s3)  # stock webdataset starts programs to read S3
    urls = _shard_urls(shards)
    return wds.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=None).shuffle(_SHUFFLE_BUFFER)


@contextmanager
def _spdl_batches(shards: ShardSet, task: Task) -> Iterator[Iterator[Tensor]]:
    encoded = _encoded_samples(shards, task).to_tuple(";".join(shards.manifest.image_suffixes))
    with spdl_batches((content for (content,) in encoded), task.image_size, task.batch_size) as batches:
        yield batches


@contextmanager
def _litdata_batches(shards: ShardSet, task: Task) -> Iterator[Iterator[Tensor]]:
    assert task.converted is not None
    with litdata_batches(task.converted, task.image_size, task.batch_size, task.processes) as batches:
        yield batches


@contextmanager
def _prepared(task: Task) -> Iterator[Task]:
    """Convert the dataset to the contestant's own format if it needs one. The conversion is not measured."""
    if task.contestant != "litdata":
        yield task
        return
    shards = load_dataset(open_storage(task.uri, task.s3))
    if shards.shard_storage.local_path(shards.shard_name(0)) is None:
        raise Unavailable("LitData reads its own format only, and the dataset is converted on local disk, not in S3")
    with converted_for_litdata(_shard_urls(shards), shards.manifest.image_suffixes) as folder:
        yield task.model_copy(update={"converted": folder})


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


_BATCHES = {
    "crate_ray": our_batches,
    "webdataset": webdataset_batches,
    "spdl": _spdl_batches,
    "litdata": _litdata_batches,
}


# --- In the contestant's process ------------------------------------------------------------------------------------


def measure(task: Task) -> Measurement:
    """Load batches for a while. The first batches are not counted, because some of them were prepared in advance.

    Raises:
        UserError: the dataset cannot be read, or does not hold images.
        Unavailable: the contestant does not work on this machine.
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
        memory = peak_memory(child.pid for child in multiprocessing.active_children() if child.pid)
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
    # The benchmark also measures more processes than cores, about which DataLoader warns.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    try:
        with _prepared(Task.model_validate_json(sys.stdin.read())) as task:
            answer = Answer(measurement=measure(task))
    except Unavailable as reason:
        answer = Answer(unavailable=str(reason))
    except UserError as error:
        answer = Answer(error=str(error))
    print(answer.model_dump_json())


# --- In the job's process -------------------------------------------------------------------------------------------


def run_contestant(task: Task) -> Measurement:
    """Measure a contestant in a separate process.

    Raises UserError and Unavailable as `measure` does, and UserError when no batch arrives for minutes.
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
            f"{task.contestant} got no batch from {task.uri} within {error.timeout:.0f} s; check the store, or "
            "lower batch_size"
        ) from None
    if done.returncode != 0:
        raise RuntimeError(f"the process of {task.contestant} ended with status {done.returncode}")
    answer = Answer.model_validate_json(done.stdout.splitlines()[-1])
    if answer.unavailable is not None:
        raise Unavailable(answer.unavailable)
    if answer.measurement is None:
        raise UserError(str(answer.error))
    return answer.measurement


def contestants(config: BenchmarkDataConfig, uri: str) -> list[Task]:
    """Our loader, webdataset with each number of processes, spdl, and LitData with each number of processes."""
    runs: list[tuple[Contestant, int]] = [("crate_ray", 1), *(("webdataset", n) for n in config.processes)]
    runs += [("spdl", 1), *(("litdata", n) for n in config.processes)]
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
    """Measure all contestants on all datasets, one after the other, and repeat this `repeats` times.

    Returns:
        Plain data: the machine, the settings, and for each dataset all runs and the fastest run of each contestant
        (with any number of processes). `ratio_on_same_data` is our images/s divided by webdataset's.
        `ratio_vs_webdataset` is our images/s divided by webdataset's on the first dataset; the first dataset's ratio is
        also at the top level. `floor_images_per_second` is the result of `entropy_floor`, and `share_of_floor` is our
        images/s divided by it. `unavailable` says why a contestant has no runs.

    Raises:
        UserError: a dataset cannot be read, or does not hold images.
    """
    runs: dict[str, list[Measurement]] = {name: [] for name in config.datasets}
    floors: dict[str, float | None] = {}
    unavailable: dict[str, dict[str, str]] = {name: {} for name in config.datasets}
    sizes = {}
    for name, uri in config.datasets.items():
        manifest = load_dataset(open_storage(uri, config.s3)).manifest
        sizes[name] = {"uri": uri, "num_samples": manifest.num_samples, "total_bytes": manifest.total_bytes}
    for _ in range(config.repeats):
        for name, uri in config.datasets.items():
            for task in contestants(config, uri):
                if task.contestant in unavailable[name]:
                    continue
                try:
                    runs[name].append(run_contestant(task))
                except Unavailable as reason:
                    unavailable[name][task.contestant] = str(reason)
            floor = entropy_floor(load_dataset(open_storage(uri, config.s3)), config.image_size)
            floors[name] = None if floor is None else max(floor, floors.get(name) or 0.0)

    best = {name: _fastest(found) for name, found in runs.items()}
    stock = next(iter(best.values()))["webdataset"].images_per_second
    datasets = {}
    for name, found in best.items():
        ours, floor = found["crate_ray"].images_per_second, floors[name]
        measured: dict[str, Any] = {who: measurement.model_dump() for who, measurement in found.items()}
        datasets[name] = sizes[name] | {
            **measured,
            "ratio_on_same_data": ours / found["webdataset"].images_per_second,
            "ratio_vs_webdataset": ours / stock,
            "floor_images_per_second": floor,
            "share_of_floor": None if floor is None else ours / floor,
            "unavailable": unavailable[name],
            "runs": [run.model_dump() for run in runs[name]],
        }
    return {
        "ratio_vs_webdataset": next(iter(datasets.values()))["ratio_vs_webdataset"],
        "datasets": datasets,
        "machine": describe_machine(),
        "settings": config.model_dump(mode="json", exclude={"s3", "json_file"}),
    }


def _fastest(runs: list[Measurement]) -> dict[Contestant, Measurement]:
    """The fastest run of each contestant that has one."""
    fastest: dict[Contestant, Measurement] = {}
    for run in sorted(runs, key=lambda run: run.images_per_second):
        fastest[run.contestant] = run
    return fastest


def entropy_floor(shards: ShardSet, image_size: int) -> float | None:
    """Images/s if all cores only decoded each JPEG's Huffman codes, down to the last row of a random crop.

    Every decoder has to do this work, and nothing else is included. It is measured in one thread and multiplied by the
    number of cores. None if most images are not JPEGs, or are small enough to be decoded together.
    """
    mixture = Mixture.of(shards)
    reader = MixtureReader(mixture, DataConfig(train=shards.storage.uri))
    numbers = range(min(_FLOOR_IMAGES, mixture.num_samples))
    members = [sample.members for sample in reader.read(numbers) if isinstance(sample, Sample)]
    contents = [bytes(m[s]) for m in members for s in shards.manifest.image_suffixes if s in m]
    todo = []
    for content in contents:
        try:
            header = read_image_header(content)
            skim_jpeg(content, 1)
        except DecodeError:
            continue
        if small_side(header.height, header.width, (image_size, image_size)) is None:
            _, top, _, height = random_box(header.width, header.height)
            todo.append((content, top + height))
    if 2 * len(todo) < len(contents) or not todo:
        return None
    seconds = []
    for _ in range(_FLOOR_PASSES):
        began = time.perf_counter()
        for content, rows in todo:
            skim_jpeg(content, rows)
        seconds.append(time.perf_counter() - began)
    return len(os.sched_getaffinity(0)) * len(todo) / min(seconds)


if __name__ == "__main__":
    main()
