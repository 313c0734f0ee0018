"""Features of a dataset at several points of an encoder, computed in parallel by Ray tasks and cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.exceptions
import safetensors.torch
import torch
from numpy.typing import NDArray

from crate_ray.config import S3Config
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.format.samples import Sample
from crate_ray.data.read.bad_samples import BadSampleCounter, SampleError
from crate_ray.data.read.content import sample_contents
from crate_ray.data.read.shard_reader import ShardReader, Unreadable
from crate_ray.errors import UserError
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.feature_cache import UNUSABLE, FeatureCache, FeatureSet
from crate_ray.evaluation.features import compute_device, pixel_features, spread
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription
from crate_ray.ray_cluster import start_ray, task_cpus
from crate_ray.serving import FeatureExtractor, FeaturePoint, load_images
from crate_ray.storage.interface import open_storage

_BATCH = 128
_MAX_BAD_FRACTION = 0.01
_VERSION = 1  # version of the features; increase it so that older cache entries are not used


@dataclass(frozen=True)
class Extraction:
    """Computes features in Ray tasks and caches them."""

    cache: FeatureCache
    """Cached features are not computed again."""
    s3: S3Config
    """Object storage."""
    workers: int | None = None
    """Number of parallel tasks; None: one for each CPU or GPU of the cluster."""
    gpu: bool | None = None
    """Whether tasks use a GPU each; None: if the cluster has any."""

    def encoder(
        self, evaluated: EvaluatedModel, shards: ShardSet, points: Sequence[FeaturePoint], max_samples: int | None
    ) -> list[FeatureSet]:
        """Features at each of the points, of at most max_samples samples, evenly spread over the dataset."""
        keys = [_key(evaluated.digest, shards, max_samples, point) for point in points]
        missing = [i for i, key in enumerate(keys) if self.cache.get(key) is None]
        if missing:
            wanted = [points[i] for i in missing]
            dims = [evaluated.description.model.dim] * len(missing)
            self._compute(
                shards, max_samples, [keys[i] for i in missing], dims, evaluated.description, wanted, evaluated.weights
            )
        return [self._cached(key) for key in keys]

    def pixels(self, description: ModelDescription, shards: ShardSet, max_samples: int | None) -> FeatureSet:
        """`pixel_features` of the model's input, as the control."""
        model = description.model
        identity = json.dumps([model.channels, model.image_hw, description.kind])
        key = _key(identity, shards, max_samples, None)
        if self.cache.get(key) is None:
            dim = pixel_features(torch.zeros(1, model.channels, *model.image_hw)).shape[1]
            self._compute(shards, max_samples, [key], [dim], description, None, b"")
        return self._cached(key)

    def _cached(self, key: str) -> FeatureSet:
        found = self.cache.get(key)
        if found is None:
            raise UserError(
                f"features {key} were removed from the cache during the evaluation; use a separate --features-dir"
            )
        return found

    def _compute(
        self,
        shards: ShardSet,
        max_samples: int | None,
        keys: list[str],
        dims: list[int],
        description: ModelDescription,
        points: list[FeaturePoint] | None,
        weights: bytes,
    ) -> None:
        start_ray()
        resources = ray.cluster_resources()
        gpu = resources.get("GPU", 0) >= 1 if self.gpu is None else self.gpu
        workers = self.workers or max(1, int(resources.get("GPU" if gpu else "CPU", 1)))
        cpus = task_cpus(workers, gpu)
        rows = len(spread(shards.manifest.num_samples, max_samples))
        encode = ray.remote(num_cpus=cpus, num_gpus=1 if gpu else 0)(_encode)
        job = ray.put(
            _Job(shards.storage.uri, self.s3, max_samples, description.model_dump_json(), points, ray.put(weights), gpu)
        )
        starts = list(reversed(range(0, rows, _BATCH)))
        bad = BadSampleCounter(_MAX_BAD_FRACTION, shards.storage.uri, setting=None)
        bad.count_drawn(rows)
        with self.cache.write(keys, rows, dims) as writer:
            running: list[Any] = []
            while starts or running:
                # Submit twice as many tasks as run at a time, so that workers never wait for the next one.
                while starts and len(running) < 2 * workers:
                    running.append(encode.remote(job, starts.pop()))
                done, running = ray.wait(running)
                block: _Block = _result(done[0])
                writer.put(block.rows, np.split(block.features, np.cumsum(dims)[:-1], 1), block.labels, block.samples)
                for error in block.errors:
                    bad.add(error)


class _Job(NamedTuple):
    """Data that all tasks share."""

    uri: str
    s3: S3Config
    max_samples: int | None
    description_json: str
    points: list[FeaturePoint] | None
    """None for pixels."""
    weights: Any
    """Ray's reference to the weights in safetensors."""
    gpu: bool
    """Whether tasks have a GPU. Ray does not hide the node's GPUs from tasks that asked for none."""


class _Block(NamedTuple):
    """Result of a task."""

    rows: NDArray[np.int64]
    samples: NDArray[np.int64]
    features: NDArray[np.float32]
    """(n, sum of the points' dims)"""
    labels: NDArray[np.int64]
    errors: list[SampleError]
    """Errors of the bad samples."""


def _result(task: Any) -> _Block:
    try:
        block: _Block = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return block


def _encode(job: _Job, first: int) -> _Block:
    """Ray task: read a batch of samples and compute their features."""
    reader = ShardReader(load_dataset(open_storage(job.uri, job.s3)))
    manifest = reader.shards.manifest
    numbers = spread(manifest.num_samples, job.max_samples)[first : first + _BATCH]
    samples = read_samples(reader, numbers)
    contents = sample_contents(
        samples, manifest.image_suffixes, "optional" if manifest.num_classes is None else "required"
    )
    labels, errors = np.array(contents.labels, np.int64), []
    description = ModelDescription.model_validate_json(job.description_json)
    images, decode_errors = load_images(contents.encoded, description, threads=torch.get_num_threads())
    for i, (error, decode_error) in enumerate(zip(contents.errors, decode_errors, strict=True)):
        if decode_error is not None:
            images[i] = 0  # the slot of a bad sample is undefined
            error = error or SampleError.of_decode_error(samples[i].key, decode_error)
        if error is not None:
            labels[i] = UNUSABLE
            errors.append(error.of_source(reader.source_name(int(numbers[i]))))
    if job.points is None:
        features = pixel_features(images)
    else:
        features = torch.cat(_extractor(job.description_json, job.weights, job.gpu).pooled(images, job.points), 1)
    return _Block(
        rows=np.arange(first, first + len(numbers)),
        samples=numbers,
        features=features.numpy(),
        labels=labels,
        errors=errors,
    )


@lru_cache(maxsize=1)
def _extractor(description_json: str, weights: Any, gpu: bool) -> FeatureExtractor:
    """The encoder. Each worker process caches it for later tasks."""
    description = ModelDescription.model_validate_json(description_json)
    model = build_model(description.model)
    model.load_state_dict(safetensors.torch.load(ray.get(weights)))
    return FeatureExtractor(model, description, device=compute_device(gpu))


def read_samples(reader: ShardReader, numbers: NDArray[np.int64]) -> list[Sample | Unreadable]:
    """Read samples by number, in rising order. Those that share an index entry are read together."""
    if len(numbers) and numbers[-1] - numbers[0] < INDEX_STRIDE * len(numbers):
        every = reader.read(int(numbers[0]), int(numbers[-1] - numbers[0]) + 1)
        return [every[i] for i in (numbers - numbers[0]).tolist()]
    return [reader.read(number, 1)[0] for number in numbers.tolist()]


def _key(model: str, shards: ShardSet, max_samples: int | None, point: FeaturePoint | None) -> str:
    stride = spread(shards.manifest.num_samples, max_samples)[:2].tolist()
    parts = [_VERSION, model, shards.manifest.digest(), stride, "pixels" if point is None else list(point)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
