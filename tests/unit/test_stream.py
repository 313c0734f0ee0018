"""The loader for other training loops works without Ray and MLflow, and can resume with another number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from pydantic import ValidationError

from crate_ray.config import PrepareConfig
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.storage.local import LocalStorage

PROGRAM = """
import json, sys
from crate_ray.data.stream import stream
uri, rank, world, state, count = json.loads(sys.argv[1])
with stream(uri, batch_size=20, image_size=16, rank=rank, world_size=world, memory_bytes=1, block_samples=8) as batches:
    if state:
        batches.load_state_dict(state)
    steps = iter(batches)
    keys = [next(steps).keys for _ in range(count)]
    state = batches.state_dict()
assert not {"ray", "mlflow"} & set(sys.modules)
print(json.dumps([keys, state]))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    pack(shapes_source("all", 150, 16, 0), LocalStorage(folder), PrepareConfig(output="unused", shard_samples=40))
    return str(folder)


@pytest.mark.slow
def test_processes_of_any_launcher_share_the_batches(dataset: str) -> None:
    def run(rank: int, world: int, state: object, count: int) -> tuple[list[list[str]], object]:
        arguments = json.dumps([dataset, rank, world, state, count])
        done = subprocess.run([sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, check=True)
        keys, state = json.loads(done.stdout)
        return keys, state

    whole, _ = run(0, 1, None, 9)
    (left, state), (right, same) = run(0, 2, None, 4), run(1, 2, None, 4)
    rest, _ = run(0, 1, state, 5)
    assert state == same
    assert [*(a + b for a, b in zip(left, right, strict=True)), *rest] == whole
    assert Path(dataset).is_dir() and len({key for keys in whole[:7] for key in keys}) == 140


def test_a_position_is_for_the_settings_it_was_saved_with(dataset: str) -> None:
    usual = {"batch_size": 20, "image_size": 16, "seed": 3}
    with stream(dataset, **usual) as batches:
        keys = [next(iter(batches)).keys for _ in range(3)]
        state = batches.state_dict()
    streamed = {"memory_bytes": 1, "block_samples": 16}
    for other, name in (
        ({"seed": 1}, "seed was 3 and is 1"),
        ({"batch_size": 10}, "batch_size"),
        (streamed, "block_samples"),
    ):
        with stream(dataset, **{**usual, **other}) as batches, pytest.raises(UserError, match=f"another order.*{name}"):
            batches.load_state_dict(state)
    # How the same order is read does not matter, nor by whom.
    with stream(dataset, **usual, memory_bytes=1, block_samples=1, window_blocks=150, lanes=1, world_size=2) as batches:
        batches.load_state_dict(state)
        following = next(iter(batches)).keys
    with stream(dataset, **usual) as batches:
        assert [keys, following] == [[b.keys for b in islice(batches, 3)], next(iter(batches)).keys[:10]]


def test_wrong_use_is_told(dataset: str) -> None:
    with pytest.raises(ValidationError, match="crop_scael"):
        stream(dataset, batch_size=8, image_size=16, crop_scael=(0.5, 1))
    with pytest.raises(UserError, match="batch_size"):
        stream(dataset, batch_size=1000, image_size=16)


WITHOUT_BOTO3 = """
import sys
sys.modules["boto3"] = sys.modules["botocore"] = None  # whoever imports one gets an ImportError
import crate_ray.data.loader
from crate_ray.config import S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.storage.interface import open_storage
assert load_dataset(open_storage(sys.argv[1], S3Config())).manifest.num_samples == 150
with stream(sys.argv[1], batch_size=20, image_size=16, steps=1) as batches:
    assert [len(batch.images) for batch in batches] == [20]
try:
    open_storage("s3://bucket/data", S3Config())
except UserError as error:
    print(error)
"""


def test_local_folders_need_no_boto3(dataset: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_BOTO3, dataset], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("s3://bucket/data cannot be opened: ") and "install boto3" in done.stdout
