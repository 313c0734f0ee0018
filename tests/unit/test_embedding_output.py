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
    PartReport,
    claim,
    find_complete,
    publish,
    write_part,
)
from crate_ray.storage.interface import Storage, open_storage

WANTED = EmbeddingRecord(
    model="a" * 64, dataset="b" * 64, feature="mean", num_samples=10, dim=4, part_samples=(5,), version="1"
)


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"), S3Config())


def part_name(start: int, stop: int) -> str:
    return WANTED.part_name(range(start, stop))


def write(output: Storage, start: int, stop: int, skipped: int = 0, keys: tuple[str, ...] = ()) -> Part:
    bad = {"truncated": skipped} if skipped else {}
    part = Part(start=start, stop=stop, rows=stop - start - skipped, size=stop - start, skipped=bad)
    report = PartReport(part=part, skipped_keys=dict.fromkeys(keys, "truncated"))
    write_part(output, WANTED, range(start, stop), bytes(part.size), report)
    return part


def names(output: Storage) -> set[str]:
    return {info.key for info in output.list()}


def test_a_stopped_attempt_goes_on_with_its_whole_parts(output: Storage) -> None:
    assert find_complete(output, WANTED) is None
    claim(output, WANTED)
    kept = write(output, 0, 5, skipped=1, keys=("k",))
    output.write(part_name(5, 10), b"written, but not recorded")
    # Another size of parts is asked for, but the parts that exist count.
    record, done = claim(output, WANTED.model_copy(update={"part_samples": (2,)}))
    assert record.part_samples == (5,) and [report.part for report in done] == [kept]
    assert done[0].skipped_keys == {"k": "truncated"}
    assert part_name(0, 5) in names(output) and part_name(5, 10) not in names(output)
    assert len(claim(output, WANTED)[1]) == 1
    output.write(part_name(0, 5), bytes(4))  # not as long as its report says
    assert claim(output, WANTED)[1] == [] and part_name(0, 5) not in names(output)


def test_a_report_of_something_else_does_not_count(output: Storage) -> None:
    claim(output, WANTED)
    part = write(output, 0, 5)
    for wrong in (b"{}", b"x", PartReport(part=part.model_copy(update={"stop": 4})).model_dump_json().encode(),
                  PartReport(part=part.model_copy(update={"rows": 4})).model_dump_json().encode()):  # fmt: skip
        write(output, 0, 5)
        output.write("_part-000000000000-000000000005.json", wrong)
        assert claim(output, WANTED)[1] == []


def test_parts_of_an_early_version_are_computed_again(output: Storage) -> None:
    early = WANTED.model_copy(update={"part_samples": (3,), "version": ""})
    output.write(RECORD_FILE, early.model_dump_json().encode())
    output.write(early.part_name(range(3)), b"abc")
    record, done = claim(output, WANTED)
    assert done == [] and record.part_samples == (5, 3) and names(output) == {RECORD_FILE}
    parts = [write(output, 0, 5), write(output, 5, 10)]
    output.write(part_name(3, 6), b"late, by a worker of the first attempt")
    output.write("notes/mine.parquet", b"not ours")
    complete = publish(output, record, parts)
    assert complete.complete and complete.num_rows == 10
    assert names(output) == {RECORD_FILE, part_name(0, 5), part_name(5, 10), "notes/mine.parquet"}
    assert find_complete(output, WANTED) == complete


def test_an_output_without_all_parts_and_rows_is_not_complete(output: Storage) -> None:
    claim(output, WANTED)
    parts = [write(output, 0, 5), write(output, 5, 10)]
    output.delete(part_name(0, 5))
    with pytest.raises(UserError, match=f"{part_name(0, 5)} was deleted or changed"):
        publish(output, WANTED, parts)
    output.write(part_name(0, 5), bytes(2))  # truncated
    with pytest.raises(UserError, match="was deleted or changed"):
        publish(output, WANTED, parts)
    output.write(part_name(0, 5), bytes(5))
    with pytest.raises(UserError, match="has 9 rows instead of 10"):
        publish(output, WANTED, [parts[0], parts[1].model_copy(update={"rows": 4})])
    assert find_complete(output, WANTED) is None
    parts[1] = write(output, 5, 10, skipped=1)
    skipped = WANTED.model_copy(update={"skipped": {"truncated": 1}, "skipped_keys": {"k": "truncated"}})
    assert publish(output, skipped, parts).num_rows == 9


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_complete_output_that_lost_a_file_is_completed(output: Storage, damage: str) -> None:
    record, _ = claim(output, WANTED)
    parts = [write(output, 0, 5, skipped=1, keys=("k",)), write(output, 5, 10)]
    bad = {"skipped": {"truncated": 1}, "skipped_keys": {"k": "truncated"}}
    publish(output, record.model_copy(update=bad), parts)
    assert find_complete(output, WANTED) is not None
    output.delete(part_name(5, 10))
    if damage == "shorter":
        output.write(part_name(5, 10), bytes(3))
    assert find_complete(output, WANTED) is None
    record, done = claim(output, WANTED)
    assert [report.part for report in done] == [parts[0]] and record.skipped_keys == {"k": "truncated"}
    assert find_complete(output, WANTED) is None
    again = publish(output, record.model_copy(update=bad), [done[0].part, write(output, 5, 10)])
    assert find_complete(output, WANTED) == again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "c" * 64}, "embeddings of another model"),
        ({"dataset": "c" * 64}, "embeddings of another dataset"),
        ({"feature": "cls"}, "embeddings of another feature"),
        ({"dtype": "float16"}, "embeddings of another dtype"),
    ],
)
def test_embeddings_of_something_else_are_never_touched(output: Storage, change: dict[str, str], words: str) -> None:
    claim(output, WANTED)
    write(output, 0, 5)
    with pytest.raises(UserError, match=words):
        find_complete(output, WANTED.model_copy(update=change))
    assert part_name(0, 5) in names(output)


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
    later = {"version", "format", "dtype", "patches", "preparation", "reference", "data", "classes", "parts"}
    complete = WANTED.model_copy(update={"complete": True})
    output.write(RECORD_FILE, complete.model_dump_json(exclude=later).encode())
    assert find_complete(output, WANTED) is None  # it names its parts, which are missing
    for samples in WANTED.ranges():
        output.write(WANTED.part_name(samples), b"x")
    found = find_complete(output, WANTED)
    assert found is not None and found.num_rows == 10
    output.write(
        RECORD_FILE, complete.model_dump_json(exclude={*later, "skipped", "skipped_keys", "part_samples"}).encode()
    )
    found = find_complete(output, WANTED)
    assert found is not None and found.num_rows == 10
