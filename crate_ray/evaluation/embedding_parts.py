"""Embeds ranges of a dataset's samples, and writes each range as one file with its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from crate_ray.config import DataConfig
from crate_ray.data.batch import Batch
from crate_ray.data.format.dataset import ShardSet
from crate_ray.data.format.names import readable
from crate_ray.data.loader import Loader, evaluation_loader
from crate_ray.data.read.bad_samples import BadSampleCounter
from crate_ray.evaluation.embedding_files import Rows, npy_shard, parquet_file
from crate_ray.evaluation.embedding_output import EmbeddingRecord, Part, PartReport, write_part
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.classifier import Classifier, encoder_of
from crate_ray.models.exported import ModelDescription
from crate_ray.serving import FeatureExtractor
from crate_ray.storage.interface import Storage

_BUFFER_BYTES = 2**28


class Progress(NamedTuple):
    """Where the work on a part is."""

    samples: int
    """Samples of the part that are embedded or bad."""
    bad: int
    """How many of them are bad."""
    report: PartReport | None = None
    """The part's report, once it is written."""


class PartWriter:
    """Embeds ranges of a dataset's samples.

    Args:
        shards: the dataset.
        output: where the files go.
        record: what the output holds.
        model: the encoder.
        description: how its input is prepared.
        device: where to compute.
        batch_size: samples per forward pass.
        max_bad_fraction: largest share of bad samples in the dataset.
    """

    def __init__(
        self,
        shards: ShardSet,
        output: Storage,
        record: EmbeddingRecord,
        model: MaskedAutoencoder,
        description: ModelDescription,
        device: torch.device,
        *,
        batch_size: int,
        max_bad_fraction: float,
    ) -> None:
        self._shards, self._output, self._record, self._device = shards, output, record, device
        self._batch_size, self._max_bad_fraction = batch_size, max_bad_fraction
        self._extractor = FeatureExtractor(model, description, record.feature, device)
        # A part is streamed. Bad samples are compared with those of the whole dataset, not of the part.
        self._data = DataConfig(
            train=shards.storage.uri, memory_bytes=1, buffer_bytes=_BUFFER_BYTES, max_bad_fraction=1.0
        )

    def write(self, samples: range) -> Iterator[Progress]:
        """Embed samples, and write their part. Yields after each batch, and once more when the part is written.

        Raises UserError if the part alone has more bad samples than the dataset may have.
        """
        model = self._extractor.description.model
        rows = Rows([], [] if self._shards.manifest.source_names else None, [], *self._room(samples))
        done = 0
        with evaluation_loader(
            self._shards, model, self._data, batch_size=self._batch_size, device=self._device, samples=samples
        ) as loader:
            for batch in loader:
                self._add(rows, batch, loader)
                done = min(done + self._batch_size, len(samples))
                self._check_bad(loader.bad)
                yield Progress(done, loader.bad.counts.total())
            self._check_bad(loader.bad)
            bad = loader.bad
        count = len(rows.keys)
        rows.samples, rows.vectors = rows.samples[:count], rows.vectors[:count]
        rows.labels = None if rows.labels is None else rows.labels[:count]
        content = npy_shard(rows) if self._record.format == "npy-shards" else parquet_file(rows, self._metadata())
        part = Part(
            start=samples.start,
            stop=samples.stop,
            rows=count,
            size=len(content),
            skipped=dict(sorted(bad.counts.items())),
        )
        last = None if bad.last is None else (readable(bad.last.key), bad.last.cause, readable(bad.last.message))
        report = PartReport(part=part, skipped_keys=dict(sorted(bad.causes.items())), last_error=last)
        write_part(self._output, self._record, samples, content, report)
        yield Progress(len(samples), bad.counts.total(), report)

    def _room(self, samples: range) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Arrays for the numbers, the labels and the embeddings of samples."""
        count, labelled = len(samples), self._shards.manifest.num_classes is not None
        vectors = np.empty((count, *self._record.shape), self._record.dtype)
        return np.empty(count, np.int64), np.empty(count, np.int64) if labelled else None, vectors

    def _add(self, rows: Rows, batch: Batch, loader: Loader) -> None:
        """Add the embeddings of a batch."""
        if not batch.keys:
            return
        here = slice(len(rows.keys), len(rows.keys) + len(batch.keys))
        rows.vectors[here] = self._extractor(batch.images).numpy()
        rows.samples[here] = batch.samples
        if rows.labels is not None:
            assert batch.labels is not None
            rows.labels[here] = batch.labels
        rows.keys += map(readable, batch.keys)
        numbers = batch.samples.tolist()
        rows.shards += [readable(self._shards.shard_name(self._shards.locate(number)[0])) for number in numbers]
        if rows.names is not None:
            names = [loader.source_name(number) for number in numbers]
            rows.names += [name if name is None else readable(name) for name in names]

    def _check_bad(self, found: BadSampleCounter) -> None:
        """Stop as soon as the part has more bad samples than the dataset may have."""
        counter = dataset_counter(self._record, self._shards, self._max_bad_fraction)
        counter.add_counted(found.counts.copy(), {}, found.last)

    def _metadata(self) -> dict[str, str]:
        record = self._record
        about = {
            "version": record.version,
            "model": record.model,
            "dataset": record.dataset,
            "feature": record.feature,
            "shape": json.dumps(record.shape),
            "reference": record.reference or "",
            "data": record.data or "",
        }
        return about if record.classes is None else about | {"classes": json.dumps(record.classes, ensure_ascii=False)}


def dataset_counter(record: EmbeddingRecord, shards: ShardSet, max_bad_fraction: float) -> BadSampleCounter:
    """A counter of bad samples for the whole dataset, with those that the record lists."""
    counter = BadSampleCounter(
        max_bad_fraction, shards.storage.uri, dict(record.skipped_keys), setting="max_bad_fraction"
    )
    counter.count_drawn(record.num_samples)
    return counter


def rebuild(description: ModelDescription, weights: bytes) -> MaskedAutoencoder:
    """The encoder of a model, from its description and its weights as a safetensors file."""
    if description.classifier is not None:
        model: MaskedAutoencoder | Classifier = Classifier(description.model, description.classifier)
    else:
        model = build_model(description.model)
    model.load_state_dict(safetensors.torch.load(weights))
    return encoder_of(model)
