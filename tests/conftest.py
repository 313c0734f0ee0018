"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.s3_gateway import S3Gateway, running_gateway

_RAY = {
    "test_kill", "test_nodes", "test_services", "test_stop", "test_jobs", "test_local_cluster", "test_scale_out",
    "test_evaluate", "test_finetune", "test_prepare_ray",
}  # fmt: skip
"""Files whose tests start Ray: those of one folder run one at a time, and share what they start. Not test_data_order,
which has a Ray of its own."""


class _Scheduling(LoadScopeScheduling):
    """Which tests pytest-xdist keeps in one process: those of a file, or of all files of a folder that start Ray."""

    def _split_scope(self, nodeid: str) -> str:
        path = Path(nodeid.split("::")[0])
        return f"{path.parent} with Ray" if path.stem in _RAY else path.as_posix()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _Scheduling:
    return _Scheduling(config, log)


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[S3Gateway]:
    """A real S3 server, one for the whole session; skips where radosgw is not installed."""
    with running_gateway() as gateway:
        yield gateway
