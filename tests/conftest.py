"""Fixtures and settings that tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

# Two test processes run side by side. More threads than cores make torch's threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.s3_gateway import S3Gateway, running_gateway

# The same examples at each run of CI; `make daily` looks for new ones.
hypothesis.settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("daily", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

_S3_FIXTURES = {"s3_gateway", "local_cluster"}


class _Scheduling(LoadScopeScheduling):
    """Runs the tests of a file in one process. All files of a folder that start Ray run in one process and share it."""

    def _split_scope(self, nodeid: str) -> str:
        path = Path(nodeid.split("::")[0])
        return f"{path.parent} with Ray" if _starts_ray(path) else path.as_posix()


@cache
def _starts_ray(path: Path) -> bool:
    return "pytestmark = pytest.mark.ray" in path.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _Scheduling:
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _S3_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.s3)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is not UTF-8 in captured output, such as names of files: pytest-xdist cannot send it."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[S3Gateway]:
    """A real S3 server, one for the whole session; skips if radosgw is not installed."""
    with running_gateway() as gateway:
        yield gateway
