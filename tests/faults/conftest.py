"""Fixtures of the fault tests: a Ray cluster, data, and the weights of undisturbed runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.runs import Undisturbed, pack_digits
from tests.jobs import RayCluster, running_ray


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="package")
def cluster() -> Iterator[RayCluster]:
    with running_ray(6) as cluster:  # more than a machine of two cores would have by itself
        yield cluster


@pytest.fixture(scope="session")
def undisturbed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(digits, tmp_path_factory.mktemp("undisturbed"))
