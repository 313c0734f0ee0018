"""requirements*.lock: every pinned version with its digests, complete for what runs and for what tests."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-tools.lock")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name: str) -> dict[str, str]:
    """Versions of a lock by package; each has digests, and nothing says where files come from."""
    lines = (ROOT / name).read_text().replace("\\\n", "").splitlines()
    found = {}
    for line in (line for line in lines if not line.startswith("#")):
        match = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)( ; [^#\\]+?)? +((?: *--hash=sha256:[0-9a-f]{64})+) *", line)
        assert match, f"{name}: {line[:80]}"
        found[match[1]] = match[2]
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_packages_versions_and_digests_only(name: str) -> None:
    assert locked(name)
    assert "://" not in (ROOT / name).read_text()


def test_locks_and_constraints_agree() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines if not line.startswith("#"))}
    assert pins.pop("torch"), "its builds differ by machine"
    runs, develops = locked("requirements.lock"), locked("requirements-dev.lock")
    assert not runs.keys() & develops.keys()
    assert runs | develops == pins, "run `make lock`"


def needed(requirements: list[str]) -> set[str]:
    """Names of packages that requirements bring on this machine, with those of torch left to torch."""
    found: set[str] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue
        for wanted in {"", *requirement.extras}:
            if (key := f"{name}[{wanted}]") not in found:
                found.add(key)
                todo += [(Requirement(text), wanted) for text in distribution(name).requires or []]
    return {key.partition("[")[0] for key in found}


def test_the_locks_are_complete() -> None:
    """They are installed without looking at what packages ask for, so a missing one would be missed at run time."""
    project = PROJECT["project"]
    runs, develops = locked("requirements.lock"), locked("requirements-dev.lock")
    extras = project["optional-dependencies"]
    assert needed([*project["dependencies"], *extras["server"]]) - runs.keys() == set()
    assert needed(extras["dev"]) - (runs.keys() | develops.keys()) == set()
    for text in [*project["dependencies"], *extras["server"], *extras["dev"]]:
        requirement, versions = Requirement(text), runs | develops
        if requirement.name != "torch":
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text
    tools = locked("requirements-tools.lock")
    assert {canonicalize_name(Requirement(text).name) for text in PROJECT["dependency-groups"]["tools"]} <= tools.keys()


def test_the_build_backend_is_the_locked_one() -> None:
    assert PROJECT["build-system"]["requires"] == [f"setuptools=={locked('requirements.lock')['setuptools']}"]
