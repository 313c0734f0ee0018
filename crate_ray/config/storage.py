"""Settings of object storage."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from crate_ray.config.base import Advanced, PositiveInt, ServerAddress, Settings


class S3Config(Settings):
    """Access to S3. Credentials come only from the usual AWS chain: environment, ~/.aws, instance role."""

    endpoint_url: ServerAddress | None = None
    """Address of an S3-compatible store, such as http://127.0.0.1:7480; by default that of the AWS
    chain (AWS_ENDPOINT_URL, ~/.aws/config), or AWS itself."""
    region: Advanced[str | None] = None
    """Region name; by default that of the AWS chain."""
    connect_timeout: Advanced[Annotated[float, Field(gt=0)]] = 5.0
    """Seconds to wait for a connection."""
    read_timeout: Advanced[Annotated[float, Field(gt=0)]] = 30.0
    """Seconds to wait for more bytes of a response."""
    retry_seconds: Advanced[Annotated[float, Field(ge=0)]] = 120.0
    """Seconds without progress after which a request fails: how long a run survives an outage of the store or expired
    credentials. A request to an endpoint that has never answered fails after 10 s. 0 turns retries off."""
    max_attempts: Advanced[PositiveInt] = 40
    """Attempts without progress after which a request fails, however little time they took. Waits between attempts are
    random; their limit starts at 0.1 s and doubles up to 20 s, so about 20 attempts fit into 120 s."""
