"""What a run's workers listen on, and who may read the token of a local Ray."""

from __future__ import annotations

import ipaddress
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from crate_ray.config import ScalingConfig
from crate_ray.training.ray.fit import fit, ray_failures, ray_scaling
from crate_ray.training.ray.mailbox import Mailbox
from tests.jobs import ROOT, RayCluster

pytestmark = pytest.mark.ray


def open_to_others() -> list[int]:
    """Ports of this process that another machine can connect to."""
    connections = psutil.Process().net_connections(kind="tcp")
    listening = [connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN]
    return [port for address, port in listening if not ipaddress.ip_address(address).is_loopback]


def look(payload: dict[str, Any]) -> None:
    """A training loop that sums once and says what its worker listens on."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    found = {"sum": ones.item(), "open": open_to_others(), "store": int(os.environ["MASTER_PORT"])}
    Path(payload["folder"], f"{dist.get_rank()}.json").write_text(json.dumps(found))


def test_workers_of_one_machine_open_no_port_of_torch_to_others(driver_here: RayCluster, tmp_path: Path) -> None:
    """Neither the store's nor gloo's, which ask for no password. Ray's own ports ask for the token."""
    scaling = ScalingConfig(workers=2, cpus_per_worker=1, max_failures=0)
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    payload = {"attempt": "attempt-001", "mailbox": mailbox, "folder": tmp_path.as_posix()}
    plain = ray.get(ray.remote(num_cpus=0)(open_to_others).remote())

    def follow(done: threading.Event) -> None:
        assert done.wait(120)

    fit(look, payload, ray_scaling(scaling, {"CPU": 1}, use_gpu=False), ray_failures(scaling), follow)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["sum"] == 2
        assert found["store"] not in found["open"]
        assert len(found["open"]) == len(plain), "more than any Ray worker opens"


@pytest.mark.parametrize("folder_exists", [False, pytest.param(True, marks=pytest.mark.daily)])
def test_the_token_of_a_local_ray_is_its_users_alone(tmp_path: Path, folder_exists: bool) -> None:
    """At no time anyone else can read it, also with a folder and an umask that let everybody read."""
    folder = tmp_path / ".ray"
    if folder_exists:
        folder.mkdir(mode=0o755)
    script = "import os, crate_ray.ray_cluster as c, ray; os.umask(0o022); c.start_ray(); ray.shutdown()"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env | {"HOME": str(tmp_path), "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "auth_token").stat().st_mode) == 0o600
