"""Packed samples keep the names that they had in their source."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crate_ray.config import CrateMAEConfig, EmbedConfig, PrepareConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import Manifest, parse_manifest
from crate_ray.data.format.names import printable
from crate_ray.data.format.source_names import read_source_names, source_names_content
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source, open_source
from crate_ray.data.prepare.validation import pack_split
from crate_ray.data.read.shard_reader import ShardReader
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding import embed_dataset
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription
from crate_ray.storage.interface import Storage, open_storage

NAMES = [
    b"dogs/IMG 0007.JPG",
    b"caf\xe9/\xfc.jpg",
    "grün/ß.jpg".encode(),
    b"a\nb/\xc2\x85 \xe2\x80\xa8.jpg",
    b'"/\\.jpg',
]
LIST = "shard-000000.tar.names.jsonl"


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def local(path: Path) -> Storage:
    return open_storage(str(path), S3Config())


def config(**values: object) -> PrepareConfig:
    return PrepareConfig(output="unused", **values)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> dict[str, bytes]:
    """Content by name of a folder `in` with odd names."""
    files = {os.fsdecode(name): picture(number) for number, name in enumerate(NAMES)}
    files |= {f"dogs/{number}.jpg": picture(number) for number in range(5, 40)}
    for name, content in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return files


def names_by_content(folder: Path) -> dict[str, bytes]:
    reader = ShardReader(load_dataset(local(folder)))
    found = {}
    for number, sample in enumerate(reader.read(0, reader.shards.manifest.num_samples)):
        name = reader.source_name(number)
        assert name is not None
        found[name] = bytes(sample.members["jpg"])
    return found


def test_every_sample_has_its_name(tmp_path: Path, source: dict[str, bytes]) -> None:
    (tmp_path / "in" / "dogs" / "broken.jpg").write_bytes(b"no image")
    manifest = pack(open_source(local(tmp_path / "in")), local(tmp_path / "out"), config(shard_samples=12))
    assert manifest.source_names and manifest.num_shards == 4
    assert names_by_content(tmp_path / "out") == source
    for path in (tmp_path / "out").glob("*.jsonl"):  # plain JSON, one object a line, in UTF-8
        first, *rows = [json.loads(line) for line in path.read_text().removesuffix("\n").split("\n")]
        assert first["shard"] + ".names.jsonl" == path.name
        with tarfile.open(path.with_name(first["shard"])) as tar:
            assert [row["key"] for row in rows] == [n.split(".")[0] for n in tar.getnames() if n.endswith("jpg")]


def test_shards_and_the_identity_of_the_dataset_do_not_depend_on_names(
    tmp_path: Path, source: dict[str, bytes]
) -> None:
    folder = tmp_path / "out"
    manifest = pack(open_source(local(tmp_path / "in")), local(folder), config())
    stock = list(webdataset.WebDataset(f"{folder}/shard-000000.tar", shardshuffle=False))
    assert {frozenset(sample) - {"__key__", "__url__", "__local_path__"} for sample in stock} == {
        frozenset({"jpg", "cls"})
    }

    # As packed by an earlier version: no lists, and no word of them in the manifest.
    (folder / LIST).unlink()
    values = json.loads((folder / "manifest.json").read_text())
    assert values.pop("source_names") is True and values.pop("sha256")
    earlier = Manifest.model_validate(values)
    assert "source_names" not in json.loads(earlier.to_json())
    (folder / "manifest.json").write_bytes(earlier.to_json())
    assert parse_manifest(earlier.to_json(), "") == earlier and earlier.digest() == manifest.digest()
    reader = ShardReader(load_dataset(local(folder)))
    assert len(reader.read(0, 40)) == 40 and reader.source_name(3) is None


@pytest.mark.parametrize("damage", ["missing", "another shard", "cut", "text", "number"])
def test_a_list_that_is_missing_or_wrong_is_told_once_and_names_are_unknown(
    tmp_path: Path, source: dict[str, bytes], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = tmp_path / "out"
    pack(open_source(local(tmp_path / "in")), local(folder), config())
    path = folder / LIST
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "another shard":
        pack(open_source(local(tmp_path / "in")), local(tmp_path / "other"), config(seed=1))
        path.write_bytes((tmp_path / "other" / LIST).read_bytes())
    else:
        path.write_bytes({"cut": content[:900], "text": b"\xff", "number": content[: content.rindex(b"{")]}[damage])
    reader = ShardReader(load_dataset(local(folder)))
    assert [reader.source_name(number) for number in range(40)] == [None] * 40
    assert caplog.text.count(f"{LIST} cannot be used") == 1
    assert len(reader.read(0, 40)) == 40


def test_names_survive_packing_again_and_indexing_again(tmp_path: Path, source: dict[str, bytes]) -> None:
    pack(open_source(local(tmp_path / "in")), local(tmp_path / "out"), config(shard_samples=12))
    pack(open_source(local(tmp_path / "out")), local(tmp_path / "again"), config(seed=5))
    assert names_by_content(tmp_path / "again") == source
    assert index_existing(local(tmp_path / "out"), overwrite=True).source_names
    assert names_by_content(tmp_path / "out") == source
    assert index_existing(local(tmp_path / "elsewhere"), shards=f"{tmp_path}/out/*.tar").source_names
    assert names_by_content(tmp_path / "elsewhere") == source


def test_names_of_foreign_shards_are_their_keys(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"deep/{number}.jpg")
            info.size = len(picture(number))
            tar.addfile(info, io.BytesIO(picture(number)))
    assert not index_existing(local(tmp_path / "in")).source_names
    pack(open_source(local(tmp_path / "in")), local(tmp_path / "out"), config())
    assert sorted(names_by_content(tmp_path / "out")) == [f"x.tar/deep/{number}" for number in range(3)]


def test_both_parts_of_a_split_have_names_and_lists_of_old_shards_are_removed(
    tmp_path: Path, source: dict[str, bytes]
) -> None:
    for shard_samples in (4, 12):
        options = config(validation=0.25, shard_samples=shard_samples, overwrite=True)
        pack_split(open_source(local(tmp_path / "in")), local(tmp_path / "out"), options)
        parts = [names_by_content(tmp_path / "out" / part) for part in ("train", "validation")]
        assert parts[0] | parts[1] == source and len(parts[0]) == 30
    for part in ("train", "validation"):
        files = {path.name for path in (tmp_path / "out" / part).glob("shard-*")}
        assert files == {name for f in files if f.endswith("tar") for name in (f, f"{f}.names.jsonl")}
    mine = tmp_path / "out" / "train" / "mine.names.jsonl"
    mine.write_text("not ours")
    pack_split(open_source(local(tmp_path / "in")), local(tmp_path / "out"), options)
    assert mine.exists()


def test_a_packing_that_was_stopped_writes_the_lists_that_are_missing(
    tmp_path: Path, source: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from crate_ray.data.prepare import build

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_conclude", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(open_source(local(tmp_path / "in")), local(tmp_path / "out"), config(shard_samples=12))
    (tmp_path / "out" / LIST).unlink()  # as an earlier version leaves it
    pack(open_source(local(tmp_path / "in")), local(tmp_path / "out"), config(shard_samples=12))
    assert names_by_content(tmp_path / "out") == source


texts = st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape"))


@given(st.lists(st.tuples(texts, texts | st.text(st.characters(exclude_categories=["Cs"])))))
def test_any_name_comes_back(names: list[tuple[str, str]]) -> None:
    class Memory:
        def read_small(self, key: str, limit: int) -> bytes:
            assert key == "x.tar.names.jsonl"
            return source_names_content("x.tar", "0" * 64, names)

    assert read_source_names(Memory(), "x.tar", "0" * 64) == names  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"null\n", b"{}\n{}", b"[" * 100_000, b"\xff",
        b'{"sha256": 1}', b'{"sha256": "x"}\n{"key": "a"}', b'{"sha256": "x"}\n{"key": "a", "name": "\\ud800"}',
    ],
)  # fmt: skip
def test_hostile_lists_are_value_errors(content: bytes) -> None:
    class Memory:
        def read_small(self, key: str, limit: int) -> bytes:
            return content

    with pytest.raises(ValueError):
        read_source_names(Memory(), "x.tar", "x")  # type: ignore[arg-type]


def test_lists_are_read_within_a_bound(tmp_path: Path) -> None:
    with (tmp_path / "x.tar.names.jsonl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="has more than"):
        read_source_names(local(tmp_path), "x.tar")


# --- Where names are shown ------------------------------------------------------------------------------------------


def damage(folder: Path) -> None:
    """Damage one sample after it was packed, so that 16 samples are lost."""
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    at = content.rindex(b"\xff\xd8\xff")
    content[at + 30 : at + 40] = bytes(10)
    path.write_bytes(content)


def test_bad_samples_are_listed_with_their_names(tmp_path: Path, source: dict[str, bytes]) -> None:
    folder = tmp_path / "out"
    pack(open_source(local(tmp_path / "in")), local(folder), config(shuffle=False))
    names = [name for _, name in read_source_names(local(folder), "shard-000000.tar")]
    damage(folder)
    with stream(str(folder), batch_size=40, image_size=16, steps=1, max_bad_fraction=0.5) as batches:
        assert len(list(batches)) == 1
        causes = batches.bad.causes
    lost = range(32, 40)
    assert causes == {f"shard-000000.tar#{n} ({names[n]})": "damaged_shard" for n in lost}


MODEL = CrateMAEConfig(image_size=16, patch_size=8, dim=16, depth=1, num_subspaces=2)


def embedded(folder: Path) -> tuple[pa.Table, dict[str, str]]:
    """What is written for a dataset, and the causes of the bad samples by key."""
    manifest = load_dataset(local(folder)).manifest
    description = ModelDescription(model=MODEL, mean=manifest.mean, std=manifest.std, kind="image")
    torch.manual_seed(0)
    output = f"{folder}-embeddings"
    shutil.rmtree(output, ignore_errors=True)
    settings = EmbedConfig(data=str(folder), output=output, max_bad_fraction=0.5)
    record = embed_dataset(settings, build_model(MODEL), description, "mine")
    return pq.read_table(output), record.skipped_keys


def test_embeddings_have_a_column_of_names(tmp_path: Path, source: dict[str, bytes]) -> None:
    folder = tmp_path / "out"
    pack(open_source(local(tmp_path / "in")), local(folder), config())
    table, errors = embedded(folder)
    found = [name for _, name in read_source_names(local(folder), "shard-000000.tar")]
    readable = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in found]
    assert table.column_names == ["key", "name", "shard", "sample", "label", "embedding"] and not errors
    assert table["name"].to_pylist() == readable and r"caf\xe9/\xfc.jpg" in readable
    damage(folder)
    table, errors = embedded(folder)
    assert len(table) == 32 and {key.split(" (")[1] for key in errors} == {f"{printable(name)})" for name in found[32:]}
    (folder / LIST).unlink()
    table, _ = embedded(folder)
    assert table["name"].null_count == len(table) == 32


def test_keys_in_latin_1_become_embeddings(tmp_path: Path) -> None:
    """A tar of an old machine."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for number in range(4):
            content = picture(number) if number else b"no image"
            info = tarfile.TarInfo(f"caf\xe9-{number}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index_existing(local(folder))
    table, errors = embedded(folder)
    assert table.column_names == ["key", "shard", "sample", "embedding"]
    assert table["key"].to_pylist() == [rf"caf\xe9-{number}" for number in range(1, 4)]
    assert list(errors) == [r"caf\xe9-0"]


def test_items_that_are_generated_have_names(tmp_path: Path) -> None:
    items = [Item(f"digit {n}", lambda n=n: {"jpg": picture(n)}) for n in range(3)]  # type: ignore[misc]
    pack(Source(items), local(tmp_path), config())
    assert sorted(names_by_content(tmp_path)) == ["digit 0", "digit 1", "digit 2"]
