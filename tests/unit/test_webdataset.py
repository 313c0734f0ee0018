"""webdataset's pipelines read our shards, and get our samples in exactly our order."""

from __future__ import annotations

import inspect
import io
import multiprocessing
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import crate_ray.data.webdataset
from crate_ray.config import PrepareConfig
from crate_ray.data.format.tar import DamagedShard
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source
from crate_ray.data.stream import stream
from crate_ray.data.webdataset import samples
from crate_ray.errors import UserError
from crate_ray.storage.local import LocalStorage

COUNT = 150
RESIDENT: dict[str, Any] = {}
STREAMED: dict[str, Any] = {"memory_bytes": 1, "block_samples": 16, "window_blocks": 2, "lanes": 2}


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("packed")
    items = [Item(str(n), lambda n=n: {"png": png(n), "cls": b"%d" % (n % 5)}) for n in range(COUNT)]  # type: ignore[misc]
    pack(Source(items), LocalStorage(path), PrepareConfig(output="unused", shard_samples=80))
    return str(path)


def keys(**settings: Any) -> list[str]:
    return [sample["__key__"] for sample in samples(batch_size=20, **settings)]


@pytest.mark.parametrize("reading", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_samples_come_in_the_order_of_stream(folder: str, reading: dict[str, Any]) -> None:
    with stream(folder, batch_size=20, image_size=4, seed=3, steps=16, **reading) as batches:
        expected = [batch.keys for batch in batches]
    found = list(samples(folder, batch_size=20, seed=3, steps=16, **reading))
    assert [s["__key__"] for s in found] == [key for batch in expected for key in batch]
    assert [s["__step__"] for s in found] == [step for step in range(16) for _ in range(20)]
    urls = f"{folder}/shard-{{000000..000001}}.tar"
    stock = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False)}
    for sample in found:
        assert sample.keys() == {"__key__", "__url__", "__step__", "png", "cls"}
        assert all(sample[name] == stock[sample["__key__"]][name] for name in sample if name != "__step__")

    for world in (2, 3):  # on any number of ranks, from any step on
        settings = {"batch_size": 20, "seed": 3, "steps": 16, "first_step": 5, "world_size": world, **reading}
        parts = [list(samples(folder, rank=rank, **settings)) for rank in range(world)]
        for step in range(5, 16):
            assert [s["__key__"] for part in parts for s in part if s["__step__"] == step] == expected[step]


def test_pipelines_of_webdataset(folder: str) -> None:
    source = samples(folder, batch_size=20, steps=3)
    pipeline = wds.DataPipeline(source, wds.decode("rgb8"), wds.map(lambda s: s | {"double": 2 * s["cls"]}))
    decoded = list(pipeline)
    assert [s["__key__"] for s in decoded] == keys(train=folder, steps=3)
    for sample in decoded:
        assert sample["png"].shape == (4, 4, 3) and sample["double"] == sample["cls"] * 2
        assert sample["png"][0, 0, 0] % 5 == sample["cls"]
    batches = list(source.decode("rgb8", only=["cls"]).batched(20))
    assert [batch["__step__"].tolist() for batch in batches] == [[step] * 20 for step in range(3)]
    assert all(isinstance(content, bytes) for content in batches[0]["png"])


@pytest.mark.parametrize("reading", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("processes", [1, 2])
def test_dataloaders_processes_keep_the_order(folder: str, processes: int, reading: dict[str, Any]) -> None:
    pipeline = samples(folder, batch_size=20, steps=10, rank=1, world_size=2, **reading).decode("rgb8").batched(10)
    loader = torch.utils.data.DataLoader(
        pipeline, batch_size=None, num_workers=processes, multiprocessing_context=multiprocessing.get_context("fork")
    )
    assert [key for batch in loader for key in batch["__key__"]] == keys(
        train=folder, steps=10, rank=1, world_size=2, **reading
    )


def test_the_examples_of_the_docstring_run(folder: str) -> None:
    blocks, lines = [], []
    for line in [*inspect.getdoc(crate_ray.data.webdataset).splitlines(), "end"]:  # type: ignore[union-attr]
        if line.startswith("    ") or (lines and not line):
            lines.append(line)
        elif lines:
            blocks.append(textwrap.dedent("\n".join(lines)))
            lines = []
    assert len(blocks) == 2
    seen: list[tuple[Any, Any]] = []
    names = {"folder": folder, "rank": 1, "step": 2, "train": lambda images, labels: seen.append((images, labels))}
    exec(blocks[0], names)
    assert sum(len(labels) for _, labels in seen) == COUNT
    seen.clear()
    exec(blocks[1], names)
    assert names["step"] == 6
    expected = list(samples(folder, batch_size=20, rank=1, world_size=2, first_step=2, steps=6))
    assert [label for _, labels in seen for label in labels.tolist()] == [int(s["cls"]) for s in expected]
    assert seen[0][0].shape == (10, 4, 4, 3)


def test_damaged_samples_go_to_the_handler(folder: str, tmp_path: Path) -> None:
    for path in Path(folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = bytearray((tmp_path / "shard-000001.tar").read_bytes())
    shard[700] ^= 1
    (tmp_path / "shard-000001.tar").write_bytes(shard)
    epoch = {"batch_size": 10, "steps": COUNT // 10}
    whole = [s["__key__"] for s in samples(folder, **epoch)]
    with pytest.raises(DamagedShard, match=r"shard-000001\.tar#"):
        list(samples(str(tmp_path), **epoch))
    errors: list[Exception] = []
    found = [s["__key__"] for s in samples(str(tmp_path), **epoch, handler=lambda error: not errors.append(error))]
    lost = {f"{number:06d}" for number in range(80, 96)}  # the 16 samples around the damage
    assert found == [key for key in whole if key not in lost] and len(errors) == 16
    stopped = [s["__key__"] for s in samples(str(tmp_path), **epoch, handler=lambda error: False)]
    assert stopped == whole[: next(i for i, key in enumerate(whole) if key in lost)]


def test_wrong_use_is_reported(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest at"):
        samples(str(tmp_path), batch_size=8)
    with pytest.raises(UserError, match="batch_size"):
        samples(folder, batch_size=1000)
