"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3_gateway import S3Gateway, running_gateway

_RAY = {
    "test_kill", "test_nodes", "test_services", "test_stop", "test_jobs", "test_local_cluster", "test_scale_out",
    "test_data_order", "test_evaluate", "test_finetune", "test_prepare_ray",
}  # fmt: skip
"""Files whose tests start Ray: those of one folder run one at a time, in a process of their own. The other files are
groups by themselves."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist (--dist loadgroup) which tests to keep in one process."""
    for item in items:
        group = f"ray-{item.path.parent.name}" if item.path.stem in _RAY else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[S3Gateway]:
    """A real S3 server, one for the whole session; skips where radosgw is not installed."""
    with running_gateway() as gateway:
        yield gateway
