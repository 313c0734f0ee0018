"""Embeddings of a whole dataset: Ray Data over ranges of samples, encoders as actors, Parquet out."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions
import safetensors.torch
import torch
from numpy.typing import NDArray

from crate_ray.config import EmbedConfig, Feature, S3Config
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.format.samples import Sample
from crate_ray.data.read.bad_samples import BadSampleCounter, SampleError
from crate_ray.data.read.content import sample_contents
from crate_ray.data.read.shard_reader import ShardReader, Unreadable
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding_output import (
    LEASE_FILE,
    EmbeddingRecord,
    Part,
    claim,
    find_complete,
    part_name,
    publish,
)
from crate_ray.evaluation.evaluated_model import check_input
from crate_ray.evaluation.features import compute_device
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import ModelDescription
from crate_ray.progress import CountDisplay
from crate_ray.ray_cluster import start_ray, task_cpus
from crate_ray.serving import FeatureExtractor, load_images
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.lease import Lease
from crate_ray.storage.node_folders import check_kept

_MAX_PARTS = 10_000


def embed_dataset(config: EmbedConfig, model: MaskedAutoencoder, description: ModelDescription) -> EmbeddingRecord:
    """Embed every sample of a dataset once and write Parquet files. If they are already complete, do nothing.

    Rows: `key` of the sample, `name` (of the file that was packed, if the dataset has names), `sample` (its number in
    the dataset), `label` (if every sample has a class), `embedding` (dim × float32). Bad samples are skipped and listed
    in the record. Starts Ray, or uses the one that is running.

    Raises UserError if the data does not fit the model, if the output holds other data or is in use, or if too many
    samples are bad.
    """
    shards, output = load_dataset(open_storage(config.data, config.s3)), open_storage(config.output, config.s3)
    check_kept(output.uri, "output")
    if output.uri == shards.storage.uri:
        raise UserError(f"--output is {output.uri}, the folder of the dataset itself; choose another folder")
    check_input(description, shards.manifest, shards.storage.uri)
    weights = safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})
    record = EmbeddingRecord(
        model=hashlib.sha256(weights).hexdigest(),
        dataset=shards.manifest.digest(),
        feature=config.feature,
        num_samples=shards.manifest.num_samples,
        dim=description.model.dim,
        part_samples=(_part_samples(config, shards),),
    )
    if done := find_complete(output, record):
        return done
    with Lease(output, LEASE_FILE, f"the output {output.uri}") as lease:
        if done := find_complete(output, record):
            return done
        record = claim(output, record)
        start_ray()
        parts, bad = _compute(config, shards, output, description, weights)
        record = record.model_copy(update={"skipped": dict(bad.counts), "skipped_keys": bad.causes})
        lease.check()
        return publish(output, record, parts)


def _compute(
    config: EmbedConfig, shards: ShardSet, output: Storage, description: ModelDescription, weights: bytes
) -> tuple[list[Part], BadSampleCounter]:
    """Write all parts. Raises UserError as soon as too many samples are bad."""
    total, size = shards.manifest.num_samples, _part_samples(config, shards)
    ranges = [{"start": start, "stop": min(start + size, total)} for start in range(0, total, size)]
    job = _Job(
        data=shards.storage.uri,
        output=output.uri,
        s3=config.s3,
        description_json=description.model_dump_json(),
        weights=ray.put(weights),
        feature=config.feature,
        batch_size=config.batch_size,
        gpu=config.gpu,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False  # CountDisplay shows samples instead of blocks
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # "Starting execution of Dataset", and the like
    written = ray.data.from_items(ranges, override_num_blocks=len(ranges)).map_batches(
        _Encoder,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=task_cpus(config.workers, config.gpu),
        num_gpus=1 if config.gpu else 0,
        fn_constructor_args=(job,),
    )
    bad = BadSampleCounter(config.max_bad_fraction, shards.storage.uri, setting="max_bad_fraction")
    bad.count_drawn(total)
    parts: list[Part] = []
    done = 0
    with CountDisplay("embedding", total) as display:
        for result in _results(written):
            for error in result.errors:
                bad.add(error)
            parts.append(result.part)
            done += result.part.rows + len(result.errors)
            display.update(done, done, bad.counts.total())
    return parts, bad


def _part_samples(config: EmbedConfig, shards: ShardSet) -> int:
    """Samples per part: a batch, or several so that there are not too many parts."""
    return config.batch_size * max(1, -(-shards.manifest.num_samples // (config.batch_size * _MAX_PARTS)))


class _Job(NamedTuple):
    """Data that all encoders share."""

    data: str
    output: str
    s3: S3Config
    description_json: str
    weights: Any
    """Ray's reference to the weights in safetensors."""
    feature: Feature
    batch_size: int
    gpu: bool
    """Whether encoders have a GPU. Ray does not hide the node's GPUs from actors that asked for none."""


class _Result(NamedTuple):
    """A part that was written, and the bad samples that are missing in it."""

    part: Part
    errors: list[SampleError]


def _results(written: ray.data.Dataset) -> Iterator[_Result]:
    """Results of the encoders, in the order of completion. Raises UserError if an encoder raised it or Ray lost one."""
    try:
        for table in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in table.to_pylist():
                if row["failure"]:
                    raise UserError(row["failure"])
                errors = [SampleError(*e) for e in zip(row["keys"], row["causes"], row["messages"], strict=True)]
                yield _Result(Part(row["name"], row["rows"], row["size"]), errors)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"Ray lost an encoder ({type(error).__name__}: {str(error).strip().splitlines()[0]}); start the job again"
        ) from error


class _Encoder:
    """Actor that embeds ranges of samples and writes each as one part."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(load_dataset(open_storage(self._job.data, self._job.s3)))

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        description = ModelDescription.model_validate_json(self._job.description_json)
        model = build_model(description.model)
        model.load_state_dict(safetensors.torch.load(ray.get(self._job.weights)))
        return FeatureExtractor(model, description, self._job.feature, compute_device(self._job.gpu))

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> pa.Table:
        name, rows, size, failure = "", 0, 0, ""
        errors: list[SampleError] = []
        try:
            (name, rows, size), errors = self._write_part(int(batch["start"][0]), int(batch["stop"][0]))
        except UserError as error:  # raised again by the driver; Ray would wrap it in a page of text
            failure = str(error)
        columns = {"name": [name], "rows": [rows], "size": [size], "failure": [failure]}
        for column, values in zip(("keys", "causes", "messages"), zip(*errors, strict=True), strict=False):
            columns[column] = [list(values)]
        return pa.table({column: columns.get(column, [[]]) for column in _RESULT.names}, schema=_RESULT)

    def _write_part(self, start: int, stop: int) -> _Result:
        tables, errors = [], []
        for first in range(start, stop, self._job.batch_size):
            samples = self._reader.read(first, min(self._job.batch_size, stop - first))
            table, bad = self._embed(first, samples)
            tables.append(table)
            errors += bad
        file = io.BytesIO()
        pq.write_table(pa.concat_tables(tables), file)
        part = Part(part_name(start, stop), sum(map(len, tables)), file.tell())
        open_storage(self._job.output, self._job.s3).write(part.name, file.getvalue())
        return _Result(part, errors)

    def _embed(self, first: int, samples: list[Sample | Unreadable]) -> tuple[pa.Table, list[SampleError]]:
        """Embeddings of the good samples, and errors of the bad ones. The samples are numbered first, first + 1, …."""
        manifest = self._reader.shards.manifest
        labelled = manifest.num_classes is not None
        contents = sample_contents(samples, manifest.image_suffixes, "required" if labelled else "ignored")
        images, decode_errors = load_images(
            contents.encoded, self._extractor.description, threads=torch.get_num_threads()
        )
        keys = [_readable(sample.key) for sample in samples]
        names = [self._reader.source_name(number) for number in range(first, first + len(samples))]
        names = [name if name is None else _readable(name) for name in names]
        good, errors = [], []
        for i, (error, decode_error) in enumerate(zip(contents.errors, decode_errors, strict=True)):
            if error is None and decode_error is None:
                good.append(i)
            elif error is not None:
                errors.append(error._replace(key=keys[i]).of_source(names[i]))
            else:
                assert decode_error is not None
                errors.append(SampleError.of_decode_error(keys[i], decode_error).of_source(names[i]))
        dim = self._extractor.description.model.dim
        vectors = self._extractor(images[good]).numpy() if good else np.empty((0, dim), np.float32)
        columns: dict[str, Any] = {
            "key": pa.array([keys[i] for i in good], pa.string()),
            **({"name": pa.array([names[i] for i in good], pa.string())} if manifest.source_names else {}),
            "sample": pa.array([first + i for i in good], pa.int64()),
        }
        if labelled:
            columns["label"] = pa.array([contents.labels[i] for i in good], pa.int64())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
        return pa.table(columns), errors


def _readable(name: str) -> str:
    """A key or a name as UTF-8. Bytes that are not become `\\x…`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


_RESULT = pa.schema(
    {
        "name": pa.string(),
        "rows": pa.int64(),
        "size": pa.int64(),
        "failure": pa.string(),
        "keys": pa.list_(pa.string()),
        "causes": pa.list_(pa.string()),
        "messages": pa.list_(pa.string()),
    }
)
"""Schema of an encoder's result for each part."""
