"""The output of an embedding job: Parquet parts, and a record of their content, which says whether they are complete.

<output>/_embeddings.json    the record; Parquet readers skip names that begin with an underscore
<output>/part-<first sample>-<end>.parquet
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, NamedTuple

from pydantic import Field, ValidationError

from crate_ray.config import Feature, PositiveInt, Settings
from crate_ray.config.identifiers import Count, Sha256
from crate_ray.errors import UserError
from crate_ray.storage.interface import NotFound, Storage

RECORD_FILE = "_embeddings.json"
LEASE_FILE = "_embeddings.lease"
_MAX_ATTEMPTS = 100
_PART = re.compile(r"part-([0-9]{12,19})-([0-9]{12,19})\.parquet")  # see part_name


class EmbeddingRecord(Settings):
    """Record of an output's content. Written before the first part, and again once all parts exist."""

    model: Sha256
    """SHA-256 of the weights."""
    dataset: Sha256
    """Digest of the dataset's manifest."""
    feature: Feature
    """Which feature."""
    num_samples: Count
    """Samples in the dataset."""
    dim: PositiveInt
    """Numbers per embedding."""
    part_samples: Annotated[tuple[PositiveInt, ...], Field(max_length=_MAX_ATTEMPTS)] = ()
    """Samples per part, in this attempt and in stopped ones before it. These parts, and no other files, are deleted."""
    complete: bool = False
    """Whether all parts exist."""
    skipped: dict[str, Count] = Field(default_factory=dict)
    """Number of bad samples, which have no row, by cause."""
    skipped_keys: dict[str, str] = Field(default_factory=dict)
    """Causes of the first 10,000 bad samples, by key."""

    @property
    def num_rows(self) -> int:
        """Embeddings in all parts."""
        return self.num_samples - sum(self.skipped.values())

    def names(self, key: str) -> bool:
        """Whether a file is a part of one of the attempts."""
        found = _PART.fullmatch(key)
        if found is None:
            return False
        start, stop = int(found[1]), int(found[2])
        return any(
            start % size == 0 and start < stop == min(start + size, self.num_samples) for size in self.part_samples
        )


class Part(NamedTuple):
    """A Parquet file that was written."""

    name: str
    rows: int
    size: int
    """Bytes."""


def part_name(start: int, stop: int) -> str:
    """File name of the part with samples start … stop − 1: the same in every attempt."""
    return f"part-{start:012d}-{stop:012d}.parquet"


def find_complete(output: Storage, wanted: EmbeddingRecord) -> EmbeddingRecord | None:
    """The record of an output that already holds the wanted embeddings; None if it does not.

    Raises UserError if the output holds embeddings of another model, dataset or feature, or Parquet files that no
    embedding job wrote.
    """
    record = _read_record(output)
    if record is None or not record.complete:
        parquet = [info.key for info in output.list() if _is_parquet(info.key)]
        if foreign := [key for key in parquet if record is None or not record.names(key)]:
            raise UserError(
                f"{output.uri} holds Parquet files that are not from an embedding job, such as {foreign[0]}; choose "
                "an empty folder for --output"
            )
    if record is None:
        return None
    for name in ("model", "dataset", "feature"):
        if (was := getattr(record, name)) != (now := getattr(wanted, name)):
            raise UserError(
                f"{output.uri} already holds embeddings of another {name} ({was[:12]}, not {now[:12]}); choose another "
                "--output, or delete them first"
            )
    return record if record.complete else None


def claim(output: Storage, record: EmbeddingRecord) -> EmbeddingRecord:
    """Start an attempt: write the record, and delete the parts of earlier, stopped attempts.

    Returns the record, which also names the parts of earlier attempts: their workers may still write some.
    """
    earlier = _read_record(output)
    sizes = (*record.part_samples, *(earlier.part_samples if earlier else ()))
    record = record.model_copy(update={"part_samples": tuple(dict.fromkeys(sizes))[:_MAX_ATTEMPTS]})
    _write_record(output, record)
    for info in list(output.list()):
        if record.names(info.key):
            output.delete(info.key)
    return record


def publish(output: Storage, record: EmbeddingRecord, parts: Iterable[Part]) -> EmbeddingRecord:
    """Mark the output complete, after a check that it holds exactly these parts. Returns the new record.

    Raises UserError if a part is missing or has another size, or if rows are missing.
    """
    expected = {part.name: part for part in parts}
    found = {info.key: info.size for info in output.list() if record.names(info.key)}
    for name in found.keys() - expected.keys():
        output.delete(name)  # a worker of a stopped attempt has written it meanwhile
    for name, part in expected.items():
        if found.get(name) != part.size:
            raise UserError(f"{output.uri}/{name} was deleted or changed while the job was running; start it again")
    rows = sum(part.rows for part in expected.values())
    if rows != record.num_rows:
        raise UserError(f"{output.uri} has {rows} rows instead of {record.num_rows}; start the job again")
    complete = record.model_copy(update={"complete": True})
    _write_record(output, complete)
    return complete


def _is_parquet(key: str) -> bool:
    """Whether a file is a Parquet file at the top of the output. Sub-folders are ignored."""
    return "/" not in key and key.endswith(".parquet")


def _read_record(output: Storage) -> EmbeddingRecord | None:
    try:
        return EmbeddingRecord.model_validate_json(output.read_small(RECORD_FILE))
    except NotFound:
        return None
    except ValidationError:
        raise UserError(
            f"{output.uri}/{RECORD_FILE} is not a record of this version; choose an empty folder for --output"
        ) from None


def _write_record(output: Storage, record: EmbeddingRecord) -> None:
    output.write(RECORD_FILE, record.model_dump_json(indent=2).encode())
