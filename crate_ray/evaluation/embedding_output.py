"""The output of an embedding job: files of consecutive samples, and records of what they hold.

<output>/_embeddings.json           the record; readers of Parquet skip names that begin with an underscore
<output>/part-<first>-<end>.parquet     embeddings of these samples (.tar for the format npy-shards)
<output>/_part-<first>-<end>.json      while the job runs: that this file is whole, and what is not in it

A job that is started again keeps the files that have a record and the size that it states, and computes the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, ValidationError

from crate_ray.config import PositiveInt, Settings
from crate_ray.config.embed import EmbeddingFormat, EmbeddingType
from crate_ray.config.export import ExportFeature
from crate_ray.config.identifiers import Count, FolderAddress, Sha256
from crate_ray.errors import UserError
from crate_ray.storage.interface import NotFound, Storage

RECORD_FILE = "_embeddings.json"
LEASE_FILE = "_embeddings.lease"
MAX_PARTS = 10_000
_MAX_ATTEMPTS = 100
_MAX_LISTED, _MAX_CAUSES = 20_000, 100
_REPORT = "_"
_SUFFIXES: dict[EmbeddingFormat, str] = {"parquet": ".parquet", "npy-shards": ".tar"}
_PART = re.compile(r"part-([0-9]{12,19})-([0-9]{12,19})(\.parquet|\.tar)")  # see part_name


class Part(Settings):
    """A file that was written whole: embeddings of samples start … stop − 1."""

    start: Count
    """First sample."""
    stop: Count
    """The sample after the last one."""
    rows: Count
    """Embeddings in it; bad samples have none."""
    size: Count
    """Bytes."""
    skipped: Annotated[dict[str, Count], Field(max_length=_MAX_CAUSES)] = Field(default_factory=dict)
    """Number of bad samples by cause."""


class PartReport(Settings):
    """Record of a part, written after it."""

    part: Part
    """The file."""
    skipped_keys: Annotated[dict[str, str], Field(max_length=_MAX_LISTED)] = Field(default_factory=dict)
    """Causes of its bad samples by key, as far as they are listed."""
    last_error: tuple[str, str, str] | None = None
    """Key, cause and message of a bad sample, for messages."""


class EmbeddingRecord(Settings):
    """Record of an output's content. Written before the first part, and again once all parts exist."""

    model: Sha256
    """SHA-256 of the weights."""
    dataset: Sha256
    """Digest of the dataset's manifest."""
    feature: ExportFeature
    """Which feature."""
    num_samples: Count
    """Samples in the dataset."""
    dim: PositiveInt
    """Numbers per embedding, or per patch token."""
    part_samples: Annotated[tuple[PositiveInt, ...], Field(max_length=_MAX_ATTEMPTS)] = ()
    """Samples per part. Further numbers are those of stopped attempts. These parts, and no other files, are deleted."""
    complete: bool = False
    """Whether all parts exist."""
    skipped: dict[str, Count] = Field(default_factory=dict)
    """Number of bad samples, which have no row, by cause."""
    skipped_keys: dict[str, str] = Field(default_factory=dict)
    """Causes of the first 10,000 bad samples, by key."""
    version: str = ""
    """The crate-ray that wrote it. Empty in records of early versions, which lack everything that follows."""
    format: EmbeddingFormat = "parquet"
    """Kind of the files."""
    dtype: EmbeddingType = "float32"
    """Type of the numbers."""
    patches: PositiveInt | None = None
    """Patch tokens per sample, for the feature 'patch'."""
    preparation: Sha256 | None = None
    """Digest of the model's settings and of the normalisation of its input."""
    reference: str | None = None
    """Reference to the model."""
    data: FolderAddress | None = None
    """Address of the dataset."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers, if known."""
    parts: Annotated[tuple[Part, ...], Field(max_length=MAX_PARTS)] | None = None
    """All parts, once they exist."""

    @property
    def num_rows(self) -> int:
        """Embeddings in all parts."""
        return self.num_samples - sum(self.skipped.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one embedding."""
        return (self.dim,) if self.patches is None else (self.patches, self.dim)

    def ranges(self) -> list[range]:
        """The samples of each part."""
        size, total = self.part_samples[0], self.num_samples
        return [range(start, min(start + size, total)) for start in range(0, total, size)]

    def part_name(self, samples: range) -> str:
        """File name of the part with these samples: the same in every attempt."""
        return f"part-{samples.start:012d}-{samples.stop:012d}{_SUFFIXES[self.format]}"

    def names(self, key: str) -> bool:
        """Whether a file is a part of one of the attempts."""
        found = _PART.fullmatch(key)
        if found is None or found[3] != _SUFFIXES[self.format]:
            return False
        start, stop = int(found[1]), int(found[2])
        return any(
            start % size == 0 and start < stop == min(start + size, self.num_samples) for size in self.part_samples
        )


def find_complete(output: Storage, wanted: EmbeddingRecord) -> EmbeddingRecord | None:
    """The record of an output that already holds the wanted embeddings; None if it does not.

    It does if all of its files are there and have the sizes that they had when they were written.

    Raises UserError if the output holds embeddings of another model, dataset, feature, format or type, or data files
    that no embedding job wrote.
    """
    record = read_record(output)
    if record is None or not record.complete:
        data = [info.key for info in output.list() if _is_data(info.key)]
        if foreign := [key for key in data if record is None or not record.names(key)]:
            raise UserError(
                f"{output.uri} holds files that are not from an embedding job, such as {foreign[0]}; choose "
                "an empty folder for --output"
            )
    if record is None:
        return None
    for name in ("model", "dataset", "feature", "format", "dtype", "preparation"):
        was, now = getattr(record, name), getattr(wanted, name)
        if was != now and None not in (was, now):
            what = "model" if name == "preparation" else name
            raise UserError(
                f"{output.uri} already holds embeddings of another {what} ({was[:12]}, not {now[:12]}); choose another "
                "--output, or delete them first"
            )
    if not record.complete:
        return None
    return None if damaged_parts(output, record) else record


def damaged_parts(output: Storage, record: EmbeddingRecord) -> list[str]:
    """Parts of a complete output that are missing, or whose size or number of rows is wrong."""
    found = {info.key: info.size for info in output.list()}
    if record.parts is None:  # of an early version; the oldest do not say which parts there are
        return [name for samples in (record.ranges() if record.part_samples else []) if
                (name := record.part_name(samples)) not in found]  # fmt: skip
    parts = {part.start: part for part in record.parts}
    wrong = []
    for samples in record.ranges():
        part, name = parts.get(samples.start), record.part_name(samples)
        if part is None or part.stop != samples.stop or found.get(name) != part.size:
            wrong.append(name)
    if not wrong and sum(part.rows for part in record.parts) != record.num_rows:
        wrong = [record.part_name(samples) for samples in record.ranges()]
    return wrong


def claim(output: Storage, wanted: EmbeddingRecord) -> tuple[EmbeddingRecord, list[PartReport]]:
    """Start an attempt, or go on with a stopped one: write the record, and delete what is not a whole part.

    Returns the record and the reports of the parts that exist. The record also names the parts of earlier attempts with
    other sizes, since their workers may still write some, and lists the bad samples of an output that was complete.
    """
    earlier = read_record(output)
    sizes = [*wanted.part_samples, *(earlier.part_samples if earlier else ())]
    goes_on = earlier is not None and bool(earlier.version) and bool(earlier.part_samples)
    if earlier is not None and goes_on:
        sizes = [*earlier.part_samples]
    record = wanted.model_copy(
        update={
            "part_samples": tuple(dict.fromkeys(sizes))[:_MAX_ATTEMPTS],
            "skipped_keys": earlier.skipped_keys if earlier and goes_on else {},
        }
    )
    found = {info.key: info.size for info in output.list()}
    done = _whole(output, record, found, earlier) if goes_on else []
    _write_record(output, record)
    kept = {record.part_name(range(report.part.start, report.part.stop)) for report in done}
    for name in found.keys() - kept:
        if record.names(name):
            output.delete(name)
    return record, done


def _whole(
    output: Storage, record: EmbeddingRecord, found: dict[str, int], earlier: EmbeddingRecord | None
) -> list[PartReport]:
    """Reports of the parts that are whole."""
    of_complete = {part.start: PartReport(part=part) for part in (earlier and earlier.parts) or ()}
    whole = []
    for samples in record.ranges():
        name = record.part_name(samples)
        if name not in found:
            continue
        report = of_complete.get(samples.start)
        if report is None and _report_name(name) in found:
            report = _read_report(output, name)
        if report is not None and (samples.start, samples.stop, found[name]) == (
            report.part.start, report.part.stop, report.part.size
        ) and report.part.rows + sum(report.part.skipped.values()) == len(samples):  # fmt: skip
            whole.append(report)
    return whole


def write_part(output: Storage, record: EmbeddingRecord, samples: range, content: bytes, report: PartReport) -> None:
    """Write a part, then its report."""
    name = record.part_name(samples)
    output.write(name, content)
    output.write(_report_name(name), report.model_dump_json().encode())


def publish(output: Storage, record: EmbeddingRecord, parts: Iterable[Part]) -> EmbeddingRecord:
    """Mark the output complete, after a check that it holds exactly these parts. Returns the new record.

    Raises UserError if a part is missing or has another size, or if rows are missing.
    """
    expected = {record.part_name(range(part.start, part.stop)): part for part in parts}
    listed = {info.key: info.size for info in output.list()}
    found = {key: size for key, size in listed.items() if record.names(key)}
    for name in found.keys() - expected.keys():
        output.delete(name)  # a worker of a stopped attempt has written it meanwhile
    for name, part in expected.items():
        if found.get(name) != part.size:
            raise UserError(f"{output.uri}/{name} was deleted or changed while the job was running; start it again")
    rows = sum(part.rows for part in expected.values())
    if rows != record.num_rows:
        raise UserError(f"{output.uri} has {rows} rows instead of {record.num_rows}; start the job again")
    ordered = tuple(sorted(expected.values(), key=lambda part: part.start))
    complete = record.model_copy(update={"complete": True, "parts": ordered})
    _write_record(output, complete)
    for name in expected:
        if _report_name(name) in listed:
            output.delete(_report_name(name))
    return complete


def read_record(output: Storage) -> EmbeddingRecord | None:
    """The record of an output; None if there is none. Raises UserError if it is damaged."""
    try:
        return EmbeddingRecord.model_validate_json(output.read_small(RECORD_FILE))
    except NotFound:
        return None
    except ValidationError:
        raise UserError(
            f"{output.uri}/{RECORD_FILE} is not a record of this version; choose an empty folder for --output"
        ) from None


def _is_data(key: str) -> bool:
    """Whether a file at the top of the output looks like embeddings. Sub-folders are ignored."""
    return "/" not in key and key.endswith(tuple(_SUFFIXES.values()))


def _report_name(part: str) -> str:
    return f"{_REPORT}{part.partition('.')[0]}.json"


def _read_report(output: Storage, part: str) -> PartReport | None:
    """The report of a part; None if it is missing or damaged."""
    try:
        return PartReport.model_validate_json(output.read_small(_report_name(part)))
    except (NotFound, ValidationError):
        return None


def _write_record(output: Storage, record: EmbeddingRecord) -> None:
    output.write(RECORD_FILE, record.model_dump_json(indent=2).encode())
