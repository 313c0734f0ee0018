"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Two test processes run side by side. More threads than cores make torch's threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from tests.s3_gateway import S3Gateway, running_gateway

# The same examples at each run of CI; `make daily` looks for new ones.
hypothesis.settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("daily", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

_S3_FIXTURES = {"s3_gateway", "local_cluster"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, and those of all files of a folder that start Ray: they share it."""
    for item in items:
        if _S3_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.s3)
        file = Path(item.nodeid.split("::")[0])
        group = f"{file.parent} with Ray" if item.get_closest_marker("ray") else file.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[S3Gateway]:
    """A real S3 server, one for the whole session; skips if radosgw is not installed."""
    with running_gateway() as gateway:
        yield gateway
