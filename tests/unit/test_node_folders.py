"""Folders on a node's disk: only unused entries are removed, and no other user can plant files."""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.evaluation.feature_cache import FeatureCache
from crate_ray.storage import node_folders
from crate_ray.storage.cache import PartCache
from crate_ray.storage.interface import open_storage
from crate_ray.storage.node_folders import chosen_folder, evict, file_digest, process_folder, total_size

ROOT = Path(__file__).parents[2]
OTHER_USER = 12345
NODE = f"crate-ray-node-{os.getuid()}"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, for this process and its children; and the user's cache beside it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def started(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def test_the_folder_of_a_dead_process_is_removed_by_the_next_that_starts(temporary: Path) -> None:
    program = (
        "import sys, time; from crate_ray.storage.node_folders import process_folder\n"
        "with process_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'part').write_bytes(bytes(100)); print('ready', flush=True); time.sleep(60)"
    )
    processes = temporary / NODE / "processes"
    index = node_folders.index_folder()
    (index / "something").mkdir()
    workers = {}
    for name in ("dead", "alive"):
        workers[name] = started(program, name)
        stdout = workers[name].stdout
        assert stdout is not None and stdout.readline() == "ready\n"
    try:
        with process_folder("first") as first:
            assert sorted(path.name for path in processes.iterdir() if path.is_dir()) == ["alive", "dead", "first"]
        assert not first.exists()
        workers["dead"].kill()
        workers["dead"].wait()
        with process_folder("second"):
            assert sorted(path.name for path in processes.iterdir() if path.is_dir()) == ["alive", "second"]
            assert (processes / "alive" / "part").exists()
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    assert (index / "something").exists()  # nothing but folders of processes is swept


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Address of a dataset on an S3 server, and the server's."""
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
    uri = "s3://bucket/digits"
    pack(digits_source("test"), open_storage(uri, S3Config(endpoint_url=endpoint)), PrepareConfig(output=uri))
    yield uri, endpoint
    server.stop()


@pytest.mark.timeout(120)
def test_processes_come_and_go_while_others_open_a_dataset(temporary: Path, dataset: tuple[str, str]) -> None:
    """The index is shared: a new process does not remove it, and a process that opens the dataset can read it."""
    starts = (
        "import sys, time; from itertools import count; from pathlib import Path\n"
        "from crate_ray.storage.node_folders import process_folder\n"
        "for number in count():\n"
        "    if Path(sys.argv[2]).exists(): break\n"
        "    time.sleep(0.005)\n"
        "    with process_folder(f'{sys.argv[1]}-{number}') as folder:\n"
        "        (folder / 'part').write_bytes(bytes(100))\n"
    )
    opens = (
        "import sys; from crate_ray.config import S3Config; from crate_ray.storage.interface import open_storage\n"
        "from crate_ray.data.format.dataset import load_dataset\n"
        "storage = open_storage(sys.argv[1], S3Config(endpoint_url=sys.argv[2]))\n"
        "for _ in range(25):\n"
        "    assert len(load_dataset(storage).index)\n"
    )
    stop, index = temporary / "stop", temporary / NODE / "index"
    coming = [started(starts, name, str(stop)) for name in "ab"]
    opening = [started(opens, *dataset) for _ in range(2)]
    processes = coming + opening
    inodes, deadline = set(), time.monotonic() + 90
    try:
        while any(process.poll() is None for process in opening) and time.monotonic() < deadline:
            if index.exists():
                inodes |= {(path.name, path.stat().st_ino) for path in index.iterdir() if path.name[0] != "."}
            time.sleep(0.02)
        stop.touch()
        errors = [process.communicate(timeout=10)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, errors
    finally:
        for process in processes:
            process.kill()
    assert len(inodes) == len({name for name, _ in inodes}) == 2  # shards.npy and index.npy, each downloaded once


KINDS = {"processes": lambda: process_folder("mine").__enter__(), "index": node_folders.index_folder}
CACHES = {"features": node_folders.feature_folder, "spool": lambda: node_folders.spool_folder("0" * 32)}


@pytest.mark.parametrize("level", ["base", "kind"])
@pytest.mark.parametrize("kind", [*KINDS, *CACHES])
def test_what_another_user_may_have_planted_is_refused(temporary: Path, tmp_path: Path, kind: str, level: str) -> None:
    base = temporary / NODE if kind in KINDS else tmp_path / "cache" / "crate-ray"
    planted = base if level == "base" else base / kind
    planted.parent.mkdir(parents=True, exist_ok=True)
    base.parent.chmod(0o755)
    if level == "kind":
        base.chmod(0o755)
    setting = "TMPDIR" if kind in KINDS else "XDG_CACHE_HOME"
    use = (KINDS | CACHES)[kind]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    planted.symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"the folder {planted} is a symbolic link; remove it, or set {setting} to a"):
        use()
    planted.unlink()
    planted.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        use()
    planted.unlink()
    planted.touch()
    with pytest.raises(UserError, match="is not a folder"):
        use()
    planted.unlink()
    planted.mkdir(mode=0o700)
    planted.chmod(0o707)
    with pytest.raises(UserError, match="may be written to by other users"):
        use()
    if os.getuid() == 0:
        planted.chmod(0o700)
        os.chown(planted, OTHER_USER, OTHER_USER)
        with pytest.raises(UserError, match=rf"{planted} belongs to another user; remove it, or set {setting} to a"):
            use()
        os.chown(planted, 0, 0)
    assert not any(elsewhere.iterdir())
    planted.chmod(0o755)  # as an earlier version made it
    use()
    assert planted.stat().st_mode & 0o777 == 0o700


# --- A second user --------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


def as_user(uid: int, act: Callable[[], object]) -> str:
    """Do something in a child process of another user. Returns the message of its UserError, if any."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status, message = 1, ""
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            act()
            status = 0
        except UserError as error:
            status, message = 0, str(error)
        except BaseException as error:
            message = repr(error)
        os.write(write, message.encode())
        os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        message = file.read().decode()
    assert os.waitpid(child, 0)[1] == 0, message
    return message


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder that all users share, as /tmp. Each user's cache is in it, too."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("CRATE_RAY_ONE_USER", raising=False)
    yield folder
    shutil.rmtree(folder)


@needs_root
@pytest.mark.parametrize("victim", [0, OTHER_USER + 1])
@pytest.mark.parametrize("kind", [*KINDS, *CACHES])
def test_another_user_who_is_first_gains_nothing(shared: Path, kind: str, victim: int) -> None:
    """Root and other users meet what another user made in /tmp: they refuse it, and what it links to stays."""
    home = shared / "home"
    home.mkdir()
    (home / kind).mkdir()
    (home / kind / "precious").touch()
    (home / "precious").touch()
    os.chown(home, victim, victim)
    os.chown(home / kind, victim, victim)
    base = shared / f"crate-ray-node-{victim}" if kind in KINDS else shared / "cache" / "crate-ray"
    use = (KINDS | CACHES)[kind]

    def plant_folder_with_link() -> None:
        base.mkdir(parents=True)
        (base / kind).symlink_to(home)

    def plant_link() -> None:
        base.parent.mkdir(exist_ok=True)
        base.symlink_to(home)

    def plant_open_parent() -> None:
        base.parent.mkdir(exist_ok=True)
        base.parent.chmod(0o777)

    plants = [plant_folder_with_link, plant_link] + ([plant_open_parent] if kind in CACHES else [])
    for plant in plants:
        as_user(OTHER_USER, plant)
        message = as_user(victim, use)
        setting = "TMPDIR" if kind in KINDS else "XDG_CACHE_HOME"
        assert re.search(r"(belongs to another user|is a symbolic link)", message), message
        assert f"set {setting} to a folder of your own" in message and "\n" not in message
        assert (home / "precious").exists() and (home / kind / "precious").exists()
        for planted in (base, base.parent):
            if planted.is_symlink():
                planted.unlink()
            elif planted not in (shared, *shared.parents) and planted.exists():
                shutil.rmtree(planted)
    assert as_user(victim, use) == ""


@needs_root
def test_a_parent_that_another_user_can_replace_is_refused(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared / "site" / "scratch"
    folder.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    wanted = folder / NODE / "index"

    def refused(problem: str) -> None:
        with pytest.raises(UserError) as error:
            node_folders.index_folder()
        assert str(error.value) == (
            f"the folder {wanted.parent} is not safe from other users, because {problem}; set TMPDIR to a folder of "
            "your own, or set CRATE_RAY_ONE_USER=1 if nobody else can log in to this machine or container"
        )
        assert not wanted.exists()

    for parent in (folder, folder.parent):
        parent.chmod(0o777)
        refused(f"{parent} may be written to by other users")
        parent.chmod(0o1777)
        os.chown(parent, OTHER_USER, OTHER_USER)
        refused(f"{parent} belongs to another user")
        os.chown(parent, 0, 0)
        parent.chmod(0o755)
    folder.chmod(0o2777)  # as a volume of a Kubernetes pod
    monkeypatch.setenv("CRATE_RAY_ONE_USER", "1")
    node_folders.index_folder()
    os.chown(folder, OTHER_USER, OTHER_USER)
    shutil.rmtree(folder / NODE)
    refused(f"{folder} belongs to another user")
    monkeypatch.delenv("CRATE_RAY_ONE_USER")
    os.chown(folder, 0, 0)
    folder.chmod(0o755)

    link = shared / "link"
    as_user(OTHER_USER, lambda: link.symlink_to(folder))
    monkeypatch.setattr("tempfile.tempdir", str(link))
    wanted = link / NODE / "index"
    refused(f"{link} is a symbolic link of another user")
    link.unlink()
    link.symlink_to("site/../site/scratch")  # root's own
    assert node_folders.index_folder() == wanted and (folder / NODE / "index").is_dir()
    link.unlink()
    link.symlink_to(link)
    refused(f"{link} is one of too many symbolic links")


@needs_root
def test_a_group_of_the_user_alone_may_write(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many systems give each user a group and make folders that it can write to."""
    folder = shared / "mine"
    folder.mkdir()
    folder.chmod(0o775)
    os.chown(folder, OTHER_USER, OTHER_USER)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    user = pwd.struct_passwd(("me", "x", OTHER_USER, OTHER_USER, "", "/", "/bin/sh"))
    monkeypatch.setattr("pwd.getpwuid", lambda uid: user)
    for name, members, private in (("me", [], True), ("me", ["me"], True), ("me", ["you"], False), ("us", [], False)):
        group = grp.struct_group((name, "x", OTHER_USER, members))
        monkeypatch.setattr("grp.getgrgid", lambda gid, group=group: group)
        assert ("may be written to by other users" in as_user(OTHER_USER, node_folders.index_folder)) != private


def test_a_folder_that_the_user_chose_may_be_a_link_but_not_another_users(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert chosen_folder(tmp_path / "link", "choose another").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create the folder \S+/file: File exists; choose another"):
        chosen_folder(tmp_path / "file", "choose another")
    (tmp_path / "disk").chmod(0o707)
    with pytest.raises(UserError, match=r"the folder \S+/link may be written to by other users; choose another"):
        chosen_folder(tmp_path / "link", "choose another")
    (tmp_path / "disk").chmod(0o755)
    if os.getuid() == 0:
        os.chown(tmp_path / "disk", OTHER_USER, OTHER_USER)
        with pytest.raises(UserError, match=r"the folder \S+/link belongs to another user; choose another"):
            chosen_folder(tmp_path / "link", "choose another")


def test_eviction_removes_what_was_used_longest_ago(tmp_path: Path) -> None:
    for age, name in enumerate("dcba"):
        entry = tmp_path / name
        if name in "ac":
            entry.mkdir()
            (entry / "1").write_bytes(bytes(60))
            (entry / "2").write_bytes(bytes(40))
        else:
            entry.write_bytes(bytes(100))
        os.utime(entry, (time.time() - age * 100,) * 2)  # a is the oldest
    assert total_size(tmp_path.iterdir()) == 400
    assert evict(tmp_path.iterdir(), 400) == 400
    assert evict(tmp_path.iterdir(), 250, keep={tmp_path / "b"}) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d"]
    assert evict([tmp_path / "b", tmp_path / "gone"], 0) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_caches_delete_only_what_they_named(tmp_path: Path) -> None:
    """A user may choose a folder that holds other files. A link in it is no way to files elsewhere."""
    digest = hashlib.sha256(b"part").hexdigest()
    folder, elsewhere = tmp_path / "chosen", tmp_path / "elsewhere"
    mine = [folder / name for name in ("en/text", "ab/photo", "notes", f"ab/{'c' * 64}")]
    mine += [elsewhere / f"cd{'0' * 62}", elsewhere / digest, folder / ".partial.mine" / "text"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
    (folder / "cd").symlink_to(elsewhere)
    (folder / ("d" * 64)).symlink_to(elsewhere)
    (folder / "ef").mkdir()
    (folder / "ef" / f"ef{'1' * 62}").symlink_to(elsewhere / digest)
    parts = PartCache(folder, 100)
    for number in range(20):
        name = hashlib.sha256(bytes([number])).hexdigest()
        parts.get(name, lambda: bytes(60), lambda data: None)
    features = FeatureCache(folder, 100)
    for number in range(3):
        with features.write([hashlib.sha256(bytes([number])).hexdigest()], 10, [4]):
            pass
    assert all(path.read_bytes() == bytes(5000) for path in mine)
    (folder / ".partial").rename(tmp_path / "partial")
    (folder / ".partial").symlink_to(elsewhere)
    (elsewhere / "old").mkdir()
    refusal = r"\.partial is a symbolic link; remove it, or choose another features_dir"
    with pytest.raises(UserError, match=refusal), features.write([digest], 10, [4]):
        pass
    assert (elsewhere / "old").exists()


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180-2
    assert file_digest(tmp_path / "file") == expected
    with (tmp_path / "file").open("rb") as file:
        file.read(2)
        assert file_digest(file) == expected
