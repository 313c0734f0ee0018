"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3_gateway import S3Gateway, running_gateway


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[S3Gateway]:
    """A real S3 server, one for the whole session; skips where radosgw is not installed."""
    with running_gateway() as gateway:
        yield gateway
