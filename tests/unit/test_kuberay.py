"""cluster/kuberay/: what `kubectl apply -k` would send, against KubeRay's own schemas and our rules."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from crate_ray.cli import parse_config
from crate_ray.config import PretrainConfig

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster/kuberay"
CRDS = ROOT.parent / "shared/crds"
OVERLAYS = ("cpu", "gpu", "spot", "job")
OURS = {"app.kubernetes.io/name": "crate-ray"}

Resources = dict[str, dict[str, Any]]


@cache
def rendered(overlay: str, with_redis: bool = False) -> Resources:
    """Resources of an overlay by kind."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl, which builds the overlays, is not installed")
    with tempfile.TemporaryDirectory() as copied:
        folder = shutil.copytree(KUBERAY, Path(copied, "kuberay")) / overlay
        if with_redis:  # as if somebody took the comment's mark away
            text = (folder / "kustomization.yaml").read_text()
            assert text.count("# components:") == 1
            (folder / "kustomization.yaml").write_text(text.replace("# components:", "components:"))
        built = subprocess.run([program, "kustomize", folder], capture_output=True, text=True, check=True).stdout
    return {item["kind"]: item for item in yaml.safe_load_all(built)}


def cluster_of(resources: Resources) -> dict[str, Any]:
    """Specification of the Ray cluster."""
    if "RayJob" in resources:
        return dict(resources["RayJob"]["spec"]["rayClusterSpec"])
    return dict(resources["RayCluster"]["spec"])


def pods(resources: Resources) -> list[dict[str, Any]]:
    """Every pod template."""
    spec = cluster_of(resources)
    found = [group["template"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    found += [resources["RayJob"]["spec"]["submitterPodTemplate"]] if "RayJob" in resources else []
    return found + ([resources["StatefulSet"]["spec"]["template"]] if "StatefulSet" in resources else [])


# --- KubeRay's schemas ------------------------------------------------------------------------------------------------


@cache
def schema(kind: str) -> Draft202012Validator:
    """What a Kubernetes API server checks a resource with; fields that it would drop are errors."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's schema {path} is missing")
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
    return Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(node: Any) -> Any:
    """A schema that allows no property that it does not name."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {name: strict(value) for name, value in node.items()}
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def errors(resource: dict[str, Any]) -> list[str]:
    """What KubeRay's schema has against a resource. A server knows `metadata` itself."""
    checked = {**resource, "metadata": {}}
    return [f"{error.json_path}: {error.message}" for error in schema(resource["kind"]).iter_errors(checked)]


@pytest.mark.parametrize("with_redis", [False, True])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_matches_kuberays_schema(overlay: str, with_redis: bool) -> None:
    if overlay == "job" and with_redis:
        pytest.skip("a job's cluster lives as long as the job")
    resources = rendered(overlay, with_redis)
    ours = resources["RayJob" if overlay == "job" else "RayCluster"]
    assert ours["apiVersion"] == "ray.io/v1"
    assert errors(ours) == []


def test_the_base_matches_kuberays_schema() -> None:
    """Also where kubectl is missing."""
    assert errors(yaml.safe_load((KUBERAY / "base/raycluster.yaml").read_text())) == []


def places(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings in which a field's name could be mistyped."""
    if isinstance(node, dict):
        yield node
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from places(item)


@given(st.data())
def test_a_mistyped_field_is_found_wherever_it_is(data: st.DataObject) -> None:
    """That is: the check above is strict."""
    resource = yaml.safe_load((KUBERAY / "base/raycluster.yaml").read_text())
    free = ("rayStartParams", "labels", "requests", "limits", "metadata")  # mappings with names of the user's own
    spec = copy.deepcopy(resource["spec"])
    named = [
        place for place in places(spec) if not any(place is owner.get(name) for owner in places(spec) for name in free)
    ]
    data.draw(st.sampled_from(named))["mistyped"] = "x"
    assert errors({**resource, "spec": spec})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_other_resources_match_kubernetes_schema(overlay: str) -> None:
    checker = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    resources = rendered(overlay, overlay != "job")
    for resource in (item for kind, item in resources.items() if not kind.startswith("Ray")):
        checker.validate(resource, checker.latest_version(), strict=True)


# --- Our rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_cluster_starts_workers_on_demand_and_needs_a_token(overlay: str) -> None:
    resources = rendered(overlay)
    spec = cluster_of(resources)
    assert spec["authOptions"] == {"mode": "token"}
    assert re.search(rf"^ray=={re.escape(spec['rayVersion'])}$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert spec["enableInTreeAutoscaling"] is True
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"]["num-cpus"] == "0"
    assert workers["minReplicas"] <= workers["replicas"] < workers["maxReplicas"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (overlay != "cpu")
    pod = workers["template"]["spec"]
    assert ("nodeSelector" in pod) == (overlay == "spot")
    assert [item["key"] for item in pod.get("tolerations", [])] == {
        "cpu": [], "gpu": ["nvidia.com/gpu"], "job": ["nvidia.com/gpu"], "spot": ["nvidia.com/gpu", "spot"],
    }[overlay]  # fmt: skip
    assert "eks.amazonaws.com/role-arn" in resources["ServiceAccount"]["metadata"]["annotations"]
    assert {"MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION"} <= set(resources["ConfigMap"]["data"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_and_bounded(overlay: str) -> None:
    resources = rendered(overlay, overlay != "job")
    templates = pods(resources)
    assert len(templates) == 3
    autoscaler = cluster_of(resources)["autoscalerOptions"]
    containers = [container for template in templates for container in template["spec"]["containers"]]
    for container in [*containers, autoscaler]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"])
    for template in templates:
        assert OURS.items() <= template["metadata"]["labels"].items(), "the network policy is for it, too"
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        is_head = container["name"] == "ray-head"
        assert pod.get("automountServiceAccountToken", True) == is_head, "only the autoscaler talks to Kubernetes"
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        claimed = {"data"} if container["name"] == "redis" else set()
        assert mounted.keys() == {volume["name"] for volume in pod.get("volumes", [])} | claimed
        if container["name"] in ("ray-head", "ray-worker"):
            assert {"/tmp", "/home/ray/.cache"} <= set(mounted.values())
            assert pod["serviceAccountName"] == "crate-ray" and pod["restartPolicy"] == "Never"
            assert container["envFrom"] == [{"configMapRef": {"name": "crate-ray"}}]
            assert "env" not in container  # the token comes from the operator, S3 rights from the service account


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_network_is_closed(overlay: str) -> None:
    """Other pods reach nothing; ours reach each other, names, MLflow and S3, but not the machine's own credentials."""
    policy = rendered(overlay)["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {"matchLabels": OURS}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": OURS}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}] and "namespaceSelector" in operator["from"][0]
    for rule in policy["egress"]:
        assert rule["to"]
        for peer in rule["to"]:
            assert peer.keys() == {"podSelector"} or rule["ports"]
            if block := peer.get("ipBlock"):
                assert "169.254.0.0/16" in block["except"]


def test_redis_keeps_the_state_of_the_head() -> None:
    resources = rendered("gpu", True)
    options = cluster_of(resources)["gcsFaultToleranceOptions"]
    service = resources["Service"]
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    (redis,) = resources["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    assert redis["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"], "one password"
    assert redis["args"][-2:] == ["--requirepass", "$(REDIS_PASSWORD)"]
    labels = resources["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_job_runs_a_command_that_parses_on_a_cluster_of_its_own() -> None:
    resources = rendered("job")
    assert "RayCluster" not in resources
    job = resources["RayJob"]["spec"]
    assert job["shutdownAfterJobFinishes"] is True
    assert job["rayClusterSpec"] == rendered("gpu")["RayCluster"]["spec"]
    program, script, *arguments = job["entrypoint"].split()
    assert (program, script) == ("python", "jobs/pretrain.py")
    assert (ROOT / arguments[1]).is_file()
    arguments[1] = str(ROOT / arguments[1])
    config = parse_config(PretrainConfig, arguments)
    assert config.scaling.gpu is True
    assert config.storage.startswith("s3://")
