"""The package's rooms: each one imports only from the rooms before it (see docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import crate_ray

ROOT = Path(crate_ray.__file__).parent
ROOMS = (
    ("addresses",),
    ("output",),
    ("errors", "bounded", "memory", "progress", "quiet"),
    ("config",),
    ("cli",),
    ("__main__",),  # names jobs by text, and imports the one that is asked for
    ("storage",),
    ("ray_address",),
    ("ray_cluster",),
    ("models",),
    ("structure",),
    ("data",),
    ("serving",),
    ("served_model",),
    ("runs",),
    ("tracking",),
    ("training",),
    ("evaluation", "finetuning"),
    ("exporting",),
    ("server",),
    ("sweeps",),
    ("comparison",),
    ("benchmarks",),
    ("jobs",),
)
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
TORCH_ALONE = (
    "models", "structure", "data.decode.samples", "data.loader", "data.stream", "training.step", "training.bare_loop",
    "comparison.alone", "benchmarks.training", "jobs.compare", "jobs.benchmark",
)  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Modules of crate_ray that a file imports anywhere, without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("crate_ray."):
            found.add(node.module.removeprefix("crate_ray."))
        elif isinstance(node, ast.ImportFrom) and node.module == "crate_ray":
            found |= {alias.name for alias in node.names if (ROOT / alias.name).is_dir()}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("crate_ray.") for a in node.names if a.name.startswith("crate_ray.")}
    return found


def _room(module: str) -> str:
    return module.split(".")[0]


def test_a_room_imports_only_from_rooms_before_it() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = _room(module)
        if room == "__init__":
            continue
        assert room in RANK, f"{room} is in no room; add it to ROOMS and to docs/architecture.md"
        for imported in sorted(_imports(path)):
            other = _room(imported)
            if other != room and RANK[other] >= RANK[room]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_only_training_ray_and_named_modules_import_ray() -> None:
    """Ray Train is known to training/ray alone; nothing else in training imports Ray."""
    for path in sorted((ROOT / "training").rglob("*.py")):
        if "ray" in path.relative_to(ROOT / "training").parts[:-1]:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name == "ray" or name.startswith("ray.") for name in names), path


@pytest.mark.slow
def test_torch_alone_is_enough_for_models_data_and_steps() -> None:
    """A machine without Ray, MLflow and boto3 can build, feed, train and measure models."""
    blocked = ("ray", "mlflow", "boto3", "botocore")
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in blocked)]
    lines += [f"import crate_ray.{module}" for module in TORCH_ALONE]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=300, cwd=ROOT.parent)
