"""Packing and indexing as Ray tasks give the bytes that threads give, also when a worker dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.storage.interface import open_storage
from tests.jobs import ROOT, environment

pytestmark = pytest.mark.ray

SAMPLES = 400
LIMITS = {"shard_samples": 40, "max_side": 100}

ON_RAY = """
import json, signal, sys, threading, time
import psutil, ray
from crate_ray.config import PrepareConfig, S3Config
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source
from crate_ray.storage.interface import open_storage
from crate_ray.errors import UserError

folder, samples, limits = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

def kill_one():
    while True:
        for child in psutil.Process().children(recursive=True):
            try:
                if "_reporting" in " ".join(child.cmdline()):
                    time.sleep(0.3)
                    child.send_signal(signal.SIGKILL)
                    print("killed", flush=True)
                    return
            except psutil.Error:
                pass
        time.sleep(0.02)

threading.Thread(target=kill_one, daemon=True).start()
output = open_storage(folder, S3Config())
pack(shapes_source("all", samples, 120, 0), output, PrepareConfig(output=folder, **limits))
index_existing(output, overwrite=True)

def fail():
    raise UserError("a sentence of a task")

good = shapes_source("all", 1, 20, 0).items
try:
    pack(Source([*good, Item("bad", fail)]), open_storage(folder + "-2", S3Config()),
         PrepareConfig(output="unused", shuffle=False))
except UserError as raised:
    print(f"error: {raised}", flush=True)
"""


@pytest.mark.daily
def test_ray_gives_what_threads_give(tmp_path: Path) -> None:
    here = open_storage(str(tmp_path / "here"), S3Config())
    pack(shapes_source("all", SAMPLES, 120, 0), here, PrepareConfig(output="unused", **LIMITS))
    index_existing(here, overwrite=True)
    there = tmp_path / "there"
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY, str(there), str(SAMPLES), json.dumps(LIMITS)],
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0] == "killed"
    assert "error: a sentence of a task" in done.stdout
    files = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == files
