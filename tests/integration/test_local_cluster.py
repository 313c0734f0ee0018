"""cluster/local.sh for real: Ray with token authentication, S3, MLflow on PostgreSQL; and nothing left after `down`."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from mlflow.tracking import MlflowClient

from tests.jobs import RAY

pytestmark = pytest.mark.ray

if TYPE_CHECKING:
    from conftest import LocalCluster


def command_lines() -> dict[int, str]:
    """Command line of every process, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {pid: line for pid, line in found.items() if line}


def test_job_with_the_token_and_none_without(local_cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        """
import os, ray
ray.init()
@ray.remote(num_cpus=2)  # all of a node's CPUs
class Where:
    def node(self):
        return ray.get_runtime_context().get_node_id()
actors = [Where.remote(), Where.remote()]
nodes = set(ray.get([actor.node.remote() for actor in actors]))
print("nodes", len(nodes), "in", os.path.basename(os.getcwd()).startswith("_ray_pkg"), os.environ["AWS_ENDPOINT_URL"])
"""
    )
    job = [RAY, "job", "submit", "--working-dir", str(tmp_path), "--", "python", "job.py"]
    done = subprocess.run(
        job, env=local_cluster.environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"nodes 2 in True {local_cluster.env['AWS_ENDPOINT_URL']}" in done.stdout

    stranger = {name: value for name, value in local_cluster.environment().items() if not name.startswith("RAY_AUTH")}
    stranger |= {"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"}
    refused = subprocess.run(job, env=stranger, capture_output=True, text=True, timeout=100, check=False)
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout + refused.stderr
    wrong = {**stranger, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run(job, env=wrong, capture_output=True, text=True, timeout=100, check=False)
    assert refused.returncode != 0
    assert "submitted successfully" not in refused.stdout + refused.stderr


def test_s3_and_mlflow(local_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in local_cluster.env.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.Session().client("s3")
    assert {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]} >= {"data", "runs", "mlflow"}
    s3.put_object(Bucket="data", Key="a/b", Body=b"0123456789")
    assert s3.get_object(Bucket="data", Key="a/b", Range="bytes=3-5")["Body"].read() == b"345"
    with pytest.raises(s3.exceptions.ClientError):  # a lease needs conditional writes
        s3.put_object(Bucket="data", Key="a/b", Body=b"", IfNoneMatch="*")

    client = MlflowClient(local_cluster.env["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("local-cluster"))
    client.log_metric(run.info.run_id, "loss", 0.5)
    note = tmp_path / "note.txt"
    note.write_text("kept in the bucket")
    client.log_artifact(run.info.run_id, str(note))
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    keys = [item["Key"] for page in pages for item in page["Contents"]]
    assert any(run.info.run_id in key and key.endswith("note.txt") for key in keys)


def test_secrets_stay_secret(local_cluster: LocalCluster) -> None:
    folder = local_cluster.state / "secrets"
    files = [local_cluster.state / "env.sh", *folder.iterdir()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    secrets = [(folder / name).read_text().strip() for name in ("ray-token", "mlflow", "postgres-admin")]
    secrets.append(local_cluster.env["AWS_SECRET_ACCESS_KEY"])
    shown = local_cluster.local_sh("up").stdout + local_cluster.local_sh("status").stdout
    everywhere = shown + "\n".join(command_lines().values())
    assert all(len(secret) >= 20 and secret not in everywhere for secret in secrets)
    assert "already up" in shown


@pytest.mark.daily
@pytest.mark.timeout(900)
def test_down_leaves_nothing_and_up_finds_the_data(
    local_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this cluster: down with a job that would run on, up again, a part killed, down."""
    state = str(local_cluster.state)
    for name, value in local_cluster.env.items():
        monkeypatch.setenv(name, value)
    boto3.Session().client("s3").put_object(Bucket="data", Key="kept", Body=b"kept")
    stays = "sleep 987123"
    subprocess.run(
        [RAY, "job", "submit", "--no-wait", "--", "bash", "-c", f"{stays} & {stays}"], check=True, capture_output=True
    )
    for _ in range(100):
        if sum(line.startswith(stays) for line in command_lines().values()) == 2:
            break
        subprocess.run(["sleep", "0.2"], check=True)
    else:
        pytest.fail("the job did not start")
    assert re.findall(r"(\S+): up", local_cluster.local_sh("status").stdout) == [
        "s3", "postgres", "mlflow", "ray-head", "ray-second",
    ]  # fmt: skip

    other = subprocess.Popen(["sleep", "876543"], env={"CRATE_RAY_CLUSTER_ID": "of another cluster"})
    try:
        assert local_cluster.local_sh("down").returncode == 0
        assert other.poll() is None, "down ended another cluster's process"
    finally:
        other.kill()
        other.wait()
    left = [line for line in command_lines().values() if state in line or line.startswith(stays)]
    assert left == []
    assert local_cluster.local_sh("status").returncode == 3
    assert "not up" in local_cluster.local_sh("down").stdout

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections to MLflow have ended just now
        taken.bind(("127.0.0.1", int(local_cluster.settings["CRATE_RAY_MLFLOW_PORT"])))
        taken.listen()
        refused = local_cluster.local_sh("up")
    assert refused.returncode == 1
    assert "set CRATE_RAY_MLFLOW_PORT to another port" in refused.stderr

    again = local_cluster.local_sh("up")
    assert again.returncode == 0, again.stdout + again.stderr
    assert boto3.Session().client("s3").get_object(Bucket="data", Key="kept")["Body"].read() == b"kept"
    status = local_cluster.local_sh("status")
    pid = re.search(r"ray-second: up, pid (\d+)", status.stdout)
    assert pid
    os.kill(int(pid[1]), 9)
    assert local_cluster.local_sh("down").returncode == 0
    assert [line for line in command_lines().values() if state in line] == []
