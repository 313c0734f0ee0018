"""Where object storage is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from crate_ray.config.base import PositiveInt, Settings


class S3Config(Settings):
    """Where S3 is. Credentials come only from the usual AWS chain (environment, ~/.aws, instance role)."""

    endpoint_url: Annotated[str | None, Field(repr=False)] = None
    """Address of an S3-compatible store, such as http://127.0.0.1:7480; not set: AWS_ENDPOINT_URL, or AWS itself."""
    region: str | None = None
    """Region name; the AWS chain's when not set."""
    connect_timeout: Annotated[float, Field(gt=0)] = 5.0
    """Seconds to wait for a connection."""
    read_timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds to wait for more bytes of a response."""
    retry_seconds: Annotated[float, Field(ge=0)] = 120.0
    """Seconds without progress after which a request is given up: a run survives an outage of the store, or expired
    credentials, for so long. An endpoint that never answered is given up after 10 s. 0 turns retries off."""
    max_attempts: PositiveInt = 40
    """Attempts without progress after which a request is given up, however short a time they took; waits between them
    are random, from 0 to 0.1 s at first, doubling up to 20 s (about 20 attempts fit into 120 s)."""
