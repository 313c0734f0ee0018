"""Records and folders that somebody has tampered with: no identifier in them is a path out of its folder, nothing
outside is read into MLflow, overwritten or deleted, and a start only reads until it holds the lease."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from pydantic import BaseModel, TypeAdapter, ValidationError

from crate_ray.config import CheckpointConfig, PrepareConfig, S3Config, Settings
from crate_ray.config.identifiers import FileName, FolderAddress, RelativePath, RunKey, Sha256
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, parse_manifest
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack, plan_packing
from crate_ray.data.prepare.records import ShardRecord, begin, load_records
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding_output import EmbeddingRecord, PartReport
from crate_ray.models.exported import ModelDescription
from crate_ray.runs.checkpoint_files import CheckpointState
from crate_ray.runs.commits import Commit, FileRecord, committed, fetch_newest
from crate_ray.runs.planning import driver_lease
from crate_ray.runs.pretraining import open_pretraining
from crate_ray.runs.record import FinetuneStart, Parent, RunRecord
from crate_ray.runs.retention import delete_old_checkpoints, delete_unfinished
from crate_ray.runs.starts import Start
from crate_ray.storage.interface import open_storage
from crate_ray.storage.local import LocalStorage
from crate_ray.tracking.pretraining import publish
from crate_ray.tracking.spool import FileEvent, Lane, MetricsEvent, ModelEvent, Spool, StatusEvent, TagEvent
from crate_ray.training.lifecycle import run_training
from crate_ray.training.pretraining import PretrainTask
from tests.unit.test_checkpoint import RECORD, Trainer
from tests.unit.test_lifecycle import base, trained, uri

__all__ = ["base", "uri"]  # fixtures

OUT = ["/etc/passwd", "..", "../x", "a/../../x", "a/..", ".", "", "a//b", "a/", "/", "a\0b", "a\nb"]
KEY, DIGEST = "0" * 32, "0" * 64


def tree(*folders: Path) -> dict[str, bytes | str | None]:
    """Everything in some folders, by path: content, target of a link, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        link, file = path.is_symlink(), path.is_file()
        found[str(path)] = os.readlink(path) if link else path.read_bytes() if file else None  # noqa: PTH115
    return found


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user outside of what the test opens, with files of all names that are written or deleted."""
    folder = tmp_path / "victim"
    for name in (*("plan.json", "000000.json", "shard-000000.tar", "id_rsa", "manifest.json"), "files/a/id_rsa"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the user's {name}")
    return folder


# --- Forms ----------------------------------------------------------------------------------------------------------


@given(st.one_of(st.text(), st.lists(st.sampled_from(["a", "..", ".", "", "b.tar"])).map("/".join)))
def test_a_valid_path_stays_below_its_folder(text: str) -> None:
    folder = Path("/folder")
    for kind in (RelativePath, FileName):
        try:
            path = TypeAdapter(kind).validate_python(text)
        except ValidationError:
            continue
        inside = Path(os.path.normpath(folder / path))
        assert folder in inside.parents and (kind is RelativePath or inside.parent == folder)
        assert str(inside.relative_to(folder)) == text  # one name for one file


def test_hostile_identifiers_have_none_of_the_forms() -> None:
    for hostile in OUT:
        for kind in (RelativePath, FileName, Sha256, RunKey):
            with pytest.raises(ValidationError):
                TypeAdapter(kind).validate_python(hostile)
    for kind, good in ((Sha256, DIGEST), (RunKey, KEY)):
        for hostile in (good[1:], good + "0", good + "\n", good[1:] + "G", good[1:] + "٣", f"../{good}"):
            with pytest.raises(ValidationError):
                TypeAdapter(kind).validate_python(hostile)
    for address in ("/data/set", "s3://bucket/prefix", "s3://bucket"):
        assert TypeAdapter(FolderAddress).validate_python(address) == address
    for address in (
        "",
        "data",
        "../data",
        "/data/../etc",
        "s3://",
        "s3:///x",
        "s3://b/../c",
        "file:///x",
        "http://x/y",
    ):
        with pytest.raises(ValidationError):
            TypeAdapter(FolderAddress).validate_python(address)


FREE_TEXT = {
    "Parent.reference", "CheckpointState.torch_version", "CheckpointState.arithmetic",
    "Manifest.shard_pattern",  # has its own validator
    "Manifest.image_suffixes", "Manifest.suffixes", "Manifest.classes", "Manifest.unsafe_names",
    "ShardRecord.bad", "SampleCounts.suffixes", "SampleCounts.images", "SampleCounts.without_image_names",
    "SampleCounts.several", "SampleCounts.unlabelled_names", "DatasetStatistics.dtypes",
    "DatasetStatistics.refused_names",
    "SampleCounts.unsafe_names", "EmbeddingRecord.skipped", "EmbeddingRecord.skipped_keys", "EmbeddingRecord.version",
    "EmbeddingRecord.reference", "EmbeddingRecord.classes", "PartReport.last_error", "MetricsEvent.values",
    "TagEvent.name", "TagEvent.value", "Start.changed",
}  # fmt: skip
"""Texts in records that only become messages, metric names or keys of samples."""
RECORDS = [
    RunRecord, Parent, FinetuneStart, CheckpointState, Commit, FileRecord, ModelDescription, Manifest, ShardRecord,
    EmbeddingRecord, PartReport, MetricsEvent, StatusEvent, TagEvent, FileEvent, ModelEvent, Start,
]  # fmt: skip


def test_every_text_in_a_record_has_a_form_or_is_known_to_be_free() -> None:
    """A new field of a record that is just a `str` must be given a form, or be listed above."""
    seen: set[str] = set()

    def plain_texts(annotation: Any) -> Iterator[bool]:
        if annotation is str:
            yield True
        elif get_origin(annotation) is not Annotated:
            for part in get_args(annotation):
                yield from plain_texts(part)

    def visit(model: type[BaseModel]) -> None:
        assert model.model_config["extra"] == "forbid", model
        for name, field in model.model_fields.items():
            inner = [field.annotation, *get_args(field.annotation)]
            for part in inner:
                of_records = isinstance(part, type) and issubclass(part, BaseModel)
                if of_records and (not issubclass(part, Settings) or part in RECORDS):
                    visit(part)
            if not field.metadata and any(plain_texts(field.annotation)):
                seen.add(f"{model.__name__}.{name}")

    for record in RECORDS:
        visit(record)
    assert seen == FREE_TEXT


# --- Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["VICTIM", "../../../victim", "..", ".", "", "0123", KEY + "/../x"])
def test_the_run_key_of_a_finished_run_is_no_folder(
    key: str, base: dict[str, Any], tmp_path: Path, victim: Path
) -> None:
    config = trained(base, 1, tmp_path)
    path = tmp_path / "runs" / "mine" / "run.json"
    record = json.loads(path.read_text())
    (victim / "events.jsonl").write_text(json.dumps({"kind": "file", "path": "files/a/id_rsa", "folder": None}) + "\n")
    path.write_text(json.dumps(record | {"run_key": str(victim) if key == "VICTIM" else key}))
    before = tree(victim, path.parent)
    with pytest.raises(UserError, match=r"run\.json cannot be read \(run_key: String should match pattern.*; restore"):
        run_training(config, PretrainTask, open_pretraining, publish, show_progress=False)
    assert tree(victim, path.parent) == before


def test_a_start_only_reads_until_it_holds_the_lease(base: dict[str, Any], tmp_path: Path) -> None:
    config = trained(base, 1, tmp_path)
    config = config.model_copy(update={"scaling": config.scaling.model_copy(update={"lease_seconds": 1.0})})
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    with driver_lease(config):
        lease = str(runs / "mine" / "driver.lease")
        before = tree(runs, cache)
        with pytest.raises(UserError, match="run 'mine' is in use by"):
            run_training(config, PretrainTask, open_pretraining, publish, show_progress=False)
        after = tree(runs, cache)
    assert before.pop(lease) != after.pop(lease)  # the heartbeat of its holder
    assert after == before


LANES: tuple[Lane, ...] = get_args(Lane)


def events(spool: Spool, *lines: dict[str, Any]) -> None:
    with (spool.folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_forged_event_uploads_and_deletes_nothing_outside(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spool = Spool(KEY)
    paths = [str(victim / "id_rsa"), "../../../../victim/id_rsa", f"files/{KEY}/../../x", f"files/{KEY}", "sent", ""]
    events(spool, *({"kind": kind, "path": path, "folder": None} for path in paths for kind in ("file", "model")))
    events(spool, {"kind": "file", "path": f"files/{KEY}/x", "folder": "../x"}, {"kind": "unknown"})
    events(spool, {"kind": "status", "status": "GONE"}, {"kind": "metrics", "step": -1, "values": {}, "time": 0})
    assert not [event for lane in LANES for event, _ in spool.undelivered(lane) if event]

    (spool.folder / "files").mkdir()
    links = ["1" * 32, "2" * 32, "3" * 32]
    (spool.folder / "files" / links[0]).symlink_to(victim)
    for name in links[1:]:
        (spool.folder / "files" / name).mkdir()
    (spool.folder / "files" / links[1] / "id_rsa").symlink_to(victim / "id_rsa")
    (spool.folder / "files" / links[2] / "model").mkdir()
    (spool.folder / "files" / links[2] / "model" / "model.json").symlink_to(victim / "id_rsa")
    events(spool, *({"kind": "file", "path": f"files/{name}/id_rsa", "folder": None} for name in links[:2]))
    events(spool, {"kind": "model", "path": f"files/{links[2]}/model"})
    before, forged = tree(victim), list(spool.undelivered("files"))
    assert len(forged) == 3
    for event, end in forged:
        assert isinstance(event, FileEvent | ModelEvent) and spool.content_of(event) is None
        spool.mark_delivered("files", event, end)
    spool.remove()
    assert tree(victim) == before


def test_a_spool_whose_files_are_a_link_deletes_nothing(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (victim / "files" / "a").rename(victim / "files" / KEY)
    spool = Spool(KEY)
    (spool.folder / "files").symlink_to(victim / "files")
    events(spool, {"kind": "file", "path": f"files/{KEY}/id_rsa", "folder": None})
    before = tree(victim)
    ((event, end),) = spool.undelivered("files")
    assert isinstance(event, FileEvent) and spool.content_of(event) is None
    spool.mark_delivered("files", event, end)
    spool.remove()
    assert tree(victim) == before


def commit_with(changes: dict[str, Any]) -> bytes:
    record = {"step": 1, "directory": "attempt-001/step-1", "files": {}, "time": 0.0}
    return json.dumps(record | changes).encode()


@pytest.mark.usefixtures("one_thread")
def test_a_forged_commit_neither_fetches_nor_deletes_outside_its_checkpoint(tmp_path: Path, victim: Path) -> None:
    run = LocalStorage(tmp_path / "run")
    trainer = Trainer()
    trainer.train(2)
    good = trainer.save(run, tmp_path)
    run.write("model/model.json", b"{}")
    (tmp_path / "run" / "attempt-009").symlink_to(victim)
    before = tree(tmp_path / "run", victim)
    file = {"size": 1, "sha256": DIGEST}
    forged: list[dict[str, Any]] = [
        *({"directory": path} for path in [*OUT, str(victim), "../victim", "model", "attempt-001", "commits/x"]),
        *({"directory": f"attempt-001/step-1{rest}"} for rest in ("/", "/..", "/../..", "\n")),
        *({"files": {name: file}} for name in [*OUT, str(victim / "id_rsa"), "../x", "a/b"]),
        {"files": {"state.json": {"size": -1, "sha256": DIGEST}}},
        {"files": {"state.json": {"size": 1, "sha256": f"../{DIGEST}"}}},
        {"step": -1},
        {"directory": good},  # an old step in the folder of the newest checkpoint, under another record's name
    ]
    for number, changes in enumerate(forged):
        run.write(f"commits/step-{number}.json", commit_with(changes))
    assert [commit.directory for commit in committed(run)] == [good]
    delete_old_checkpoints(run, CheckpointConfig(keep_last=1, keep_best=0))
    delete_unfinished(run)
    after = tree(tmp_path / "run", victim)
    assert before.items() <= after.items()
    found = fetch_newest(run, tmp_path / "fetched")
    assert found is not None and found.directory == good


def test_a_checkpoint_behind_a_link_is_not_deleted(tmp_path: Path, victim: Path) -> None:
    run = LocalStorage(tmp_path / "run")
    run.write("commits/step-1.json", commit_with({"directory": "attempt-001/step-1"}))
    run.write("commits/step-2.json", commit_with({"step": 2, "directory": "attempt-001/step-2"}))
    (tmp_path / "run" / "attempt-001").mkdir()
    (tmp_path / "run" / "attempt-001" / "step-1").symlink_to(victim)
    before = tree(victim)
    delete_old_checkpoints(run, CheckpointConfig(keep_last=1, keep_best=0))
    assert tree(victim) == before and [commit.step for commit in committed(run)] == [2]


def test_the_state_of_a_forged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    from crate_ray.runs.checkpoint_files import read_state

    state = CheckpointState(step=1, run=RECORD, world_size=1, torch_version="2").model_dump(mode="json")
    state["run"]["run_key"] = "../../x"
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"state\.json cannot be read \(run\.run_key: String should match"):
        read_state(tmp_path)


# --- Datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "data")
    pack(shapes_source("all", 6, 8, 0), storage, PrepareConfig(source="shapes", output=storage.uri, shard_samples=3))
    return storage


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("index_sha256", [*OUT, "../../victim/id_rsa"]),
        ("shards_sha256", OUT),
        ("names_sha256", OUT),
        ("shards_uri", ["", "x", "../x", "/data/../etc", "file:///etc", "http://host/x"]),
        ("shard_pattern", [f"{before}{{:06d}}.tar" for before in ("/", "../", "a/../", "a//", "./", "\0")]),
        ("shard_first", [-1]),
        ("num_unsafe", [-1]),
        ("mean", [["nan"] * 3, [1e999] * 3]),
    ],
)
def test_a_forged_manifest_is_damaged(dataset: LocalStorage, field: str, values: list[Any]) -> None:
    manifest = json.loads(dataset.read(MANIFEST_NAME))
    assert parse_manifest(json.dumps(manifest).encode(), "uri").num_shards == 2
    for value in values:
        with pytest.raises(UserError, match=rf"manifest\.json is damaged: {field}.*; restore it, or index"):
            parse_manifest(json.dumps(manifest | {field: value}).encode(), "uri")


@pytest.mark.parametrize("name", ["/etc/passwd", "../victim/shard-000000.tar", "a/../../x", "", "a\tb"])
def test_forged_names_of_shards_are_refused(dataset: LocalStorage, name: str) -> None:
    names = f"{name}\nx.tar\n".encode()
    manifest = load_dataset(dataset).manifest
    forged = manifest.model_copy(update={"shard_pattern": None, "names_sha256": hashlib.sha256(names).hexdigest()})
    dataset.write("names.txt", names)
    dataset.write(MANIFEST_NAME, forged.to_json())
    with pytest.raises(UserError, match=r"names\.txt is damaged: the name of a shard, .* is not a relative path"):
        load_dataset(dataset)


@pytest.mark.parametrize("finished", [False, True])
def test_packing_neither_writes_nor_deletes_behind_a_link(dataset: LocalStorage, victim: Path, finished: bool) -> None:
    """`.packing` is a link to a folder that even holds files of its names."""
    if not finished:
        dataset.delete(MANIFEST_NAME)
    (dataset.root / ".packing").symlink_to(victim)
    before = tree(victim, dataset.root)
    config = PrepareConfig(source="shapes", output=dataset.uri, overwrite=True)
    with pytest.raises(UserError, match=r"\.packing is a symbolic link, and crate-ray neither writes nor deletes"):
        pack(shapes_source("all", 9, 8, 1), dataset, config)
    assert tree(victim, dataset.root) == before


def test_a_forged_record_of_a_shard_does_not_make_another_shard_disappear(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "data")
    source = shapes_source("all", 6, 8, 0)
    config = PrepareConfig(source="shapes", output=storage.uri, shard_samples=3)
    pack(source, storage, config)
    plan = plan_packing(source, storage.uri, config)
    begin(storage, plan.digest)
    row = {"samples": 0, "bytes": 1, "table": 0, "sha256": DIGEST, "counts": {}, "measurement": {}, "bad": []}
    names = ["manifest.json", "../x", "/etc/passwd", "shard-000001.tar"]
    for key in ("000000", "000007", "²", "-1", "x", "9" * 30):
        for name in names:
            record = row | {"plan": plan.digest, "name": name, "index_sha256": DIGEST}
            storage.write(f"{PLAN_NAME.partition('/')[0]}/{key}.json", json.dumps(record).encode())
            storage.write(f"{PLAN_NAME.partition('/')[0]}/{key}.npy", b"")
            assert load_records(storage, plan.digest, plan.names) == {}


# --- Storage --------------------------------------------------------------------------------------------------------


WRITES: dict[str, Callable[[LocalStorage, str], Any]] = {
    "write": lambda storage, key: storage.write(key, b"new"),
    "if_absent": lambda storage, key: storage.write(key, b"new", if_absent=True),
    "if_match": lambda storage, key: storage.write(key, b"new", if_match="0-0"),
    "delete": lambda storage, key: storage.delete(key),
}


@pytest.mark.parametrize("action", WRITES)
def test_writes_and_deletions_stay_in_a_local_folder(action: str, tmp_path: Path, victim: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    for link in ("link", "a/link"):
        (root / link).symlink_to(victim)
    storage = LocalStorage(root)
    assert storage.read("link/id_rsa") == storage.read("a/link/id_rsa")  # reads follow links
    before = tree(victim, root)
    act = WRITES[action]
    for place, key in [
        (storage, "link/id_rsa"), (storage, "a/link/id_rsa"), (storage, "link/files/new/id_rsa"),
        (storage.under("link"), "id_rsa"), (storage.under("a/link"), "id_rsa"), (storage.under("a"), "link/id_rsa"),
        (storage.under("a").under("link").under("files"), "a/id_rsa"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=r"link is a symbolic link, and crate-ray neither writes nor deletes"):
            act(place, key)
    for key in OUT[:4]:
        with pytest.raises(UserError):
            act(storage, key)
    assert tree(victim, root) == before


def test_a_link_to_a_file_is_replaced_or_removed_itself(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")  # the opened folder may be a link
    storage, before = LocalStorage(tmp_path / "root"), tree(victim)
    for name in ("replaced", "removed"):
        (tmp_path / "disk" / name).symlink_to(victim / "id_rsa")
    assert {info.key for info in storage.list()} == {"replaced", "removed"}
    storage.write("replaced", b"new")
    storage.delete("removed")
    storage.write("new/file", b"new")
    assert tree(victim) == before
    assert [path.is_symlink() for path in sorted((tmp_path / "disk").iterdir())] == [False, False]
    assert storage.read("replaced") == storage.read("new/file") == b"new"


def test_names_in_a_bucket_that_lead_out_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        for key in ("p/good", "p//absolute", "p/a/../../b", "p/..", "px"):
            client.put_object(Bucket="bucket", Key=key, Body=b"x")
        storage = open_storage("s3://bucket/p", S3Config(endpoint_url=endpoint))
        assert [info.key for info in storage.list()] == ["good"]
        assert "left out objects with absolute names or '..'" in caplog.text
        for key in ("../px", "/absolute", "a/../../b"):
            for action in (storage.read, storage.delete, storage.exists, storage.under):
                with pytest.raises(UserError, match="leads out of s3://bucket/p"):
                    action(key)
    finally:
        server.stop()
