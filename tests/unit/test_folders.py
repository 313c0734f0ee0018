"""Folders as people have them: links, parts of a split, files of other programs, names in any encoding."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import Manifest
from crate_ray.data.prepare import packing
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source, find_shards, open_source
from crate_ray.data.read.shard_reader import ShardReader
from crate_ray.errors import UserError
from crate_ray.jobs import automatic
from crate_ray.storage.interface import CannotRead, Storage, open_storage
from crate_ray.storage.local import LocalStorage


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((5, 6, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def fill(root: Path, names: Iterable[str | bytes]) -> None:
    for number, name in enumerate(names):
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def local(path: Path) -> Storage:
    return open_storage(str(path), S3Config())


def packed(root: Path, **values: object) -> tuple[Manifest, dict[str, int | None]]:
    """Pack a folder. Returns the manifest, and the class of each sample by its source name."""
    out = local(root.parent / "out")
    manifest = pack(open_source(local(root)), out, PrepareConfig(output="unused", overwrite=True, **values))  # type: ignore[arg-type]
    reader = ShardReader(load_dataset(out))
    classes: dict[str, int | None] = {}
    for number, sample in enumerate(reader.read(0, manifest.num_samples)):
        name = reader.source_name(number)
        assert name is not None
        classes[name] = int(bytes(sample.members["cls"])) if "cls" in sample.members else None
    return manifest, classes


def test_folders_behind_links_are_classes_and_links_to_nothing_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "in"
    fill(tmp_path, ["in/cat/1.png", "elsewhere/1.png", "elsewhere/deep/2.png", "one.png"])
    (root / "fox").symlink_to("../elsewhere")
    (root / "cat" / "2.png").symlink_to(tmp_path / "one.png")
    (root / "cat" / "gone.png").symlink_to("/nowhere.png")
    (root / "owl").symlink_to("/nowhere")
    (root / "cat" / "itself.png").symlink_to("itself.png")
    manifest, classes = packed(root)
    assert manifest.classes == ("cat", "fox")
    assert classes == {"cat/1.png": 0, "cat/2.png": 0, "fox/1.png": 1, "fox/deep/2.png": 1}
    assert "skipped 2 files or folders (a link to nothing): cat/gone.png, owl" in caplog.text
    assert "skipped 1 files or folders (Too many levels of symbolic links): cat/itself.png" in caplog.text


def test_links_that_lead_back_are_followed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "in"
    fill(root, ["a/1.png", "b/2.png"])
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "other").symlink_to("../b")
    (root / "b" / "back").symlink_to("../a")
    assert set(packed(root)[1]) == {"a/1.png", "a/other/2.png", "b/2.png", "b/back/1.png"}
    assert "(a link to a folder above it)" in caplog.text and "a/other/back" in caplog.text and "a/up" in caplog.text


def test_shards_behind_links_are_found_and_nothing_else_lists_through_links(tmp_path: Path) -> None:
    pack(Source([Item("x", lambda: {"png": picture(1)})]), local(tmp_path / "elsewhere"), PrepareConfig(output="x"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "more").symlink_to("../elsewhere")
    assert find_shards(local(tmp_path / "in"), "*.tar") == ["more/shard-000000.tar"]
    assert list(local(tmp_path / "in").list()) == []
    assert index_existing(local(tmp_path / "in")).num_samples == 1


@pytest.mark.parametrize(
    ("names", "classes", "told"),
    [
        (["train/cat/1.png", "train/dog/1.png", "val/cat/2.png"], ("cat", "dog"), "train and val are not classes"),
        (["Training/a/1.png", "test_images/a/1.png", "val2017/b/1.png"], ("a", "b"), "and are packed into one dataset"),
        (["train/1.png", "validation/2.png"], None, "no labels: 2 of 2 files lie in no folder of a class"),
        (["train/cat/1.png", "val/cat/1.png", "test/1.png"], None, "no labels: 1 of 3 files"),
        (["train/cat/1.png", "train/dog/1.png"], ("cat", "dog"), "train is not a class but a part of a split"),
        (["train/a/1.png", "val/a/1.png", "cover.png"], None, "such as cover.png"),
        (["car/1.png", "train/1.png", "bus/1.png"], ("bus", "car", "train"), None),
        (["extra/1.png", "train/1.png", "val/1.png"], ("extra", "train", "val"), "if they are parts of a split"),
        (["cat/1.png", "dog/1.png", "overview.png"], None, r"1 of 3 files lie in no folder (such as overview.png)"),
        (["photos/cat/1.png", "photos/dog/1.png"], ("photos",), "photos, which is the only class"),
        (["cat/1.png", "dog/old/1.png"], ("cat", "dog"), "folders in them are not labels (1 files, such as dog/old/"),
        (["1.png", "2.png"], None, None),
        (["validity/1.png", "trainer/1.png"], ("trainer", "validity"), None),
    ],
)
def test_what_is_not_a_label_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    classes: tuple[str, ...] | None,
    told: str | None,
) -> None:
    fill(tmp_path / "in", names)
    manifest, labels = packed(tmp_path / "in")
    assert manifest.classes == classes and set(labels) == set(names)
    depth = 1 if classes and names[0].lower().startswith("train") else 0
    assert labels == {name: classes.index(name.split("/")[depth]) if classes else None for name in names}
    assert caplog.text == "" if told is None else told in caplog.text


def test_two_commands_keep_the_parts_of_a_split_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "my in", ["train/cat/1.png", "val/cat/2.png", "test/cat/3.png"])
    packed(tmp_path / "my in")
    for part, target in (("train", "train"), ("val", "validation"), ("test", "test")):
        command = f"`crate-ray prepare --source '{tmp_path}/my in/{part}' --output OUTPUT/{target}`"
        assert command in caplog.text.replace("\n", " ")


BY_PROGRAMS = [
    "@eaDir/cat/1.png", "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/cat/1.png", "cat/Thumbs/1.png",
    "#recycle/dog/1.png", "thumbnails/1.png", "$RECYCLE.BIN/x/1.png", "@__thumb/1.png", "lost+found/1.png",
]  # fmt: skip
HIDDEN = [".thumbnails/1.png", "cat/._1.png", ".ipynb_checkpoints/1.png", "cat/.ipynb_checkpoints/1-checkpoint.png"]


def test_what_programs_put_there_is_left_out_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = ["cat/1.png", "dog/thumbs up.png", "dog/thumbs.png"]
    fill(tmp_path / "in", [*good, *BY_PROGRAMS, *HIDDEN])
    manifest, labels = packed(tmp_path / "in")
    assert labels == {"cat/1.png": 0, "dog/thumbs up.png": 1, "dog/thumbs.png": 1} and manifest.num_classes == 2
    assert f"skipped {len(BY_PROGRAMS)} files in folders that programs make, such as #recycle/dog/1.png" in caplog.text
    assert f"skipped {len(HIDDEN)} hidden files (with a dot before a name), such as .ipynb_checkpoints" in caplog.text


def test_folders_without_images_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "in", ["cat/1.png", "fox/1.tif", "owl/a/1.heic", "owl/a/2.txt"])
    assert packed(tmp_path / "in")[0].classes == ("cat",)
    assert "2 folders hold no images or grids, so they are no classes: fox, owl" in caplog.text
    assert "skipped 3 other files (.heic, .tif, .txt), such as fox/1.tif" in caplog.text


def test_parts_of_a_split_are_found_beside_such_folders(tmp_path: Path) -> None:
    fill(tmp_path, ["train/1.png", "val/1.png", "@eaDir/1.png", ".cache/1.png"])
    (tmp_path / ".DS_Store").write_bytes(b"x")
    train, validation = automatic._split_folders(local(tmp_path))
    assert validation is not None and (train.uri, validation.uri) == (f"{tmp_path}/train", f"{tmp_path}/val")


def test_names_in_latin_1_are_packed(tmp_path: Path) -> None:
    fill(tmp_path / "in", [b"caf\xe9/1.png", b"tea/\xfcber.png", "tea/grün.png"])
    manifest, labels = packed(tmp_path / "in")
    assert manifest.classes == (r"caf\udce9", "tea")
    assert {os.fsencode(name): label for name, label in labels.items()} == {
        b"caf\xe9/1.png": 0,
        b"tea/\xfcber.png": 1,
        "tea/grün.png".encode(): 1,
    }


def test_the_command_packs_a_folder_whose_path_is_latin_1(tmp_path: Path) -> None:
    source, output = os.fsencode(tmp_path) + b"/\xe9t\xe9", os.fsencode(tmp_path) + b"/\xe0"
    fill(tmp_path, [b"\xe9t\xe9/a\xe9/1.png", b"\xe9t\xe9/b/1.png"])
    command = [sys.executable, "-m", "crate_ray", "prepare", "--source", source, "--output", output]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0 and b"2 images" in done.stdout, done.stderr


def test_records_that_cannot_hold_a_name_say_so_before_anything_is_read(tmp_path: Path) -> None:
    out, latin = local(tmp_path / "out"), os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    pack(Source([Item("x", lambda: {"png": picture(1)})]), out, PrepareConfig(output="x"))
    Path(latin).mkdir()
    shutil.copy(tmp_path / "out" / "shard-000000.tar", latin)
    with pytest.raises(UserError, match=r"folder of the shards, '.*caf\\udce9' is not UTF-8; rename it"):
        index_existing(local(tmp_path / "elsewhere"), shards=f"{latin}/*.tar")
    assert index_existing(open_storage(latin, S3Config())).num_samples == 1
    (tmp_path / "out" / os.fsdecode(b"\xe9.tar")).write_bytes(b"")
    with pytest.raises(UserError, match=r"name of a shard, '\\udce9\.tar' is not UTF-8; rename it under"):
        index_existing(out, overwrite=True)


def test_pipes_and_devices_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "in", ["cat/1.png", "dog/2.png"])
    os.mkfifo(tmp_path / "in" / "cat" / "pipe.png")
    (tmp_path / "in" / "dog" / "endless.png").symlink_to("/dev/zero")
    assert stat.S_ISFIFO((tmp_path / "in" / "cat" / "pipe.png").stat().st_mode)
    assert packed(tmp_path / "in")[0].num_samples == 2
    assert "skipped 2 files or folders (not a regular file): cat/pipe.png, dog/endless.png" in caplog.text


class Partly(LocalStorage):
    """Of which some files cannot be read."""

    def __init__(self, root: Path, closed: set[str]) -> None:
        super().__init__(root)
        self.closed = closed

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key in self.closed:
            raise CannotRead(f"cannot read {self.uri}/{key}: Permission denied")
        return super().read(key, start, length)


def test_a_file_that_cannot_be_read_is_left_out_and_many_of_them_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_FEW_UNREADABLE", 3)
    fill(tmp_path / "in", names := [f"{number}.png" for number in range(20)])
    out = local(tmp_path / "out")
    some = Partly(tmp_path / "in", {"0.png", "7.png", "8.png"})
    source = open_source(some)
    (tmp_path / "in" / "1.png").unlink()
    manifest = pack(source, out, PrepareConfig(output="unused"))
    assert manifest.num_samples == 16
    assert "4 of 20 samples" in caplog.text
    assert "7.png: Permission denied" in caplog.text and "1.png does not exist" in caplog.text

    fill(tmp_path / "in", names)
    most = Partly(tmp_path / "in", set(names[:11]))
    with pytest.raises(UserError, match=r"11 of the 20 samples of a shard cannot be read: .*run the command again"):
        pack(open_source(most), local(tmp_path / "other"), PrepareConfig(output="unused"))
    most.closed = set()
    assert pack(open_source(most), local(tmp_path / "other"), PrepareConfig(output="unused")).num_samples == 20


def test_errors_of_one_file_are_told_from_those_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CannotRead):
        local(tmp_path).read("folder")
    with pytest.raises(CannotRead):
        local(tmp_path).read("n" * 300)
    code = (
        "import pathlib, resource\n"
        "from crate_ray.storage.interface import CannotRead\n"
        "from crate_ray.storage.local import LocalStorage\n"
        "from crate_ray.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "try: LocalStorage(pathlib.Path('/')).read('etc/passwd')\n"
        "except UserError as error: print(isinstance(error, CannotRead), error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False cannot read"), done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_folders_that_may_not_be_listed_are_told(tmp_path: Path) -> None:
    fill(tmp_path, ["in/cat/1.png", "in/dog/1.png"])
    (tmp_path / "in" / "dog").chmod(0)
    code = (
        "import os, sys, pathlib\n"
        "from crate_ray.storage.local import LocalStorage\n"
        "os.chdir(sys.argv[1]); os.setuid(65534)\n"
        "found, unlisted = LocalStorage(pathlib.Path('in')).survey()\n"
        "print([info.key for info in found], unlisted)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "['cat/1.png'] {'dog': 'Permission denied'}\n"


def test_a_file_is_no_source(tmp_path: Path) -> None:
    fill(tmp_path, ["1.png"])
    with pytest.raises(UserError, match=r"1\.png is a file; give the folder"):
        open_source(local(tmp_path / "1.png"))
