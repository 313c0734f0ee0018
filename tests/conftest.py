"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3_gateway import S3Gateway, running_gateway

_GROUPS = {
    "test_kill": "training faults", "test_nodes": "training faults",
    "test_services": "training faults", "test_stop": "training faults",
    "test_jobs": "local cluster", "test_local_cluster": "local cluster",
}  # fmt: skip
"""Files whose tests share what takes long to start; the others are groups by themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist (--dist loadgroup) which tests to keep in one process."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_GROUPS.get(item.path.stem, item.path.stem)))


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[S3Gateway]:
    """A real S3 server, one for the whole session; skips where radosgw is not installed."""
    with running_gateway() as gateway:
        yield gateway
