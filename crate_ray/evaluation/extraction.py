"""Features of a dataset at many places of an encoder, computed in parallel by Ray, and kept by their content."""

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
from crate_ray.data.read.shard_reader import ShardReader, Unreadable
from crate_ray.errors import UserError
from crate_ray.evaluation.feature_cache import UNLABELLED, UNUSABLE, FeatureCache, FeatureSet
from crate_ray.evaluation.features import compute_device, pixel_features, spread
from crate_ray.evaluation.subject import Subject
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription
from crate_ray.ray_cluster import start_ray
from crate_ray.serving import FeatureExtractor, Tap, load_images
from crate_ray.storage.interface import open_storage

_BATCH = 128
_MAX_BAD_FRACTION = 0.01
_VERSION = 1  # of what features are; another one makes older entries of a cache unused


@dataclass(frozen=True)
class Extraction:
    """How features are computed: where they are kept, and on how much hardware."""

    cache: FeatureCache
    """Where they are looked for first."""
    s3: S3Config
    """Object storage."""
    workers: int | None = None
    """Encoders at the same time; None: one on each CPU or GPU of the cluster."""
    gpu: bool | None = None
    """Whether each is on a GPU; None: where the cluster has any."""

    def encoder(
        self, subject: Subject, shards: ShardSet, taps: Sequence[Tap], max_samples: int | None
    ) -> list[FeatureSet]:
        """Features of at most max_samples samples, spread evenly, at each of the taps."""
        keys = [_key(subject.digest, shards, max_samples, tap) for tap in taps]
        missing = [i for i, key in enumerate(keys) if self.cache.get(key) is None]
        if missing:
            wanted = [taps[i] for i in missing]
            dims = [subject.description.model.dim] * len(missing)
            self._compute(
                shards, max_samples, [keys[i] for i in missing], dims, subject.description, wanted, subject.weights
            )
        return [self._kept(key) for key in keys]

    def pixels(self, description: ModelDescription, shards: ShardSet, max_samples: int | None) -> FeatureSet:
        """The control: `pixel_features` of what a model would get."""
        model = description.model
        identity = json.dumps([model.channels, model.image_hw, description.kind])
        key = _key(identity, shards, max_samples, None)
        if self.cache.get(key) is None:
            dim = pixel_features(torch.zeros(1, model.channels, *model.image_hw)).shape[1]
            self._compute(shards, max_samples, [key], [dim], description, None, b"")
        return self._kept(key)

    def _kept(self, key: str) -> FeatureSet:
        found = self.cache.get(key)
        if found is None:
            raise UserError(f"features {key} vanished while they were used; give a --features_dir of your own")
        return found

    def _compute(
        self,
        shards: ShardSet,
        max_samples: int | None,
        keys: list[str],
        dims: list[int],
        description: ModelDescription,
        taps: list[Tap] | None,
        weights: bytes,
    ) -> None:
        start_ray()
        resources = ray.cluster_resources()
        gpu = resources.get("GPU", 0) >= 1 if self.gpu is None else self.gpu
        workers = self.workers or max(1, int(resources.get("GPU" if gpu else "CPU", 1)))
        rows = len(spread(shards.manifest.num_samples, max_samples))
        encode = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0)(_encode)
        job = ray.put(
            _Job(shards.storage.uri, self.s3, max_samples, description.model_dump_json(), taps, ray.put(weights), gpu)
        )
        starts = list(reversed(range(0, rows, _BATCH)))
        with self.cache.write(keys, rows, dims) as writer:
            bad, example = 0, ""
            running: list[Any] = []
            while starts or running:
                # Twice as many as work at the same time, so that none waits for the next.
                while starts and len(running) < 2 * workers:
                    running.append(encode.remote(job, starts.pop()))
                done, running = ray.wait(running)
                block: _Block = _result(done[0])
                writer.put(block.rows, np.split(block.features, np.cumsum(dims)[:-1], 1), block.labels, block.samples)
                bad, example = bad + len(block.errors), next(iter(block.errors), example)
            if bad > _MAX_BAD_FRACTION * rows:
                raise UserError(
                    f"{bad} of {rows} samples of {shards.storage.uri} are unusable ({example}); "
                    "pack the good ones again with crate-ray prepare --source"
                )


class _Job(NamedTuple):
    """What all tasks of an extraction share."""

    uri: str
    s3: S3Config
    max_samples: int | None
    description_json: str
    taps: list[Tap] | None
    """None for pixels."""
    weights: Any
    """Ray's reference to the weights in safetensors."""
    gpu: bool
    """Whether tasks have a GPU: Ray does not hide the node's from those that asked for none."""


class _Block(NamedTuple):
    """What a task computes."""

    rows: NDArray[np.int64]
    samples: NDArray[np.int64]
    features: NDArray[np.float32]
    """(n, dims of all taps side by side)"""
    labels: NDArray[np.int64]
    errors: list[str]
    """Of the samples that cannot be used."""


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
    contents = [content_of(sample, manifest.image_suffixes) for sample in samples]
    description = ModelDescription.model_validate_json(job.description_json)
    images, errors = load_images(contents, description)
    for i, error in enumerate(errors):
        if error is not None:
            images[i] = 0  # undefined until now
    if job.taps is None:
        features = pixel_features(images)
    else:
        features = torch.cat(_extractor(job.description_json, job.weights, job.gpu).pooled(images, job.taps), 1)
    found = [_label(sample, error) for sample, error in zip(samples, errors, strict=True)]
    return _Block(
        rows=np.arange(first, first + len(numbers)),
        samples=numbers,
        features=features.numpy(),
        labels=np.array([label for label, _ in found], np.int64),
        errors=[text for _, text in found if text],
    )


@lru_cache(maxsize=1)
def _extractor(description_json: str, weights: Any, gpu: bool) -> FeatureExtractor:
    """The encoder, kept by the process from task to task; the weights are fetched once."""
    description = ModelDescription.model_validate_json(description_json)
    model = build_model(description.model)
    model.load_state_dict(safetensors.torch.load(ray.get(weights)))
    return FeatureExtractor(model, description, device=compute_device(gpu))


def read_samples(reader: ShardReader, numbers: NDArray[np.int64]) -> list[Sample | Unreadable]:
    """Samples by rising numbers; together where they share index entries, which are read as a whole."""
    if len(numbers) and numbers[-1] - numbers[0] < INDEX_STRIDE * len(numbers):
        every = reader.read(int(numbers[0]), int(numbers[-1] - numbers[0]) + 1)
        return [every[i] for i in (numbers - numbers[0]).tolist()]
    return [reader.read(number, 1)[0] for number in numbers.tolist()]


def content_of(sample: Sample | Unreadable, suffixes: Sequence[str]) -> bytes:
    """A sample's encoded image or grid; empty, which no decoder takes, where it has none."""
    if isinstance(sample, Unreadable):
        return b""
    return next((bytes(sample.members[suffix]) for suffix in suffixes if suffix in sample.members), b"")


def _label(sample: Sample | Unreadable, error: Exception | None) -> tuple[int, str]:
    """The class number of a sample, or why it cannot be used."""
    if isinstance(sample, Unreadable) or error is not None:
        return UNUSABLE, f"{sample.key}: {sample.error if isinstance(sample, Unreadable) else error}"
    try:
        label = int(bytes(sample.members["cls"]))
    except (KeyError, ValueError):
        return UNLABELLED, ""
    return max(label, UNLABELLED), ""


def _key(subject: str, shards: ShardSet, max_samples: int | None, tap: Tap | None) -> str:
    stride = spread(shards.manifest.num_samples, max_samples)[:2].tolist()
    parts = [_VERSION, subject, shards.manifest.digest(), stride, "pixels" if tap is None else list(tap)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
