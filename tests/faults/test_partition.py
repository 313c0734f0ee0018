"""A node of cluster/local.sh with a network of its own is cut off in mid-training, and comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest
import requests

from crate_ray.config import S3Config
from crate_ray.storage.interface import Storage, open_storage
from tests.faults.runs import EVERY, STEPS, Undisturbed, pretrain
from tests.integration.conftest import LocalCluster, local_cluster_settings, missing_packages
from tests.jobs import RAY, ROOT, final_weights, newest_commit

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.daily]


@pytest.fixture
def two_machines() -> Iterator[LocalCluster]:
    """A local cluster with one CPU in each of two networks; it gives a silent node up after some seconds."""
    missing = missing_packages() or ("iproute2" if shutil.which("ip") is None else None)
    if missing or os.geteuid():
        pytest.skip(f"apt-get install --no-install-recommends {missing}" if missing else "needs root")
    state = Path(tempfile.mkdtemp(prefix="crate-ray-cluster-"))
    settings = local_cluster_settings(state) | {"CRATE_RAY_NAMESPACES": "1", "CRATE_RAY_CPUS_PER_NODE": "1"}
    settings |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
    cluster, before = LocalCluster(state, settings), network_links()
    try:
        up = cluster.local_sh("up")
        if up.returncode and "Operation not permitted" in up.stderr:
            pytest.skip("this machine's root may not make networks")
        assert up.returncode == 0, up.stdout + up.stderr
        yield cluster
    finally:
        cluster.local_sh("down")
        shutil.rmtree(state, ignore_errors=True)
    deadline = time.monotonic() + 10  # the kernel takes a moment
    while (links := network_links()) - before:
        assert time.monotonic() < deadline, links - before
        time.sleep(0.1)


def network_links() -> set[str]:
    """Names of this machine's network interfaces."""
    return {path.name for path in Path("/sys/class/net").iterdir()}


def second_worker(cluster: LocalCluster) -> psutil.Process | None:
    """The training worker in the second node's network."""
    status = cluster.local_sh("status").stdout
    node = next(line.split()[-1] for line in status.splitlines() if line.startswith("ray-second: up"))
    network = Path(f"/proc/{node}/ns/net").readlink()
    for process in psutil.process_iter():
        try:
            found = " ".join(process.cmdline()).startswith("ray::RayTrainWorker")
            if found and Path(f"/proc/{process.pid}/ns/net").readlink() == network:
                return process
        except (psutil.Error, FileNotFoundError):
            continue
    return None


def wait_for_step(run: Storage, step: int, cluster: LocalCluster) -> None:
    deadline = time.monotonic() + 300
    while newest_commit(run) < step:
        assert time.monotonic() < deadline and not has_failed(cluster), logs(cluster)
        time.sleep(0.2)


def has_failed(cluster: LocalCluster) -> bool:
    """Whether the job has ended with an error."""
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    url, headers = f"{cluster.env['RAY_ADDRESS']}/api/jobs/run", {"Authorization": f"Bearer {token}"}
    return bool(requests.get(url, headers=headers, timeout=30).json()["status"] == "FAILED")


def logs(cluster: LocalCluster) -> str:
    """What the job has said."""
    said = subprocess.run(
        [RAY, "job", "logs", "run"], env=cluster.environment(), capture_output=True, text=True, check=False
    )
    return said.stdout[-5000:] + said.stderr[-1000:]


@pytest.mark.timeout(1500)
def test_a_node_is_cut_off_in_mid_training_and_comes_back(
    digits: str, undisturbed: Undisturbed, two_machines: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = two_machines
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.Session().client("s3")
    for path in (path for path in Path(digits).rglob("*") if path.is_file()):
        s3.upload_file(str(path), "data", f"digits/{path.relative_to(digits).as_posix()}")
    settings = {"data__train": "s3://data/digits", "storage": "s3://runs", "scaling__max_failures": 50}
    command = pretrain(digits, **settings)[2:]
    env_vars = (
        '{"env_vars": {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}}'
    )
    submit = [RAY, "job", "submit", "--no-wait", "--submission-id", "run", "--runtime-env-json", env_vars]
    subprocess.run(
        [*submit, "--working-dir", ".", "--", "python", "jobs/pretrain.py", *command],
        env=cluster.environment(), cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    run = open_storage("s3://runs", S3Config()).under("run")
    deadline = time.monotonic() + 300
    while (worker := second_worker(cluster)) is None:
        assert time.monotonic() < deadline and not has_failed(cluster), logs(cluster)
        time.sleep(0.2)
    wait_for_step(run, EVERY, cluster)
    worker.suspend()  # so that the run does not end before it is cut off
    assert newest_commit(run) < STEPS
    assert cluster.local_sh("cut").returncode == 0
    worker.resume()
    time.sleep(20)  # longer than the head waits for a silent node
    before = newest_commit(run)
    time.sleep(3)
    assert newest_commit(run) == before < STEPS, "one worker cannot go on alone"
    healed = cluster.local_sh("heal")
    assert healed.returncode == 0, healed.stderr
    wait_for_step(run, STEPS, cluster)
    deadline = time.monotonic() + 120
    while not run.exists("model/model.safetensors"):
        assert time.monotonic() < deadline and not has_failed(cluster), logs(cluster)
        time.sleep(0.5)
    assert final_weights(run) == undisturbed.weights(2)
    assert "resuming at step" in logs(cluster)
