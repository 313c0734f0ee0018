"""What tests share: a cluster of cluster/local.sh, with two Ray nodes, S3, PostgreSQL and MLflow on free ports, and a
plain Ray of one small node."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import ray

from crate_ray.ray_cluster import start_ray
from tests.jobs import RAY, ROOT, RayCluster, running_ray

SCRIPT = ROOT / "cluster/local.sh"


@dataclass(frozen=True)
class LocalCluster:
    """A cluster of cluster/local.sh and how to reach it."""

    state: Path
    """CRATE_RAY_CLUSTER_DIR: logs, keys, data."""
    settings: dict[str, str]
    """The CRATE_RAY_* environment of local.sh."""

    @cached_property
    def env(self) -> dict[str, str]:
        """What env.sh exports, as a shell sees it: addresses, token path and keys."""
        shell = subprocess.run(
            ["bash", "-c", 'source "$1" && env -0', "bash", self.state / "env.sh"],
            env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        values = dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)
        return {name: value for name, value in values.items() if name.startswith(("RAY_", "AWS_", "MLFLOW_"))}

    def environment(self) -> dict[str, str]:
        """This process's environment with env.sh's values, for subprocesses."""
        return {**os.environ, **self.env}

    def local_sh(self, command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run `cluster/local.sh COMMAND` on this cluster, with this Python's environment."""
        return subprocess.run(
            [SCRIPT, command],
            env=self._environment(settings), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400,
            check=False,
        )  # fmt: skip

    def start_local_sh(self, command: str) -> subprocess.Popen[bytes]:
        """The same, without waiting for it."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen([SCRIPT, command], env=self._environment({}), stdin=quiet, stdout=quiet, stderr=quiet)

    def _environment(self, settings: dict[str, str]) -> dict[str, str]:
        return {**os.environ, "VIRTUAL_ENV": str(Path(sys.executable).parents[1]), **self.settings, **settings}

    def submit(self, *entrypoint: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from the repository root, until the job has ended."""
        return subprocess.run(
            [RAY, "job", "submit", "--working-dir", ".", "--", *entrypoint],
            env=self.environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


def local_cluster_settings(state: Path) -> dict[str, str]:
    """State folder and free ports for a cluster that disturbs no other."""
    # Below the range of ephemeral ports, so that no connection takes one before its server does.
    free: list[int] = []
    port = 20000 + os.getpid() % 10000
    while len(free) < 7:
        port = port + 1 if port < 32000 else 20000
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                free = free[:-1] if len(free) == 1 else free  # S3 needs two ports in a row
                continue
        free.append(port)
    names = ("S3", None, "GCS", "DASHBOARD", "CLIENT", "POSTGRES", "MLFLOW")
    ports = {f"CRATE_RAY_{name}_PORT": str(port) for name, port in zip(names, free, strict=True) if name}
    return {"CRATE_RAY_CLUSTER_DIR": str(state), "CRATE_RAY_CPUS_PER_NODE": "2", **ports}


def missing_packages() -> str | None:
    """What `apt-get install` has to bring before a local cluster can start."""
    postgres = shutil.which("postgres") or any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    missing = [] if postgres else ["postgresql"]
    if not all(map(shutil.which, ("radosgw", "ceph-mon", "ceph-osd", "ceph-authtool"))):
        missing += ["radosgw", "ceph-mon", "ceph-osd", "ceph-common"]
    return " ".join(missing) or None


@pytest.fixture(scope="session")
def endings() -> Iterator[list[tuple[subprocess.Popen[bytes], Path]]]:
    """Clusters that are on their way down, and their folders; waits for them when all tests are done."""
    ending: list[tuple[subprocess.Popen[bytes], Path]] = []
    yield ending
    for process, state in ending:
        process.wait(400)
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="package")
def local_cluster(endings: list[tuple[subprocess.Popen[bytes], Path]]) -> Iterator[LocalCluster]:
    """A cluster that is up, one for all tests of this folder; skips where Debian packages are missing, except in CI.

    It goes down while the tests of other folders run.
    """
    if packages := missing_packages():
        reason = f"apt-get install --no-install-recommends {packages}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    state = Path(tempfile.mkdtemp(prefix="crate-ray-cluster-"))  # not tmp_path: user postgres may not enter that
    cluster = LocalCluster(state, local_cluster_settings(state))
    try:
        up = cluster.local_sh("up")
        if up.returncode:
            logs = "\n".join(f"== {log}\n{log.read_text()[-2000:]}" for log in cluster.state.glob("logs/*.log"))
            pytest.fail(f"local.sh up failed\n{up.stdout}{up.stderr}\n{logs}")
        yield cluster
    finally:
        endings.append((cluster.start_local_sh("down"), state))


@pytest.fixture(scope="package")
def small_ray() -> Iterator[RayCluster]:
    """A Ray with room for two workers."""
    with running_ray(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def driver_here(small_ray: RayCluster) -> Iterator[RayCluster]:
    """The same, and this process is a driver of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ADDRESS", small_ray.address)
        start_ray()
        yield small_ray
        ray.shutdown()
