"""crate-ray search: the neighbours of an exact search over all rows, in bounded memory, and a picture of them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from crate_ray.config import CrateMAEConfig, EmbedConfig, PrepareConfig, S3Config, SearchConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding import embed_dataset
from crate_ray.evaluation.embedding_table import EmbeddingTable, vectors_of
from crate_ray.evaluation.search import nearest, search
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, export_model, load_any
from crate_ray.storage.interface import open_storage

MODEL = CrateMAEConfig(image_size=16, patch_size=4, dim=16, depth=1, num_subspaces=2)
SAMPLES, PARTS = 90, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a model, and embeddings."""
    folder = tmp_path_factory.mktemp("search")
    storage = open_storage(str(folder / "data"), S3Config())
    pack(shapes_source("all", SAMPLES, 24, 0), storage, PrepareConfig(output=storage.uri))
    manifest = load_dataset(storage).manifest
    torch.manual_seed(0)
    about = ModelDescription(model=MODEL, mean=manifest.mean, std=manifest.std, kind="image")
    export_model(folder / "model", build_model(MODEL).state_dict(), about)
    config = EmbedConfig(data=storage.uri, output=str(folder / "out"), part_samples=PARTS)
    embed_dataset(config, *load_any(folder / "model"), str(folder / "model"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the embeddings, which may be changed."""
    shutil.copytree(made / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(query: str, **settings: Any) -> SearchConfig:
    return SearchConfig(embeddings="out", query=query, **settings)


def image_of(made: Path, sample: int) -> bytes:
    import webdataset

    rows = list(webdataset.WebDataset(str(made / "data" / "shard-000000.tar"), shardshuffle=False))
    return next(value for name, value in rows[sample].items() if name in ("png", "jpg", "jpeg"))


def test_an_image_finds_itself_first_and_the_others_by_cosine(made: Path, folder: Path) -> None:
    table = pq.read_table("out")
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False)).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for sample in (0, 40, 89):
        wanted = np.argsort(-(vectors @ vectors[sample]), kind="stable")
        (folder / "query.png").write_bytes(image_of(made, sample))
        found = search(config("query.png", neighbours=5)).neighbours
        assert found[0].sample == sample and found[0].similarity == pytest.approx(1, abs=1e-5)
        for text in (str(sample), table["key"][sample].as_py(), table["name"][sample].as_py()):
            of_row = search(config(text, neighbours=5, picture=None))
            assert of_row.query.row is not None and of_row.query.row.sample == sample
            others = [row for row in of_row.neighbours if row.sample != sample]
            assert len(others) == 5  # the query is not its own neighbour
            cosines = [row.similarity for row in others]
            assert cosines == pytest.approx(np.sort(vectors @ vectors[sample])[::-1][1:6].tolist(), abs=1e-5)
        assert {row.sample for row in found} == set(wanted[:5].tolist())
    row = found[0]
    assert (row.key, row.name) == (table["key"][89].as_py(), table["name"][89].as_py())
    assert row.label == table["label"][89].as_py()


def test_the_picture_shows_the_images_themselves(made: Path, folder: Path) -> None:
    search(config("3", neighbours=7))
    with Image.open(folder / "neighbours.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] > pixels.shape[0] > 300  # two rows of at most six
    with Image.open(io.BytesIO(image_of(made, 3))) as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    tile = pixels[: pixels.shape[0] // 2, : pixels.shape[1] // 6].reshape(-1, 3)
    middle = colours[len(colours) // 2]
    assert np.abs(tile - middle).sum(1).min() <= 3


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_row_groups_do_not_matter(folder: Path, rows: int) -> None:
    """Also those of early versions: many small files without a list of parts."""
    before = EmbeddingTable(open_storage("out", S3Config()))
    query = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    wanted = nearest(before, query, 12, 5)
    whole = pq.read_table("out")
    for path in Path("out").glob("*.parquet"):
        path.unlink()
    pq.write_table(pa.concat_tables([whole.slice(60), whole.slice(0, 60)]), "out/part-0.parquet", row_group_size=rows)
    record = json.loads(Path("out/_embeddings.json").read_text())
    kept = ("model", "dataset", "feature", "num_samples", "dim", "complete")
    Path("out/_embeddings.json").write_text(json.dumps({name: record[name] for name in kept}))
    table = EmbeddingTable(open_storage("out", S3Config()))
    found = nearest(table, query, 12, 5)
    assert [row[1:] for row in found] == [row[1:] for row in wanted]
    assert [row.similarity for row in found] == pytest.approx([row.similarity for row in wanted], abs=1e-6)
    assert len(nearest(table, query, 1000, None)) == SAMPLES
    assert max(len(vectors_of(group.rows)) for group in table.groups(("embedding",))) <= max(rows, 1)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({}, {"query": "nothing"}, "nothing is neither an image file nor a key, a name or a sample number in out"),
        ({}, {"query": "90"}, "90 is neither an image file"),
        ({"complete": False}, {}, "is not complete; start the same crate-ray embed again, which goes on"),
        ({"model": "f" * 64}, {}, "is another model now than the one that out is from"),
        ({"preparation": "f" * 64}, {}, "is another model now than the one that out is from"),
        ({"reference": None}, {}, "does not say which model it is from; give --model"),
        ({"reference": "/nowhere"}, {}, "out is from this model: give --model if it has moved"),
        ({"dataset": "f" * 64}, {}, "is another dataset than the one that was embedded"),
        ({"data": "/nowhere"}, {}, "give --data if it has moved, or --picture null"),
        ({"data": None}, {}, "does not say where its dataset is; give --data, or --picture null"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    made: Path, folder: Path, change: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    (folder / "query.png").write_bytes(image_of(made, 1))
    record = json.loads(Path("out/_embeddings.json").read_text()) | change
    Path("out/_embeddings.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=words) as error:
        search(config(**{"query": "query.png", **settings}))
    assert "\n" not in str(error.value)


def test_what_has_moved_is_named(made: Path, folder: Path) -> None:
    (folder / "query.png").write_bytes(image_of(made, 1))
    record = json.loads(Path("out/_embeddings.json").read_text())
    Path("out/_embeddings.json").write_text(json.dumps(record | {"data": "/nowhere", "reference": "/nowhere"}))
    found = search(config("query.png", data=str(made / "data"), model=str(made / "model")))
    assert found.neighbours[0].sample == 1


def test_a_damaged_file_and_query_are_one_sentence(folder: Path) -> None:
    Path("query.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"query\.png cannot be used: "):
        search(config("query.png"))
    path = sorted(Path("out").glob("*.parquet"))[1]
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        search(config("1"))
    path.unlink()
    with pytest.raises(UserError, match=f"lacks {path.name}, or the file has changed"):
        search(config("1"))
