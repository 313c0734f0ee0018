"""Shards as others write them: empty ones, samples without an image or with several, names in any encoding."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import open_source
from crate_ray.data.read.shard_reader import ShardReader, Unreadable
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.storage.interface import ObjectInfo, Storage, open_storage
from crate_ray.storage.local import LocalStorage

STREAMED = {"memory_bytes": 1}


def picture(number: int, kind: str = "PNG", side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def local(path: Path) -> Storage:
    return open_storage(str(path), S3Config())


def read(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    dataset = load_dataset(local(folder))
    samples = ShardReader(dataset).read(0, dataset.manifest.num_samples)
    assert not any(isinstance(sample, Unreadable) for sample in samples)
    return [(s.key, {suffix: bytes(content) for suffix, content in s.members.items()}) for s in samples]


# --- Empty shards ---------------------------------------------------------------------------------------------------


def with_sizes(folder: Path, sizes: Sequence[int | None]) -> int:
    """A dataset whose shards have these numbers of samples; None for a file of 0 bytes. Returns their sum."""
    number = 0
    for shard, size in enumerate(sizes):
        members = [(f"{number + i}.png", picture(number + i)) for i in range(size or 0)]
        write_tar(folder / f"{shard:03d}.tar", members)
        if size is None:
            (folder / f"{shard:03d}.tar").write_bytes(b"")
        number += size or 0
    index_existing(local(folder))
    return number


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    "sizes",
    [[20, 0], [20, None], [20, 0, 0, None], [0, 20], [None, 20, 0], [7, 0, None, 9, 0], [16, None, 16, None]],
    ids=str,
)
def test_every_sample_of_an_epoch_is_read_wherever_empty_shards_are(
    tmp_path: Path, sizes: list[int | None], options: dict[str, Any]
) -> None:
    count = with_sizes(tmp_path, sizes)
    with stream(str(tmp_path), batch_size=count, image_size=8, steps=3, **options) as batches:
        for batch in batches:
            assert sorted(int(key) for key in batch.keys) == list(range(count))


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")])
def test_mixtures_of_datasets_with_empty_shards(
    tmp_path: Path, order: tuple[str, str], options: dict[str, Any]
) -> None:
    counts = {"a": [8, 0, 8], "b": [16, None], "c": [0, 16, 0]}
    for name in order:
        assert with_sizes(tmp_path / name, counts[name]) == 16
    train = {str(tmp_path / name): 1.0 for name in order}
    with stream(train, batch_size=32, image_size=8, steps=2, **options) as batches:
        for batch in batches:
            assert sorted(batch.samples.tolist()) == list(range(32))


def test_shards_of_0_bytes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_sizes(tmp_path, [4, None])
    assert "1 of 2 shards have 0 bytes, so they may not be complete: 001.tar" in caplog.text


# --- Samples without an image ---------------------------------------------------------------------------------------


def test_samples_without_an_image_are_left_out_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As img2dataset writes them: every download has a .json and a .txt, the failed ones have no picture."""
    for shard in range(2):
        members: list[tuple[str, bytes]] = [("README.md", b"about"), ("LICENSE", b"free")]
        for i in range(40):
            key = f"{shard}{i:04d}"
            members += [(f"{key}.png", picture(i))] if i % 5 else []
            members += [(f"{key}.json", b"{}"), (f"{key}.cls", b"1")]
        write_tar(tmp_path / f"{shard}.tar", members)
    manifest = index_existing(local(tmp_path))
    assert (manifest.num_samples, manifest.num_classes) == (64, 2)
    assert (
        "left out 18 of 82 samples, which have no image or grid: 0.tar/README, 0.tar/00000, 0.tar/00005" in caplog.text
    )
    assert read(tmp_path) == [
        (f"{shard}{i:04d}", {"png": picture(i), "json": b"{}", "cls": b"1"})
        for shard in range(2)
        for i in range(40)
        if i % 5
    ]
    for options in ({}, STREAMED):
        with stream(str(tmp_path), batch_size=32, image_size=8, steps=6, max_bad_fraction=0, **options) as batches:
            assert sum(len(batch.images) for batch in batches) == 32 * 6 and not batches.bad.counts


def test_a_shard_without_any_image_is_an_empty_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}.png", picture(i)) for i in range(20)])
    write_tar(tmp_path / "1.tar", [(f"{i}.json", b"{}") for i in range(20)])
    assert index_existing(local(tmp_path)).num_samples == 20
    assert [key for key, _ in read(tmp_path)] == [str(i) for i in range(20)]


def test_shards_whose_samples_all_have_an_image_are_indexed_as_before(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}.{s}", picture(i)) for i in range(20) for s in ("png", "json")])
    index_existing(local(tmp_path))
    assert not load_dataset(local(tmp_path)).has_table(0)


# --- Several images -------------------------------------------------------------------------------------------------


def stereo(folder: Path, kinds: tuple[str, ...] = ("PNG",)) -> None:
    """Samples with a left and a right picture; the right ones are all white."""
    members = []
    for i in range(20):
        kind = kinds[i % len(kinds)]
        suffix = {"PNG": "png", "JPEG": "jpg"}[kind]
        members += [(f"{i:02d}.left.{suffix}", picture(i, kind)), (f"{i:02d}.right.{suffix}", picture(255, kind))]
    write_tar(folder / "0.tar", members)


@pytest.mark.parametrize(
    ("image", "kinds", "suffixes", "mean"),
    [
        ("left.png", ("PNG",), ("left.png",), 9.5 / 255),
        ("RIGHT.png", ("PNG",), ("right.png",), 1.0),
        ("right", ("PNG", "JPEG"), ("right.jpg", "right.png"), 1.0),
    ],
)
def test_a_setting_chooses_the_image(
    tmp_path: Path, image: str, kinds: tuple[str, ...], suffixes: tuple[str, ...], mean: float
) -> None:
    stereo(tmp_path / "in", kinds)
    config = PrepareConfig(output="unused", image=image)
    indexed = index_existing(local(tmp_path / "in"), image=config.image)
    packed = pack(open_source(local(tmp_path / "in"), image=config.image), local(tmp_path / "out"), config)
    for manifest, folder in ((indexed, "in"), (packed, "out")):
        assert manifest.num_samples == 20 and manifest.image_suffixes == suffixes
        assert manifest.mean == pytest.approx((mean,) * 3, abs=0.01)
        with stream(str(tmp_path / folder), batch_size=20, image_size=8, steps=1, max_bad_fraction=0) as batches:
            (batch,) = batches
        assert float(batch.images.float().mean()) / 255 == pytest.approx(mean, abs=0.01)
    assert {suffix for _, members in read(tmp_path / "out") for suffix in members} == set(packed.suffixes)
    assert len(packed.suffixes) == 2 * len(kinds), "the other image stays, too"


def test_without_the_setting_the_message_names_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stereo(tmp_path)
    with pytest.raises(UserError, match=r"no sample .* only left\.png, right\.png; .*such as --image left\.png$"):
        index_existing(local(tmp_path))
    with pytest.raises(UserError, match=r"no image or grid among left\.png, right\.png; --image chooses one"):
        pack(open_source(local(tmp_path)), local(tmp_path / "out"), PrepareConfig(output="unused"))
    write_tar(tmp_path / "0.tar", [(f"{i}.{s}", picture(i)) for i in range(5) for s in ("png", "depth.png")])
    assert index_existing(local(tmp_path)).image_suffixes == ("png",)
    assert (
        "5 of 5 samples hold several images or grids (depth.png, png), of which png is used; --image chooses one"
        in caplog.text
    )
    assert "--image depth.png" in caplog.text


def test_a_choice_is_not_questioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stereo(tmp_path)
    index_existing(local(tmp_path), image="left")
    assert "several" not in caplog.text


def test_a_mask_is_no_second_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}.{s}", picture(i)) for i in range(5) for s in ("png", "mask.png", "cls")])
    index_existing(local(tmp_path), image="png")
    assert "several" not in caplog.text


def test_grids_can_be_chosen(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.ones((2, 4, 4), np.float32))
    write_tar(tmp_path / "0.tar", [(f"{i}.{s}", file.getvalue()) for i in range(20) for s in ("x.npy", "y.npy")])
    manifest = index_existing(local(tmp_path), image="y")
    assert (manifest.kind, manifest.channels, manifest.image_suffixes) == ("grid", 2, ("y.npy",))
    packed = pack(
        open_source(local(tmp_path)), local(tmp_path / "out"), PrepareConfig(output="x", image="y", grid_axes="CHW")
    )
    assert (packed.kind, packed.channels, packed.num_samples) == ("grid", 2, 20)


def test_the_setting_is_for_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    with pytest.raises(UserError, match=r"each file is a sample of its own, such as a\.png; leave --image out"):
        open_source(local(tmp_path), image="png")
    for wrong in ("", "a/b", "a b"):
        with pytest.raises(ValidationError):
            PrepareConfig(output="x", image=wrong)


# --- Names ----------------------------------------------------------------------------------------------------------


def test_shards_named_in_full_need_no_listing(tmp_path: Path) -> None:
    """As in a bucket where only GetObject is allowed."""

    class Unlisted(LocalStorage):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            raise UserError("access denied: may not list")

        def survey(self, prefix: str = "") -> Any:
            raise UserError("access denied: may not list")

        def at(self, uri: str) -> Storage:
            return Unlisted(Path(uri)) if "closed" in uri else super().at(uri)

    class Here(LocalStorage):
        def at(self, uri: str) -> Storage:
            return Unlisted(Path(uri))

    for shard in range(3):
        write_tar(tmp_path / f"closed/x-{shard}.tar", [(f"{shard}-{i}.png", picture(i)) for i in range(4)])
    here = Here(tmp_path / "here")
    assert index_existing(here, shards=f"{tmp_path}/closed/x-{{0..2}}.tar").num_samples == 12
    assert len(read(tmp_path / "here")) == 12
    assert index_existing(Here(tmp_path / "two"), shards=f"{tmp_path}/closed/x-1.tar").num_samples == 4
    with pytest.raises(UserError, match=r"no shards named x-3\.tar, x-4\.tar under .*closed \(2 of 4 are missing\)"):
        index_existing(Here(tmp_path / "three"), shards=f"{tmp_path}/closed/x-{{1..4}}.tar")
    with pytest.raises(UserError, match="may not list"):
        index_existing(Here(tmp_path / "four"), shards=f"{tmp_path}/closed/*.tar")
