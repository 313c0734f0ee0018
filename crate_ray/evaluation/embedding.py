"""Embeddings of a whole dataset: Ray Data over the shards, encoders as actors, Parquet out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import safetensors.torch
from numpy.typing import NDArray
from pydantic import ValidationError

from crate_ray.config import EmbedConfig, Feature, S3Config, Settings
from crate_ray.data.format.shards import load_dataset
from crate_ray.data.read.shard_reader import ShardReader, Unreadable
from crate_ray.errors import UserError
from crate_ray.evaluation.features import compute_device
from crate_ray.models import build_model
from crate_ray.models.exported import DESCRIPTION_FILE, WEIGHTS_FILE, ModelDescription
from crate_ray.serving import FeatureExtractor
from crate_ray.storage.arrow import arrow_filesystem
from crate_ray.storage.interface import AlreadyExists, NotFound, Storage, open_storage

RECORD_FILE = "_embeddings.json"  # readers of Parquet folders pass over names with an underscore


class EmbeddingRecord(Settings):
    """What the Parquet files of a prefix hold; written before the first of them, complete once all are there."""

    model: str
    """SHA-256 of the weights."""
    dataset: str
    """Digest of the data's manifest."""
    feature: Feature
    """Which feature."""
    num_samples: int
    """Rows."""
    dim: int
    """Numbers per embedding."""
    complete: bool = False
    """Whether all rows are there."""


def claim_output(config: EmbedConfig, model: Path) -> EmbeddingRecord:
    """Make the output ours for the embeddings of an exported model; the record says whether they are there already.

    Raises UserError when the output holds embeddings of another model, dataset or feature, or files that are not ours.
    """
    shards = load_dataset(open_storage(config.data, config.s3))
    description = ModelDescription.model_validate_json((model / DESCRIPTION_FILE).read_text())
    record = EmbeddingRecord(
        model=hashlib.sha256((model / WEIGHTS_FILE).read_bytes()).hexdigest(),
        dataset=shards.manifest.digest(),
        feature=config.feature,
        num_samples=shards.manifest.num_samples,
        dim=description.model.dim,
    )
    return record.model_copy(update={"complete": _claim(open_storage(config.output, config.s3), record)})


def embed(config: EmbedConfig, model: Path, record: EmbeddingRecord) -> None:
    """Embed every sample once, into an output that `claim_output` gave the record of; needs Ray.

    Rows: `key` (of the sample), `sample` (its number in the dataset), `label` (where there are classes), `embedding`
    (dim × float32). Files of an earlier run of the same kind that was cut off have been removed.
    """
    data_uri, output = open_storage(config.data, config.s3).uri, open_storage(config.output, config.s3)
    starts = range(0, record.num_samples, config.batch_size)
    filesystem, path = arrow_filesystem(output.uri, config.s3)
    weights = ray.put((model / WEIGHTS_FILE).read_bytes())
    description_json = (model / DESCRIPTION_FILE).read_text()
    tasks = ray.data.from_items([{"start": start} for start in starts], override_num_blocks=len(starts))
    embedded = tasks.map_batches(
        _Encoder,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=1,
        num_gpus=1 if config.gpu else 0,
        fn_constructor_args=(
            data_uri,
            config.s3,
            description_json,
            weights,
            config.feature,
            config.batch_size,
            config.gpu,
        ),
    )
    embedded.write_parquet(path, filesystem=filesystem, min_rows_per_file=config.batch_size)
    done = record.model_copy(update={"complete": True})
    output.write(RECORD_FILE, done.model_dump_json(indent=2).encode())


class _Encoder:
    """Actor that reads ranges of a dataset and embeds them."""

    def __init__(
        self, uri: str, s3: S3Config, description_json: str, weights: Any, feature: Feature, batch_size: int, gpu: bool
    ) -> None:
        self._shards, self._batch_size = load_dataset(open_storage(uri, s3)), batch_size
        self._reader = ShardReader(self._shards)
        description = ModelDescription.model_validate_json(description_json)
        model = build_model(description.model)
        model.load_state_dict(safetensors.torch.load(ray.get(weights)))
        # Ray does not hide the node's GPUs from an actor that asked for none.
        self._extractor = FeatureExtractor(model, description, feature, compute_device(gpu))

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> pa.Table:
        start = int(batch["start"][0])
        samples = []
        for sample in self._reader.read(start, self._batch_size):
            if isinstance(sample, Unreadable):
                raise UserError(f"cannot embed sample {sample.key}: {sample.error}")
            samples.append(sample)
        suffixes = self._shards.manifest.image_suffixes
        encoded = [bytes(next(s.members[x] for x in suffixes if x in s.members)) for s in samples]
        vectors = self._extractor(self._extractor.load(encoded)).numpy()
        columns: dict[str, Any] = {
            "key": pa.array([s.key for s in samples]),
            "sample": pa.array(range(start, start + len(samples)), pa.int64()),
        }
        if self._shards.manifest.num_classes:
            columns["label"] = pa.array([int(bytes(s.members["cls"])) for s in samples], pa.int64())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return pa.table(columns)


def _claim(output: Storage, record: EmbeddingRecord) -> bool:
    """Make the output ours; True when exactly these embeddings are already complete there."""
    try:
        there = EmbeddingRecord.model_validate_json(output.read(RECORD_FILE))
    except NotFound:
        if any(info.key.endswith(".parquet") for info in output.list()):
            raise UserError(
                f"{output.uri} holds Parquet files that are not ours; choose an empty prefix for --output"
            ) from None
        try:
            output.write(RECORD_FILE, record.model_dump_json(indent=2).encode(), if_absent=True)
        except AlreadyExists:
            raise UserError(f"another job has just begun to write embeddings to {output.uri}; wait for it") from None
        return False
    except ValidationError:
        raise UserError(f"{output.uri}/{RECORD_FILE} is not readable; choose an empty prefix for --output") from None
    names = {"model": "another model", "dataset": "another dataset", "feature": "another feature"}
    for name, words in names.items():
        if (was := getattr(there, name)) != (now := getattr(record, name)):
            raise UserError(
                f"{output.uri} already holds embeddings of {words} ({was[:12]}, not {now[:12]}); "
                "choose another --output, or delete them first"
            )
    if not there.complete:
        for info in list(output.list()):
            if info.key.endswith(".parquet"):
                output.delete(info.key)
    return there.complete
