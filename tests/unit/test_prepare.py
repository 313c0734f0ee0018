"""An interrupted packing continues, half a dataset is never visible, and images are shrunk as training would."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crate_ray.config import PrepareConfig
from crate_ray.data.decode.samples import decode_batch, read_format
from crate_ray.data.decode.transforms import Crops
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.format.manifest import MANIFEST_NAME
from crate_ray.data.format.samples import parse_samples
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.shrink import shrink_image, shrink_mask, shrunk_size
from crate_ray.data.prepare.sources import Item, Source, open_source, size_in_tar
from crate_ray.data.prepare.validation import pack_split, split_source
from crate_ray.errors import UserError
from crate_ray.jobs.prepare import main
from crate_ray.storage.local import LocalStorage

IMAGENET = Path(__file__).parents[3] / "shared/data/imagenet-samples"


def config(**values: Any) -> PrepareConfig:
    return PrepareConfig(**{"output": "unused", "shard_samples": 10, **values})


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((3, 4), number % 251, np.uint8)).save(file, "PNG")
    return file.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members of all samples of a dataset by key."""
    dataset = load_dataset(LocalStorage(folder))
    return {
        key: {suffix: bytes(content) for suffix, content in members.items()}
        for shard in range(dataset.manifest.num_shards)
        for key, members in parse_samples((folder / dataset.shard_name(shard)).read_bytes())
    }


# --- Plan and resume ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=100), st.integers(1, 50), st.integers(512, 80_000))
@example([100] * 100, 50, 2048 * 21)
@example([100] * 100, 19, 2048 * 19)
def test_shards_begin_where_the_limits_say(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_samples: int, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    sizes = [size_in_tar(len(png(0)), size) for size in sizes]

    def load(number: int) -> dict[str, bytes]:
        image = png(0)
        return {"png": image, "txt": bytes(sizes[number] - 1024 - len(image) - -len(image) % 512)}

    items = [Item(str(number), partial(load, number), size) for number, size in enumerate(sizes)]
    limits = {"shard_samples": shard_samples, "shard_bytes": shard_bytes}
    pack(Source(items), LocalStorage(folder), config(shuffle=False, **limits))
    dataset = load_dataset(LocalStorage(folder))
    first = dataset.first_sample.tolist()
    for begin, end in pairwise(first):
        counts = range(1, len(sizes) - begin)  # of the samples of a shard that others follow
        full = [n for n in counts if n == shard_samples or sum(sizes[begin : begin + n]) >= shard_bytes]
        count = full[0] if full else len(sizes) - begin
        if full and 16 <= count < shard_samples:  # full of bytes: whole entries of the index
            count -= count % 16
        assert end - begin == count
    assert first[-1] == len(sizes)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(fails=st.lists(st.integers(0, 63), max_size=4, unique=True), bad=st.sets(st.integers(0, 63), max_size=30))
def test_resumed_packing_gives_the_same_files_and_repeats_no_finished_shard(
    tmp_path_factory: pytest.TempPathFactory, fails: list[int], bad: set[int]
) -> None:
    loads: Counter[int] = Counter()
    to_fail: set[int] = set()

    def load(number: int) -> dict[str, bytes]:
        loads[number] += 1
        if number in to_fail:
            raise ConnectionError
        return {"png": b"broken" if number in bad else png(number), "cls": b"%d" % (number % 5)}

    source = Source([Item(str(number), partial(load, number), 2048) for number in range(64)])
    undisturbed, folder = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("resumed")
    pack(source, LocalStorage(undisturbed), config())
    order = np.argsort(np.random.Philox(key=0).random_raw(64), kind="stable").tolist()
    done: set[int] = set()
    before: dict[str, int] = {}
    for number in [*(number for number in fails if number != order[0]), -1]:
        to_fail = {number}
        loads.clear()
        try:
            pack(source, LocalStorage(folder), config())
        except ConnectionError:
            assert not (folder / MANIFEST_NAME).exists()
            with pytest.raises(UserError, match=r"unfinished dataset with other samples .*--overwrite"):
                pack(source, LocalStorage(folder), config(shard_samples=11))
            with pytest.raises(UserError, match="unfinished dataset|no shards named"):
                index_existing(LocalStorage(folder))
        repeated = {sample for shard in done for sample in order[10 * shard : 10 * shard + 10]} & set(loads)
        assert repeated <= {order[0]}, "whose content decides between images and grids"
        assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
        if (folder / MANIFEST_NAME).exists():
            break
        done = {int(path.stem) for path in (folder / ".packing").glob("0*.json")}
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.tar")}
        assert len(done) >= len(before)
    assert tree(folder) == tree(undisturbed)
    assert load_dataset(LocalStorage(folder)).manifest.num_samples == 64 - len(bad)
    assert set(stored(folder)) == {f"{i:06d}" for i, number in enumerate(order) if number not in bad}


def test_shard_of_bad_samples_only_is_left_out(tmp_path: Path) -> None:
    items = [
        Item(str(number), partial(dict, png=b"broken" if 10 <= number < 20 else png(number))) for number in range(35)
    ]
    manifest = pack(Source(items), LocalStorage(tmp_path), config(shuffle=False))
    dataset = load_dataset(LocalStorage(tmp_path))
    assert dataset.names == ("shard-000000.tar", "shard-000002.tar", "shard-000003.tar")
    assert (manifest.num_samples, dataset.samples.tolist()) == (25, [10, 10, 5])
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == list(dataset.names)


class WatchedStorage(LocalStorage):
    """A folder that is looked at after every change, as a reader might."""

    seen: list[str | None]
    fail_at = -1

    def write(self, key: str, data: bytes | Path, **conditions: Any) -> None:
        if len(self.seen) == self.fail_at:
            raise ConnectionError
        super().write(key, data, **conditions)
        self.look()

    def delete(self, key: str) -> None:
        super().delete(key)
        self.look()

    def look(self) -> None:
        """A manifest that is there describes what is there."""
        digest = None
        if self.exists(MANIFEST_NAME):
            dataset = load_dataset(self)
            digest = dataset.manifest.digest()
            check(dataset)
        self.seen.append(digest)


def check(dataset: ShardSet) -> None:
    for shard in range(dataset.manifest.num_shards):
        content = dataset.shard_storage.read(dataset.shard_name(shard))
        assert hashlib.sha256(content).digest() == dataset.shards["sha256"][shard].tobytes()
        if dataset.has_table(shard):
            dataset.table(shard)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pack", "index"])
def test_manifest_describes_what_is_there_at_every_moment(tmp_path: Path, what: str) -> None:
    def source(count: int) -> Source:
        return Source([Item(str(number), partial(dict, png=png(count + number)), 1024) for number in range(count)])

    def change(storage: LocalStorage) -> str:
        if what == "pack":
            return pack(source(25), storage, config(overwrite=True, lease_seconds=1)).digest()
        return index_existing(storage, shards="{b,a,shard-000001}.tar", overwrite=True, lease_seconds=1).digest()

    original = tmp_path / "original"
    old = pack(source(45), LocalStorage(original), config()).digest()
    scattered = io.BytesIO()
    names = [(f"{number}.{suffix}", suffix) for suffix in ("cls", "png") for number in range(3)]
    with tarfile.open(fileobj=scattered, mode="w") as tar:
        for name, suffix in names:
            info = tarfile.TarInfo(name)
            content = png(1) if suffix == "png" else b"1"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for name in ("a.tar", "b.tar"):
        (original / name).write_bytes(scattered.getvalue())

    def fresh(name: str) -> WatchedStorage:
        shutil.copytree(original, tmp_path / name)
        storage = WatchedStorage(tmp_path / name)
        storage.seen = []
        return storage

    whole = fresh("whole")
    new = change(whole)
    shown = [digest for digest, after in pairwise([*whole.seen, "end"]) if digest != after]
    assert shown[:1] + [digest for digest in shown[1:] if digest] == [old, new]
    expected = tree(tmp_path / "whole")
    for fail_at in range(1, len(whole.seen), 3):
        storage = fresh(f"fail-{fail_at}")
        storage.fail_at = fail_at
        try:
            change(storage)
        except ConnectionError:
            storage.fail_at = -1
            assert change(storage) == new
        assert tree(tmp_path / f"fail-{fail_at}") == expected


def test_index_in_parallel_is_that_of_one_shard_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source([Item(str(n), partial(dict, png=png(n), cls=b"%d" % (n % 7)), 2048) for n in range(300)])
    pack(source, LocalStorage(tmp_path / "a"), config())
    packed = tree(tmp_path / "a")
    index_existing(LocalStorage(tmp_path / "a"), overwrite=True)
    parallel = tree(tmp_path / "a")
    monkeypatch.setattr("crate_ray.data.prepare.indexing.THREADS", 1)
    index_existing(LocalStorage(tmp_path / "a"), overwrite=True)
    assert tree(tmp_path / "a") == parallel
    assert {n: c for n, c in parallel.items() if n != MANIFEST_NAME} == {
        n: c for n, c in packed.items() if n != MANIFEST_NAME
    }


# --- Validation -----------------------------------------------------------------------------------------------------


def numbered(count: int, first: int = 0) -> Source:
    items = [
        Item(f"{n}.png", partial(dict, png=png(n), cls=b"%d" % (n % 3)), 2048) for n in range(first, first + count)
    ]
    return Source(items, ("a", "b", "c"), ["x.tar: ../y.png"])


@given(st.integers(2, 300), st.data(), st.integers(-5, 2**70))
def test_split_is_whole_and_nearly_stays_when_samples_are_added(count: int, data: st.DataObject, seed: int) -> None:
    source, more = numbered(count), numbered(150, 1000)
    held_out = data.draw(st.integers(1, count - 1))
    train, validation = split_source(source, held_out, seed)
    assert (len(train.items), len(validation.items)) == (count - held_out, held_out)
    assert {*train.items} | {*validation.items} == {*source.items}
    assert (train.classes, validation.classes) == (("a", "b", "c"),) * 2
    assert (train.unsafe_names, validation.unsafe_names) == (["x.tar: ../y.png"], ()), "counted once"
    again = {item.name for item in split_source(Source([*more.items, *source.items[::-1]]), held_out, seed)[1].items}
    assert again - {item.name for item in more.items} <= {item.name for item in validation.items}


def test_split_depends_on_the_seed() -> None:
    parts = [{item.name for item in split_source(numbered(400), 40, seed)[1].items} for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert 0 < len(parts[0] & parts[2]) < 20


def test_packing_with_validation_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    settings = {"validation": 0.2, "seed": 3}
    undisturbed = tmp_path / "undisturbed"
    manifests = pack_split(numbered(64), LocalStorage(undisturbed), config(**settings))
    train, validation = split_source(numbered(64), 13, 3)
    for name, part, manifest in zip(("train", "validation"), (train, validation), manifests, strict=True):
        pack(part, LocalStorage(tmp_path / "alone" / name), config(seed=3))
        assert tree(undisturbed / name) == tree(tmp_path / "alone" / name), "each is what packing it alone gives"
        assert manifest == load_dataset(LocalStorage(undisturbed / name)).manifest
        assert manifest.num_samples == len(part.items)
    expected = tree(undisturbed)
    assert {path.split("/")[0] for path in expected} == {"train", "validation"}
    with pytest.raises(UserError, match="1 samples cannot be split"):
        pack_split(numbered(1), LocalStorage(tmp_path / "one"), config(validation=0.5))
    few = pack_split(numbered(8), LocalStorage(tmp_path / "few"), config(validation=0.1))
    assert [manifest.num_classes for manifest in few] == [3, 3], "also of a part that lacks a class"

    order = [item.name for part in (train, validation) for item in part.items]
    finished: dict[str, int] = {}
    for stop_at in (order[5], order[len(train.items) - 1], order[len(train.items)], order[-1], None):

        def load(name: str, stop_at: str | None = stop_at) -> dict[str, bytes]:
            if name == stop_at:
                raise ConnectionError
            number = int(name.removesuffix(".png"))
            return {"png": png(number), "cls": b"%d" % (number % 3)}

        source = numbered(64)
        source = Source(
            [i._replace(load=partial(load, i.name)) for i in source.items], source.classes, source.unsafe_names
        )
        storage = LocalStorage(tmp_path / "resumed")
        if stop_at is None:
            pack_split(source, storage, config(**settings))
        else:
            with pytest.raises(ConnectionError):
                pack_split(source, storage, config(**settings))
            with pytest.raises(UserError, match="unfinished dataset with other samples"):
                pack_split(source, storage, config(validation=0.3))
            with pytest.raises(UserError, match="unfinished dataset with other samples"):
                pack(source, storage, config())
        for path, time in finished.items():
            assert (tmp_path / "resumed" / path).stat().st_mtime_ns == time, "not made again"
        finished = {
            str(path.relative_to(tmp_path / "resumed")): path.stat().st_mtime_ns
            for path in (tmp_path / "resumed").rglob("shard-*.tar")
            if (path.parent / ".packing" / f"{path.stem.removeprefix('shard-')}.json").exists()
            or (path.parent / MANIFEST_NAME).exists()
        }
    assert tree(tmp_path / "resumed") == expected


def test_packing_with_validation_replaces_only_when_asked(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    first = pack_split(numbered(40), storage, config(validation=0.5))
    with pytest.raises(UserError, match=r"there is a dataset at .*/train already; .*--overwrite true"):
        pack_split(numbered(40), storage, config(validation=0.5))
    assert load_dataset(storage.under("train")).manifest == first[0]
    # Stopped between two steps of the replacement: the old train set is never taken for the new one.
    other = numbered(30, 100)
    broken = Source([item._replace(load=lambda: 1 / 0) for item in other.items], other.classes)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        pack_split(broken, storage, config(validation=0.5, overwrite=True))
    again = pack_split(other, storage, config(validation=0.5, overwrite=True))
    assert sum(manifest.num_samples for manifest in again) == 30
    assert load_dataset(storage.under("train")).manifest == again[0]
    pack(numbered(20), LocalStorage(tmp_path / "whole"), config())
    with pytest.raises(UserError, match=r"whole is a dataset itself; .*use another output"):
        pack_split(numbered(40), LocalStorage(tmp_path / "whole"), config(validation=0.5, overwrite=True))


def test_the_command_says_what_it_wrote_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["crate-ray", "prepare"])
    for number in range(12):
        (tmp_path / "my photos").mkdir(exist_ok=True)
        (tmp_path / "my photos" / f"{number}.png").write_bytes(png(number))
    source, out = str(tmp_path / "my photos"), f"{tmp_path}/out"
    main(config(source=source, output=out, validation=0.25))
    lines = capsys.readouterr().out.splitlines()
    counts = [load_dataset(LocalStorage(Path(out) / name)).manifest.num_samples for name in ("train", "validation")]
    assert counts == [9, 3]
    assert lines[0].startswith(f"{out}/train: {counts[0]} images in ")
    assert lines[1].startswith(f"{out}/validation: {counts[1]} image")
    assert lines[2] == f"next: crate-ray pretrain --data {out}/train --data.validation {out}/validation"
    with pytest.raises(UserError, match="without --source shards are indexed in place"):
        main(config(output=out, validation=0.25))
    with pytest.raises(UserError, match="split 'train' is already one side of a fixed split"):
        main(config(source="digits", split="train", output=f"{out}-2", validation=0.25))
    with pytest.raises(UserError, match=r"split 'test' is for the built-in sets .* use --validation 0\.1"):
        main(config(source=source, split="test", output=f"{out}-2"))


# --- Smaller images -------------------------------------------------------------------------------------------------


def smooth(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """A picture whose corners differ, so that its orientation can be seen."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    planes = [
        127 + 90 * np.sin(5 * x + i) * np.cos(4 * y + 0.3 * i) + 30 * x * (i + 1) - 20 * y for i in range(channels)
    ]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8).squeeze()


def encoded(pixels: NDArray[np.uint8], kind: str, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def psnr(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((first.astype(float) - second.astype(float)) ** 2), 1e-9)))


@given(
    st.integers(20, 200), st.integers(20, 200), st.integers(8, 120), st.integers(1, 8),
    st.sampled_from(["JPEG", "PNG", "WEBP"]), st.sampled_from(["RGB", "L"]),
)  # fmt: skip
def test_shrunk_pictures_are_upright_and_look_like_pillows(
    height: int, width: int, max_side: int, orientation: int, kind: str, mode: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "WEBP":
        mode = "RGB"
    content = encoded(smooth(height, width), kind, mode, exif=exif, **({} if kind == "PNG" else {"quality": 95}))
    shrunk = shrink_image(content, max_side, 95)
    mask = encoded((smooth(height, width, 1) > 127).astype(np.uint8) * 255, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if min(height, width) <= max_side:
        assert shrunk is None and shrink_mask(mask, max_side) == mask
        return
    assert shrunk is not None
    image = Image.open(io.BytesIO(shrunk))
    size = shrunk_size(upright.height, upright.width, max_side)
    assert min(size) == max_side and abs(max(size) - max(height, width) * max_side / min(height, width)) <= 0.5
    assert (image.format, image.mode, image.size[::-1]) == (kind, mode, size)
    assert image.getexif().get(0x0112, 1) == 1
    expected = upright.resize(size[::-1], Image.Resampling.BICUBIC)
    assert psnr(np.asarray(image), np.asarray(expected)) > (25 if max_side < 16 else 30)
    small = Image.open(io.BytesIO(shrink_mask(mask, max_side)))
    assert small.size == image.size and set(np.unique(np.asarray(small))) <= {0, 255}
    lone = ImageOps.exif_transpose(Image.open(io.BytesIO(mask))).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.mean(np.asarray(small) != np.asarray(lone)) < 0.1, "the same but for where halves are rounded to"


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "RGBA", "I;16", "1"])
def test_other_colours_are_taken_as_training_takes_them(mode: str) -> None:
    pixels = smooth(120, 160, 3)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        content = io.BytesIO()
        Image.fromarray(smooth(120, 160, 1).astype(np.uint16) * 257).save(content, "PNG")
        original = content.getvalue()
    else:
        original = encoded(pixels, kind, mode, **({"quality": 98} if kind == "JPEG" else {}))
    shrunk = shrink_image(original, 60, 98)
    assert shrunk is not None and read_format(shrunk) == kind

    def decoded(content: bytes) -> NDArray[np.uint8]:
        out = torch.zeros(1, 3, 60, 80, dtype=torch.uint8)
        errors = decode_batch([content], "image", whole, out)
        assert errors == [None]
        return out.numpy()

    assert psnr(decoded(original), decoded(shrunk)) > 33


def whole(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Crops:
    zeros = np.zeros_like(heights)
    return Crops(zeros, zeros, heights, widths, np.zeros(len(heights), bool))


def test_packing_shrinks_pictures_and_masks_and_keeps_small_ones(tmp_path: Path) -> None:
    files = {
        "a.jpg": encoded(smooth(100, 150), "JPEG", quality=95),
        "a.mask.png": encoded((smooth(100, 150, 1) > 127).astype(np.uint8) * 255, "PNG"),
        "b.png": encoded(smooth(150, 100), "PNG"),
        "small.jpg": encoded(smooth(50, 400), "JPEG"),
        "wrong.jpg": encoded(smooth(100, 100), "JPEG"),
        "wrong.mask.png": encoded(smooth(50, 100, 1), "PNG"),
        "cut.jpg": encoded(smooth(300, 300), "JPEG")[:3000],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    manifest = pack(open_source(LocalStorage(tmp_path)), LocalStorage(out), config(shuffle=False, max_side=50))
    samples = stored(out)
    assert list(samples) == ["000000", "000001", "000003"], "the truncated one and the wrong mask are skipped"
    assert manifest.num_samples == 3
    assert samples["000003"] == {"jpg": files["small.jpg"]}
    sizes = {k: {s: Image.open(io.BytesIO(c)).size for s, c in m.items()} for k, m in samples.items()}
    assert sizes == {
        "000000": {"jpg": (75, 50), "mask.png": (75, 50)},
        "000001": {"png": (50, 75)},
        "000003": {"jpg": (400, 50)},
    }
    assert index_existing(LocalStorage(out), overwrite=True).num_measured == 3
    np.save(tmp_path / "0.npy", np.zeros((2, 3)))
    for name in files:
        (tmp_path / name).unlink()
    shutil.rmtree(out)
    grids = open_source(LocalStorage(tmp_path))
    with pytest.raises(UserError, match=r"max_side is for images, but .*0\.npy is a \.npy grid"):
        pack(grids, LocalStorage(out), config(max_side=50))


def test_shards_of_shrunk_pictures_have_the_size_that_was_asked_for(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for number in range(60):
        picture = Image.fromarray(noise.integers(0, 255, (16, 16, 3), np.uint8)).resize((240, 240))
        picture.save(tmp_path / f"{number:02d}.jpg", quality=95)
    limits = {"shard_samples": 1000, "shard_bytes": 40_000, "max_side": 60}
    pack(open_source(LocalStorage(tmp_path)), LocalStorage(tmp_path / "out"), config(**limits))
    sizes = load_dataset(LocalStorage(tmp_path / "out")).bytes
    assert len(sizes) > 2
    assert all(30_000 < size < 60_000 for size in sizes[:-1])


@pytest.mark.skipif(not IMAGENET.is_dir(), reason="the ImageNet samples are not here")
def test_training_sees_nearly_the_same_of_shrunk_photographs() -> None:
    """Shrunk to 256, then decoded to 224: against Pillow alone, in the same two steps and in one."""
    same, lost = [], []
    for shard in sorted(IMAGENET.glob("*.tar"))[:1]:
        for sample in parse_samples(shard.read_bytes())[:40]:
            content = bytes(sample.members["jpg"])
            shrunk = shrink_image(content, 256, 90)
            if shrunk is None:
                continue
            photograph = Image.open(io.BytesIO(content)).convert("RGB")
            height, width = shrunk_size(photograph.height, photograph.width, 256)
            smaller = photograph.resize((width, height), Image.Resampling.BICUBIC)
            pillows = Image.open(io.BytesIO(encoded(np.asarray(smaller), "JPEG", quality=90)))
            out = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
            assert decode_batch([shrunk], "image", centre, out) == [None]
            ours = out.numpy()[0].transpose(1, 2, 0)
            same.append(psnr(ours, centre_of(pillows)))
            lost.append(psnr(centre_of(pillows), centre_of(photograph)) - psnr(ours, centre_of(photograph)))
    assert len(same) > 10
    assert np.mean(same) > 40 and min(same) > 35
    assert np.mean(lost) < 0.05 and max(lost) < 0.3


def centre(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Crops:
    sides = np.minimum(heights, widths)
    return Crops((heights - sides) // 2, (widths - sides) // 2, sides, sides, np.zeros(len(heights), bool))


def centre_of(image: Image.Image) -> NDArray[np.uint8]:
    """The largest square of a picture at 224 pixels, by Pillow alone."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))
