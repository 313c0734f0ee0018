"""An embedding job's output: complete only with all of its parts, free of leftovers, and never somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from crate_ray.config import S3Config
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding_output import (
    RECORD_FILE,
    EmbeddingRecord,
    Part,
    claim,
    find_complete,
    part_name,
    publish,
)
from crate_ray.storage.interface import Storage, open_storage

WANTED = EmbeddingRecord(model="a" * 64, dataset="b" * 64, feature="mean", num_samples=10, dim=4, part_samples=(5,))


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"), S3Config())


def write(output: Storage, start: int, stop: int, rows: int | None = None) -> Part:
    part = Part(part_name(start, stop), stop - start if rows is None else rows, stop - start)
    output.write(part.name, bytes(part.size))
    return part


def names(output: Storage) -> set[str]:
    return {info.key for info in output.list()}


def test_leftovers_of_a_stopped_attempt_do_not_end_up_in_the_result(output: Storage) -> None:
    assert find_complete(output, WANTED) is None
    for size in (3, 6):  # stopped, and started again with another batch size
        claim(output, WANTED.model_copy(update={"part_samples": (size,)}))
        write(output, 0, size)
    assert find_complete(output, WANTED) is None
    record = claim(output, WANTED)
    assert names(output) == {RECORD_FILE}
    parts = [write(output, 0, 5), write(output, 5, 10)]
    write(output, 3, 6)  # late, by a worker of the first attempt
    output.write("notes/mine.parquet", b"not ours")
    done = publish(output, record, parts)
    assert done.complete and done.num_rows == 10
    assert names(output) == {RECORD_FILE, parts[0].name, parts[1].name, "notes/mine.parquet"}
    assert find_complete(output, WANTED) == done


def test_an_output_without_all_parts_and_rows_is_not_complete(output: Storage) -> None:
    claim(output, WANTED)
    parts = [write(output, 0, 5), write(output, 5, 10)]
    output.delete(parts[0].name)
    with pytest.raises(UserError, match=f"{parts[0].name} was deleted or changed"):
        publish(output, WANTED, parts)
    output.write(parts[0].name, bytes(2))  # truncated
    with pytest.raises(UserError, match="was deleted or changed"):
        publish(output, WANTED, parts)
    output.write(parts[0].name, bytes(5))
    with pytest.raises(UserError, match="has 9 rows instead of 10"):
        publish(output, WANTED, [parts[0], parts[1]._replace(rows=4)])
    assert find_complete(output, WANTED) is None
    skipped = WANTED.model_copy(update={"skipped": {"damaged": 1}, "skipped_keys": {"k": "damaged"}})
    assert publish(output, skipped, [parts[0], parts[1]._replace(rows=4)]).num_rows == 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "c" * 64}, "embeddings of another model"),
        ({"dataset": "c" * 64}, "embeddings of another dataset"),
        ({"feature": "cls"}, "embeddings of another feature"),
    ],
)
def test_embeddings_of_something_else_are_never_touched(output: Storage, change: dict[str, str], words: str) -> None:
    claim(output, WANTED)
    part = write(output, 0, 5)
    with pytest.raises(UserError, match=words):
        find_complete(output, WANTED.model_copy(update=change))
    assert part.name in names(output)


def test_files_that_no_embedding_job_wrote_are_never_touched(output: Storage) -> None:
    output.write("mine.parquet", b"x")
    with pytest.raises(UserError, match="not from an embedding job, such as mine.parquet; choose an empty folder"):
        find_complete(output, WANTED)
    output.delete("mine.parquet")
    output.write(RECORD_FILE, b"{}")
    with pytest.raises(UserError, match="is not a record of this version"):
        find_complete(output, WANTED)


@pytest.mark.parametrize(
    "name", [part_name(0, 4), part_name(2, 7), part_name(0, 10**15), part_name(5, 5), "part-1.parquet"]
)
def test_only_parts_that_the_record_names_are_deleted(output: Storage, name: str) -> None:
    claim(output, WANTED)
    output.write(name, b"somebody else's")
    with pytest.raises(UserError, match=f"not from an embedding job, such as {name}"):
        find_complete(output, WANTED)
    claim(output, WANTED)
    assert name in names(output)
    publish(output, WANTED, [write(output, 0, 5), write(output, 5, 10)])
    assert name in names(output)


def test_a_record_of_an_earlier_version_is_still_read(output: Storage) -> None:
    earlier = WANTED.model_copy(update={"complete": True}).model_dump_json(
        exclude={"skipped", "skipped_keys", "part_samples"}
    )
    output.write(RECORD_FILE, earlier.encode())
    found = find_complete(output, WANTED)
    assert found is not None and found.num_rows == 10
