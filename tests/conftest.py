"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3_gateway import S3Gateway, running_gateway

_RAY = {
    "test_kill", "test_nodes", "test_services", "test_stop", "test_jobs", "test_local_cluster", "test_scale_out",
    "test_data_order", "test_evaluate", "test_finetune", "test_prepare_ray",
}  # fmt: skip
"""Files whose tests start Ray, of which one at a time runs; the others are groups by themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist (--dist loadgroup) which tests to keep in one process."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path.stem in _RAY else item.path.stem))


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[S3Gateway]:
    """A real S3 server, one for the whole session; skips where radosgw is not installed."""
    with running_gateway() as gateway:
        yield gateway
